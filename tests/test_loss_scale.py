"""The scale of the loss in fp16 is that of torch's GradScaler, whose state is kept where no update waits for it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from harness.strategy.loss_scale import LEAST, LossScale
from tests.test_order import unhurried

CPU = torch.device("cpu")


@unhurried
@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
def test_it_halves_and_doubles_when_torchs_own_does(finite: list[bool], growth_interval: int) -> None:
    ours = LossScale(CPU, scale=2.0**50, growth_interval=growth_interval)
    torchs = torch.amp.GradScaler("cpu", init_scale=2.0**50, growth_interval=growth_interval)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for is_finite in finite:
        optimizer.zero_grad()
        torchs.scale(weight.sum()).backward()
        if not is_finite:
            weight.grad.fill_(torch.inf)  # type: ignore[union-attr]
        torchs.step(optimizer)
        torchs.update()
        ours.settle(torch.tensor(is_finite))
        assert ours.state_dict() == {"scale": torchs.get_scale(), "applied_in_a_row": torchs._get_growth_tracker()}


@pytest.mark.parametrize(("finite", "end"), [(False, LEAST), (True, 2.0**100)])
def test_it_stays_between_one_and_what_is_still_finite(finite: bool, end: float) -> None:
    scale = LossScale(CPU, growth_interval=1)
    for _ in range(300):
        scale.settle(torch.tensor(finite))
    assert scale.scale.item() == end


@unhurried
@given(st.lists(st.booleans(), max_size=20), st.lists(st.booleans(), max_size=20))
def test_it_goes_on_where_it_was_saved(before: list[bool], after: list[bool]) -> None:
    alone, saved, resumed = (LossScale(CPU, growth_interval=3) for _ in range(3))
    for is_finite in before:
        alone.settle(torch.tensor(is_finite))
        saved.settle(torch.tensor(is_finite))
    resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    for is_finite in after:
        alone.settle(torch.tensor(is_finite))
        resumed.settle(torch.tensor(is_finite))
    assert resumed.state_dict() == alone.state_dict()

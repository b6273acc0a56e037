"""The optimizer: which parameters decay, and the arithmetic of torch's own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from harness.config.training import Optim
from harness.optim import build_optimizer, parameter_groups

PARSER: TypeAdapter[Optim] = TypeAdapter(Optim)
RATE = 1e-2


def a_network() -> nn.Sequential:
    torch.manual_seed(0)
    head = (nn.Linear(9, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 1))
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(9), *head).double()


def names_of(model: nn.Module, parameters: Any) -> set[str]:
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_identity[id(parameter)] for parameter in parameters}


def built(model: nn.Module, kind: str, **keys: Any) -> Optimizer:
    return build_optimizer(model, PARSER.validate_python({"kind": kind, "peak_lr": RATE, **keys}))


def updated(model: nn.Module, optimizer: Optimizer, *, num_updates: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_updates):
        inputs = torch.randn(8, 2, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


# ---------------------------------------------------------------- groups


def test_weights_decay_but_biases_and_norms_do_not() -> None:
    model = a_network()
    decayed, others = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert names_of(model, decayed["params"]) == {"0.weight", "3.weight", "6.weight"}
    biases, norms = {"0.bias", "3.bias", "6.bias"}, {"2.weight", "2.bias", "5.weight", "5.bias"}
    assert names_of(model, others["params"]) == biases | norms


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = a_network()
    grouped = [parameter for group in parameter_groups(model, weight_decay=0.1) for parameter in group["params"]]  # type: ignore[attr-defined]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_frozen_parameters_are_left_out_and_stay_as_they_are() -> None:
    model = a_network()
    model[0].requires_grad_(False)
    optimizer = built(model, "adamw", weight_decay=0.5)
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert names_of(model, model.parameters()) - {"0.weight", "0.bias"} == {
        name for name, parameter in model.named_parameters() if id(parameter) in grouped
    }
    before = model[0].weight.clone()
    updated(model, optimizer)
    assert torch.equal(model[0].weight, before)


def test_a_group_without_parameters_is_left_out() -> None:
    only_weights = nn.Linear(2, 2, bias=False)
    assert [group["weight_decay"] for group in parameter_groups(only_weights, weight_decay=0.1)] == [0.1]


def test_every_group_starts_at_the_peak_rate() -> None:
    optimizer = built(a_network(), "sgd", weight_decay=0.1)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [RATE, RATE]


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize(
    ("kind", "keys", "reference"),
    [
        ("adamw", {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}, AdamW),
        ("adam", {"betas": (0.8, 0.9), "eps": 1e-6}, Adam),
        ("sgd", {"weight_decay": 0.1}, SGD),
        ("sgd", {"weight_decay": 0.1, "momentum": 0.9}, SGD),
        ("sgd", {"momentum": 0.9, "nesterov": True}, SGD),
    ],
    ids=["adamw", "adam", "sgd", "momentum", "nesterov"],
)
def test_five_updates_are_those_of_torchs_unfused_class(kind: str, keys: dict[str, Any], reference: Any) -> None:
    model, plain = a_network(), a_network()
    decay = keys.get("weight_decay", 0.0)
    groups = [
        {"params": [parameter for parameter in plain.parameters() if parameter.dim() >= 2], "weight_decay": decay},
        {"params": [parameter for parameter in plain.parameters() if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    options = {name: value for name, value in keys.items() if name != "weight_decay"}
    wanted = updated(plain, reference(groups, lr=RATE, fused=False, foreach=False, **options))
    found = updated(model, built(model, kind, **keys))
    for left, right, start in zip(found, wanted, a_network().parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)  # fused kernels round in another order
        assert not torch.equal(left, start), "a comparison of what did not move proves nothing"


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_an_update_that_found_inf_changes_nothing(kind: str) -> None:
    model = a_network()
    optimizer = built(model, kind)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    for left, right in zip(updated(model, optimizer), a_network().parameters(), strict=True):
        assert torch.equal(left, right)

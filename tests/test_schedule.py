"""The learning rate of every update, against torch's own schedulers, closed forms and what holds of any schedule."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from harness.config.training import Schedule
from harness.errors import ConfigError
from harness.schedule import check_fits, learning_rate
from tests.test_order import unhurried

PEAK = 3e-3
TOTAL, PER_EPOCH = 40, 10
ROUNDING = 1e-12  # a few operations on float64
PARSER: TypeAdapter[Schedule] = TypeAdapter(Schedule)

Maker = Callable[[Optimizer], LRScheduler]


def a_schedule(kind: str, **keys: Any) -> Schedule:
    return PARSER.validate_python({"kind": kind, **keys})


def rates(schedule: Schedule, total: int = TOTAL, peak: float = PEAK) -> list[float]:
    run: dict[str, Any] = {"peak_lr": peak, "total_updates": total, "updates_per_epoch": PER_EPOCH}
    return [learning_rate(update, schedule, **run) for update in range(1, total + 1)]


def torch_rates(make: Maker) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    found = []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


# ---------------------------------------------------------------- against torch


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (a_schedule("constant"), lambda optimizer: ConstantLR(optimizer, factor=1.0)),
        (a_schedule("plateau"), lambda optimizer: ConstantLR(optimizer, factor=1.0)),
        (
            a_schedule("linear", final_lr_fraction=0.2),
            lambda optimizer: LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=TOTAL),
        ),
        (
            a_schedule("cosine", final_lr_fraction=0.1),
            lambda optimizer: CosineAnnealingLR(optimizer, T_max=TOTAL, eta_min=0.1 * PEAK),
        ),
        (a_schedule("cosine"), lambda optimizer: CosineAnnealingLR(optimizer, T_max=TOTAL)),
        (
            a_schedule("step", every_steps=7, factor=0.5),
            lambda optimizer: StepLR(optimizer, step_size=7, gamma=0.5),
        ),
        (
            a_schedule("step", every_epochs=1, factor=0.5),
            lambda optimizer: StepLR(optimizer, step_size=PER_EPOCH, gamma=0.5),
        ),
        (
            a_schedule("step", every_epochs=2, factor=0.5),
            lambda optimizer: StepLR(optimizer, step_size=2 * PER_EPOCH, gamma=0.5),
        ),
        (
            a_schedule("wsd", decay_steps=8, final_lr_fraction=0.25),
            lambda optimizer: SequentialLR(
                optimizer,
                [
                    ConstantLR(optimizer, factor=1.0),
                    LinearLR(optimizer, start_factor=1.0, end_factor=0.25, total_iters=8),
                ],
                milestones=[TOTAL - 8],
            ),
        ),
    ],
    ids=["constant", "plateau", "linear", "cosine", "cosine to zero", "step", "epoch", "two epochs", "wsd"],
)
def test_every_rate_is_that_of_torchs_scheduler(schedule: Schedule, make: Maker) -> None:
    assert rates(schedule) == pytest.approx(torch_rates(make), rel=ROUNDING, abs=0)


@pytest.mark.parametrize(
    ("kind", "make_decay"),
    [
        ("constant", lambda optimizer, length: ConstantLR(optimizer, factor=1.0)),
        ("linear", lambda optimizer, length: LinearLR(optimizer, 1.0, end_factor=0.0, total_iters=length)),
        ("cosine", lambda optimizer, length: CosineAnnealingLR(optimizer, T_max=length)),
    ],
)
@pytest.mark.parametrize("warmup", [2, 9, TOTAL - 1])
def test_warmup_and_decay_are_torchs_linear_scheduler_followed_by_the_decays_own(
    kind: str, make_decay: Callable[[Optimizer, int], LRScheduler], warmup: int
) -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        # From peak / warmup at the first update to the whole peak warmup - 1 updates later.
        up = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        return SequentialLR(optimizer, [up, make_decay(optimizer, TOTAL - warmup)], milestones=[warmup])

    assert rates(a_schedule(kind, warmup_steps=warmup)) == pytest.approx(torch_rates(make), rel=1e-9, abs=1e-18)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_inverse_sqrt_keeps_the_square_of_the_rate_times_the_update_constant(warmup: int) -> None:
    # rate = peak sqrt(w / update) from update w on, so rate^2 update = peak^2 w; without warm-up w counts as 1.
    start = max(warmup, 1)
    found = rates(a_schedule("inverse_sqrt", warmup_steps=warmup))
    products = [rate**2 * update for update, rate in enumerate(found, start=1)][start - 1 :]
    assert products == pytest.approx([PEAK**2 * start] * len(products), rel=ROUNDING)


def test_step_counts_its_periods_from_the_first_update_of_the_warmup() -> None:
    found = rates(a_schedule("step", warmup_steps=5, every_steps=10, factor=0.5))
    warmup = [PEAK * (u + 1) / 5 for u in range(5)]
    periods = [PEAK * 0.5**period for period in range(4) for _ in range(10)]
    assert found == pytest.approx(warmup + periods[5:], rel=ROUNDING)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_middle_of_a_decay_lies_halfway_between_the_peak_and_the_end(kind: str) -> None:
    # Both are point-symmetric about their middle: u = w + (T - w) / 2 is update 8 + 16 + 1.
    schedule = a_schedule(kind, warmup_steps=8, final_lr_fraction=0.1)
    middle = learning_rate(25, schedule, peak_lr=PEAK, total_updates=40, updates_per_epoch=PER_EPOCH)
    assert middle == pytest.approx(PEAK * (1 + 0.1) / 2, rel=ROUNDING)


# ---------------------------------------------------------------- what holds of any schedule


@st.composite
def fitting(draw: st.DrawFn) -> tuple[Schedule, int, float]:
    """A schedule that fits its run, the updates of the run, and a peak rate."""
    total = draw(st.integers(1, 200))
    warmup = draw(st.integers(0, total))
    fraction = st.floats(0, 1)
    keys: dict[str, Any] = {"warmup_steps": warmup}
    kinds = ["constant", "linear", "cosine", "inverse_sqrt", "step", "plateau", *(["wsd"] if warmup < total else [])]
    match kind := draw(st.sampled_from(kinds)):
        case "linear" | "cosine":
            keys |= {"final_lr_fraction": draw(fraction)}
        case "wsd":
            keys |= {"final_lr_fraction": draw(fraction), "decay_steps": draw(st.integers(1, total - warmup))}
        case "step":
            keys |= {"every_steps": draw(st.integers(1, 50)), "factor": draw(st.floats(0.01, 1))}
    return a_schedule(kind, **keys), total, draw(st.floats(1e-20, 1e6))


@unhurried
@given(fitting())
def test_the_first_update_never_has_rate_zero(drawn: tuple[Schedule, int, float]) -> None:
    schedule, total, peak = drawn
    assert rates(schedule, total, peak)[0] > 0


@unhurried
@given(fitting())
def test_no_rate_is_above_the_peak(drawn: tuple[Schedule, int, float]) -> None:
    schedule, total, peak = drawn
    assert max(rates(schedule, total, peak)) <= peak * (1 + ROUNDING)


@unhurried
@given(fitting())
def test_warmup_climbs_by_the_same_amount_each_update_and_ends_at_the_peak(drawn: tuple[Schedule, int, float]) -> None:
    schedule, total, peak = drawn
    climb = [0.0, *rates(schedule, total, peak)[: schedule.warmup_steps]]
    assert all(before < after for before, after in pairwise(climb))
    if schedule.warmup_steps:
        rises = [after - before for before, after in pairwise(climb)]
        assert rises == pytest.approx([peak / schedule.warmup_steps] * len(rises), rel=1e-9)
        assert climb[-1] == pytest.approx(peak, rel=ROUNDING)


@unhurried
@given(fitting())
def test_after_the_warmup_the_rate_never_rises_and_stays_above_its_final_fraction(
    drawn: tuple[Schedule, int, float],
) -> None:
    schedule, total, peak = drawn
    decay = rates(schedule, total, peak)[schedule.warmup_steps :]
    floor = peak * getattr(schedule, "final_lr_fraction", 0.0) if schedule.kind != "plateau" else peak
    assert all(after <= before * (1 + ROUNDING) for before, after in pairwise(decay))
    assert all(rate >= floor * (1 - ROUNDING) for rate in decay)


@unhurried
@given(total=st.integers(2, 200), data=st.data())
def test_wsd_is_flat_at_the_peak_and_then_falls_by_the_same_amount_each_update(total: int, data: st.DataObject) -> None:
    decay = data.draw(st.integers(1, total - 1))
    warmup = data.draw(st.integers(0, total - decay))
    fraction = data.draw(st.floats(0, 1))
    schedule = a_schedule("wsd", warmup_steps=warmup, decay_steps=decay, final_lr_fraction=fraction)
    # One update more than the budget has: there the decay would arrive.
    found = [
        learning_rate(update, schedule, peak_lr=1.0, total_updates=total, updates_per_epoch=PER_EPOCH)
        for update in range(1, total + 2)
    ]
    assert set(found[warmup : total - decay + 1]) == {1.0}
    falls = [before - after for before, after in pairwise(found[total - decay :])]
    assert falls == pytest.approx([(1 - fraction) / decay] * decay, abs=ROUNDING)
    assert found[-1] == pytest.approx(fraction, abs=ROUNDING)


@unhurried
@given(fitting(), st.integers(1, 1000))
def test_with_total_steps_no_budget_changes_a_rate(drawn: tuple[Schedule, int, float], budget: int) -> None:
    schedule, total, peak = drawn
    if schedule.kind in ("linear", "cosine", "wsd"):
        fixed = schedule.model_copy(update={"total_steps": total})
        wanted = rates(schedule, total, peak)[:budget]
        run: dict[str, Any] = {"peak_lr": peak, "total_updates": budget, "updates_per_epoch": PER_EPOCH}
        assert [learning_rate(update, fixed, **run) for update in range(1, len(wanted) + 1)] == wanted


@unhurried
@given(fitting(), st.integers(1, 1000))
def test_an_update_past_the_budget_has_the_final_rate_and_not_less(
    drawn: tuple[Schedule, int, float], excess: int
) -> None:
    schedule, total, peak = drawn
    if schedule.kind in ("linear", "cosine", "wsd") and schedule.warmup_steps < total:
        found = learning_rate(total + excess, schedule, peak_lr=peak, total_updates=total, updates_per_epoch=PER_EPOCH)
        assert found == pytest.approx(peak * schedule.final_lr_fraction, rel=1e-9, abs=peak * ROUNDING)


# ---------------------------------------------------------------- fitting the run


def test_phases_are_to_fit_in_total_steps_where_that_is_set() -> None:
    schedule = a_schedule("cosine", warmup_steps=20, total_steps=10)
    with pytest.raises(ConfigError, match=r"warmup_steps 20 is more than total_steps 10.*raise schedule.total_steps"):
        check_fits(schedule, total_updates=100)
    check_fits(a_schedule("cosine", warmup_steps=20, total_steps=100), total_updates=10)  # a run that is cut short


@unhurried
@given(fitting())
def test_a_schedule_whose_phases_fill_the_run_or_less_is_accepted(drawn: tuple[Schedule, int, float]) -> None:
    schedule, total, _ = drawn
    check_fits(schedule, total_updates=total)


@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        (a_schedule("cosine", warmup_steps=1001), "schedule: warmup_steps 1,001 is more than the 1,000 updates"),
        (
            a_schedule("wsd", warmup_steps=600, decay_steps=401),
            "schedule: warmup_steps 600 + decay_steps 401 is more than the 1,000 updates",
        ),
    ],
    ids=["warm-up", "warm-up and decay"],
)
def test_a_schedule_longer_than_the_run_is_refused_with_the_numbers(schedule: Schedule, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fits(schedule, total_updates=1000)
    assert found in str(caught.value)
    assert "run.max_epochs or run.max_steps" in str(caught.value)

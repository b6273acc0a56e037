"""What is due when: random runs are driven as the loop drives them, and an oracle that looks at every update agrees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.agenda import Agenda
from harness.config.run_config import RunConfig
from harness.state import StopReason, TrainState
from tests.test_order import unhurried

Place = tuple[int, int]
"""(position, step): attempted and applied updates."""


@dataclass
class Plan:
    """One run: what its config says is due when, and what happens to it."""

    updates_per_epoch: int
    max_epochs: int | None = None
    max_steps: int | None = None
    log_every: int = 10
    evaluate_every_steps: int | None = None
    evaluate_every_epochs: int | None = None
    save_every: int | None = None
    skipped: frozenset[int] = frozenset()
    """Positions whose update is not applied."""
    paces: list[int] = field(default_factory=lambda: [1000])
    """What rank zero names at each vote, in turn, for how many updates may come before the next."""

    def agenda(self) -> Agenda:
        values: dict[str, Any] = {
            "run": {"name": "r", "max_epochs": self.max_epochs, "max_steps": self.max_steps},
            "model": {"kind": "mlp", "hidden": [2]},
            "data": {"source": "mnist_5k", "global_batch": 1},
            "task": {"kind": "regression"},
            "optim": {"kind": "sgd", "peak_lr": 0.1},
            "evaluation": {"every_steps": self.evaluate_every_steps, "every_epochs": self.evaluate_every_epochs},
            "checkpoint": {"every_steps": self.save_every},
            "tracking": {"log_every_steps": self.log_every},
        }
        return Agenda(RunConfig.model_validate(values), self.updates_per_epoch)

    def budget_is_spent(self, place: Place) -> bool:
        position, step = place
        by_epochs = self.max_epochs is not None and position >= self.max_epochs * self.updates_per_epoch
        return by_epochs or (self.max_steps is not None and step >= self.max_steps)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    interval = st.none() | st.integers(1, 12)
    max_epochs = draw(interval)
    by_steps = draw(st.booleans())
    return Plan(
        updates_per_epoch=draw(st.integers(1, 12)),
        max_epochs=max_epochs,
        max_steps=draw(st.none() | st.integers(1, 60)) if max_epochs else draw(st.integers(1, 60)),
        log_every=draw(st.integers(1, 12)),
        evaluate_every_steps=draw(interval) if by_steps else None,
        evaluate_every_epochs=None if by_steps else draw(st.none() | st.integers(1, 4)),
        save_every=draw(interval),
        skipped=frozenset(place for place, is_skipped in enumerate(draw(st.lists(st.booleans()))) if is_skipped),
        paces=draw(st.lists(st.integers(1, 30), min_size=1, max_size=5)),
    )


@dataclass
class Trace:
    """What came of a plan."""

    places: list[Place] = field(default_factory=list)
    """After every attempted update."""
    ends: list[Place] = field(default_factory=list)
    """Of the intervals."""
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(updates in an interval, how many there could be at most)."""
    evaluated: list[Place] = field(default_factory=list)
    foretold: list[int] = field(default_factory=list)
    """At each interval's end, how many updates were to come before the next evaluation."""
    save_was_due: list[Place] = field(default_factory=list)
    reason: StopReason | None = None


def drive(plan: Plan) -> Trace:
    """Do with the counters what `fit` and `Interval.close` do with them."""
    agenda, state, trace = plan.agenda(), TrainState(), Trace()
    trace.reason = agenda.reason_to_stop(state, patience_is_over=False)
    while trace.reason is None:
        length = agenda.updates_in_interval(state)
        trace.lengths.append((length, agenda.updates_until_vote))
        assert length >= 1, "a run that does not move never ends"
        for _ in range(length):
            state.step += state.position not in plan.skipped
            state.position += 1
            trace.places.append((state.position, state.step))
        agenda.updates_until_vote = plan.paces[len(trace.ends) % len(plan.paces)]
        place = state.position, state.step
        trace.ends.append(place)
        trace.foretold.append(agenda.updates_until_evaluation(state))
        if agenda.evaluation_is_due(state):
            trace.evaluated.append(place)
            state.evaluated_step = state.step
        trace.reason = agenda.reason_to_stop(state, patience_is_over=False)
        if agenda.save_is_due(state):
            trace.save_was_due.append(place)
    return trace


def newly_reached(places: list[Place], interval: int | None) -> list[Place]:
    """Where `step` first became each multiple of `interval`."""
    steps = [0, *(step for _, step in places)]
    return [
        place
        for place, before in zip(places, steps, strict=False)
        if interval and place[1] > before and place[1] % interval == 0
    ]


@unhurried
@given(plans())
def test_every_multiple_of_every_interval_is_an_intervals_end(plan: Plan) -> None:
    trace = drive(plan)
    for interval in (plan.log_every, plan.evaluate_every_steps, plan.save_every, plan.max_steps):
        assert set(newly_reached(trace.places, interval)) <= set(trace.ends)
    for epochs in (plan.evaluate_every_epochs, plan.max_epochs):
        interval = epochs * plan.updates_per_epoch if epochs else len(trace.places) + 1
        assert {place for place in trace.places if place[0] % interval == 0} <= set(trace.ends)


@unhurried
@given(plans())
def test_the_budget_is_spent_to_the_last_update_and_never_overshot(plan: Plan) -> None:
    trace = drive(plan)
    assert trace.reason == "budget"
    assert [plan.budget_is_spent(place) for place in trace.places] == [False] * (len(trace.places) - 1) + [True]


@unhurried
@given(plans())
def test_an_interval_is_never_longer_than_rank_zero_said(plan: Plan) -> None:
    assert all(length <= most for length, most in drive(plan).lengths)


@unhurried
@given(plans())
def test_each_due_evaluation_is_made_exactly_once_and_one_more_at_the_end_of_the_budget(plan: Plan) -> None:
    trace = drive(plan)
    by_epochs, wanted = plan.evaluate_every_epochs, list[Place]()
    by_steps = set(newly_reached(trace.places, plan.evaluate_every_steps))
    for place in trace.places:
        is_due = (
            place in by_steps
            or (by_epochs is not None and place[0] % (by_epochs * plan.updates_per_epoch) == 0)
            or plan.budget_is_spent(place)
        )
        last_step = wanted[-1][1] if wanted else 0
        if is_due and place[1] != last_step:  # weights that were not changed since are not scored again
            wanted.append(place)
    assert trace.evaluated == wanted


@unhurried
@given(plans())
def test_the_next_evaluation_is_foretold_to_the_update_where_none_is_skipped(plan: Plan) -> None:
    trace = drive(replace(plan, skipped=frozenset()))
    positions = [position for position, _ in trace.evaluated]
    for (position, _), foretold in zip(trace.ends, trace.foretold, strict=True):
        assert foretold == min(later - position for later in positions if later >= position)


@unhurried
@given(plans())
def test_a_save_is_due_at_every_multiple_of_its_interval(plan: Plan) -> None:
    trace = drive(plan)
    assert set(newly_reached(trace.places, plan.save_every)) <= set(trace.save_was_due)
    assert all(plan.save_every and step > 0 and step % plan.save_every == 0 for _, step in trace.save_was_due)


def test_weights_that_were_not_changed_since_are_not_evaluated_again() -> None:
    # Evaluated after the first update; the next two are skipped, and each is the end of an epoch.
    plan = Plan(updates_per_epoch=1, max_epochs=4, evaluate_every_epochs=1, skipped=frozenset({1, 2}))
    assert drive(plan).evaluated == [(1, 1), (4, 2)]


def test_nothing_is_saved_before_the_first_applied_update() -> None:
    plan = Plan(updates_per_epoch=3, max_epochs=1, save_every=1, skipped=frozenset({0, 1}))
    assert drive(plan).save_was_due == [(3, 1)]


def test_the_best_evaluation_so_far_is_saved_whatever_its_step() -> None:
    agenda = Plan(updates_per_epoch=5, max_epochs=2, save_every=4).agenda()
    assert agenda.save_is_due(TrainState(position=5, step=5, is_best=True))
    assert not agenda.save_is_due(TrainState(position=5, step=5))


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "total"),
    [(3, None, 21), (None, 16, 16), (3, 16, 16), (2, 16, 14)],
)
def test_the_budget_reached_first_is_the_total(max_epochs: int | None, max_steps: int | None, total: int) -> None:
    assert Plan(updates_per_epoch=7, max_epochs=max_epochs, max_steps=max_steps).agenda().total_updates == total


@pytest.mark.parametrize(
    ("step", "patience_is_over", "signal", "reason"),
    [
        (10, True, "SIGTERM", "budget"),
        (9, True, "SIGTERM", "early_stopping"),
        (9, False, "SIGTERM", "interrupted"),
        (9, False, None, None),
    ],
)
def test_a_run_that_is_done_is_not_called_interrupted(
    step: int, patience_is_over: bool, signal: str | None, reason: StopReason | None
) -> None:
    agenda = Plan(updates_per_epoch=100, max_steps=10).agenda()
    state = TrainState(position=step, step=step, stop_signal=signal)
    assert agenda.reason_to_stop(state, patience_is_over=patience_is_over) == reason

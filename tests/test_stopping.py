"""Early stopping, the plateau and the best score: on random metrics, cut and resumed anywhere; and the stop signals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

from harness.config.run import Best
from harness.config.run_config import RunConfig
from harness.stopping import MARGIN_SECONDS, Judge, Patience, Standings, StopSignals, standings
from tests.test_order import unhurried

NOT_FINITE = [math.nan, math.inf, -math.inf]
# Few different values, so that ties and steps of exactly min_delta are common; and anything else.
metrics = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, -1.0, *NOT_FINITE]) | st.floats(-1e6, 1e6)
modes = st.sampled_from(["min", "max"])
deltas = st.sampled_from([0.0, 0.25, 0.5])


def a_judge(stopping: dict[str, Any] | None = None, plateau: dict[str, Any] | None = None) -> Judge:
    values: dict[str, Any] = {
        "run": {"name": "r", "max_epochs": 1},
        "model": {"kind": "mlp", "hidden": [2]},
        "data": {"source": "mnist_5k", "global_batch": 1},
        "task": {"kind": "regression"},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
        "schedule": {"kind": "constant"} if plateau is None else {"kind": "plateau", **plateau},
        "early_stopping": stopping,
    }
    return Judge(RunConfig.model_validate(values))


def observe(judge: Judge, values: list[float], *, first_step: int = 1) -> list[tuple[bool, bool, float]]:
    """Return, after each evaluation: was it the best, does the run stop, and the factor of the rate."""
    found = []
    for step, value in enumerate(values, start=first_step):
        is_best = judge.observe({"val/loss": value, "val/accuracy": value}, step=step)
        found.append((is_best, judge.wants_to_stop, judge.lr_factor))
    return found


def told(values: list[float], mode: Any) -> Standings:
    """What a ledger with these losses tells, all of whose checkpoints are there."""
    rule = Best(metric="val/loss", mode=mode)
    evaluations = [(step, {"val/loss": value}) for step, value in enumerate(values, start=1)]
    return standings(evaluations, rule, range(1, len(values) + 1))


# ---------------------------------------------------------------- improvement


@unhurried
@given(st.lists(metrics, min_size=1), modes)
def test_the_best_is_the_first_of_the_smallest_or_largest_finite_values(values: list[float], mode: Any) -> None:
    patience = Patience("val/loss", mode, min_delta=0.0)
    for step, value in enumerate(values):
        patience.observe(value, step=step)
    finite = [value for value in values if math.isfinite(value)]
    best = (min if mode == "min" else max)(finite) if finite else None
    assert patience.best == best
    assert patience.best_step == (values.index(best) if finite else None)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_a_value_better_by_exactly_min_delta_is_no_improvement(mode: Any, sign: int) -> None:
    patience = Patience("val/loss", mode, min_delta=0.25)  # all values are exact in binary
    verdicts = [patience.observe(sign * value, step=0) for value in (1.0, 0.75, 0.74, 0.5, 0.25)]
    # 0.75 is short of an improvement on 1, 0.74 is one; then 0.49 would be wanted.
    assert verdicts == [True, False, True, False, True]


@unhurried
@given(st.lists(st.sampled_from(NOT_FINITE), min_size=1), modes)
def test_nan_and_infinities_are_no_improvement_even_as_first_values(values: list[float], mode: Any) -> None:
    patience = Patience("val/loss", mode, min_delta=0.0)
    assert not any(patience.observe(value, step=1) for value in values)
    assert patience.evaluations_without_improvement == len(values)
    assert patience.observe(5.0, step=2), "the first finite value is the best so far"


# ---------------------------------------------------------------- patience


@unhurried
@given(st.lists(metrics, max_size=30), st.integers(1, 5), modes, deltas)
def test_the_run_stops_when_as_many_evaluations_as_patience_allows_brought_nothing(
    values: list[float], allowed: int, mode: Any, delta: float
) -> None:
    rule = {"mode": mode, "patience_evaluations": allowed, "min_delta": delta}
    found = observe(a_judge(rule), values)
    patience = Patience("val/loss", mode, delta)
    improved = [patience.observe(value, step=0) for value in values]
    for end, (_, stops, _) in enumerate(found, start=1):
        assert stops == (end >= allowed and not any(improved[end - allowed : end]))


def test_patience_counts_evaluations_and_not_the_updates_between_them() -> None:
    judge = a_judge({"patience_evaluations": 2})
    for step in (10, 5000):
        judge.observe({"val/loss": 1.0}, step=step)
        assert not judge.wants_to_stop
    judge.observe({"val/loss": 1.0}, step=5001)
    assert judge.wants_to_stop


@unhurried
@given(st.lists(metrics, max_size=30))
def test_without_early_stopping_the_run_never_stops_and_the_best_is_the_lowest_loss(values: list[float]) -> None:
    judge = a_judge()
    assert not any(stops for _, stops, _ in observe(judge, values))
    assert judge.standings.best.best == min((value for value in values if math.isfinite(value)), default=None)


# ---------------------------------------------------------------- plateau


@unhurried
@given(
    # torch counts -inf (or inf, with mode max) as an improvement, we never do; on everything else we agree.
    values=st.lists(metrics.filter(lambda value: not math.isinf(value)), max_size=40),
    rule=st.fixed_dictionaries(
        {
            "mode": modes,
            "min_delta": deltas,
            "patience_evaluations": st.integers(0, 4),
            "factor": st.sampled_from([0.1, 0.5, 0.9]),
            "final_lr_fraction": st.sampled_from([0.0, 0.01, 0.3]),
        }
    ),
)
def test_the_plateau_falls_when_and_as_far_as_torchs_does(values: list[float], rule: dict[str, Any]) -> None:
    scheduler = ReduceLROnPlateau(
        optimizer := torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        mode=rule["mode"],
        factor=rule["factor"],
        patience=rule["patience_evaluations"],
        threshold=rule["min_delta"],
        threshold_mode="abs",
        min_lr=rule["final_lr_fraction"],
        eps=0.0,  # torch leaves out falls smaller than this
    )
    wanted = []
    for value in values:
        scheduler.step(value)
        wanted.append(optimizer.param_groups[0]["lr"])
    assert [factor for _, _, factor in observe(a_judge(plateau=rule), values)] == wanted


def test_a_plateaus_patience_is_one_evaluation_longer_than_early_stoppings() -> None:
    # As in torch the rate falls when *more* evaluations than patience were bad; early stopping counts *as many*.
    judge = a_judge({"patience_evaluations": 2}, {"patience_evaluations": 2, "factor": 0.5})
    assert observe(judge, [1.0, 1.0, 1.0, 1.0]) == [
        (True, False, 1.0),
        (False, False, 1.0),
        (False, True, 1.0),
        (False, True, 0.5),
    ]


def test_an_infinitely_good_value_is_no_improvement_for_the_plateau_though_torch_takes_it_for_one() -> None:
    judge = a_judge(plateau={"patience_evaluations": 0, "factor": 0.5})
    assert [factor for _, _, factor in observe(judge, [1.0, -math.inf])] == [1.0, 0.5]


def test_plateau_and_early_stopping_may_watch_different_metrics() -> None:
    judge = a_judge(
        {"metric": "val/accuracy", "mode": "max", "patience_evaluations": 3}, {"patience_evaluations": 0, "factor": 0.5}
    )
    for step, (loss, accuracy) in enumerate([(3.0, 0.1), (2.0, 0.2), (1.0, 0.3)]):
        assert judge.observe({"val/loss": loss, "val/accuracy": accuracy}, step=step)
    assert judge.lr_factor == 1.0, "the loss falls, as the plateau wants"
    assert not judge.wants_to_stop, "the accuracy rises, as early stopping wants"


# ---------------------------------------------------------------- state


@unhurried
@given(st.lists(metrics, max_size=20), modes, deltas, st.booleans(), st.booleans())
def test_a_judge_that_was_saved_and_loaded_at_any_point_judges_on_as_if_it_had_not_been(
    values: list[float], mode: Any, delta: float, stops: bool, falls: bool
) -> None:
    rule = {"mode": mode, "min_delta": delta, "patience_evaluations": 3} if stops else None
    plateau = {"mode": mode, "min_delta": delta, "patience_evaluations": 1} if falls else None
    undisturbed = a_judge(rule, plateau)
    wanted = observe(undisturbed, values)
    for cut in range(len(values) + 1):
        before, after = a_judge(rule, plateau), a_judge(rule, plateau)
        found = observe(before, values[:cut])
        after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
        after.standings = told([values[step - 1] for step in range(1, cut + 1)], mode if stops else "min")
        found += observe(after, values[cut:], first_step=cut + 1)
        assert found == wanted
        assert after.state_dict() == undisturbed.state_dict()


@pytest.mark.parametrize(
    "changed",
    [{"metric": "val/accuracy"}, {"mode": "max"}, {"min_delta": 0.5}],
    ids=lambda change: next(iter(change)),
)
def test_a_rule_that_changed_starts_afresh(changed: dict[str, Any]) -> None:
    before = a_judge({}, {"patience_evaluations": 0, "factor": 0.5})
    observe(before, [1.0, 2.0, 3.0])
    after = a_judge(changed, {"patience_evaluations": 0, "factor": 0.5, **changed})
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == a_judge(changed, {**changed}).state_dict()


def test_another_patience_is_not_another_rule() -> None:
    before = a_judge({"patience_evaluations": 9}, {"patience_evaluations": 9})
    observe(before, [1.0, 2.0, 3.0])
    after = a_judge({"patience_evaluations": 2}, {"patience_evaluations": 1})
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == {**before.state_dict(), "score": after.state_dict()["score"]}
    assert after.wants_to_stop


def test_a_plateau_that_is_new_on_resume_starts_afresh_and_patience_goes_on() -> None:
    before = a_judge({})
    observe(before, [1.0, 2.0])
    after = a_judge({}, {})
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == {**a_judge({}, {}).state_dict(), "patience": before.state_dict()["patience"]}


def test_a_state_of_version_0_1_0_in_which_patience_and_best_were_one_is_read() -> None:
    score = {"metric": "val/loss", "mode": "min", "min_delta": 0.2, "best": 1.0, "best_step": 3}
    judge = a_judge({"min_delta": 0.2, "patience_evaluations": 4})
    judge.load_state_dict({"score": {**score, "evaluations_without_improvement": 3}, "rate": None, "lr_factor": 1.0})
    assert not judge.wants_to_stop
    assert observe(judge, [0.81]) == [(True, True, 1.0)], "better, but by less than patience asks for: the fourth such"


# ---------------------------------------------------------------- the best


@unhurried
@given(st.lists(metrics, max_size=20), modes, st.data())
def test_best_is_the_first_extreme_of_those_with_a_checkpoint_whatever_patience_asks_for(
    values: list[float], mode: Any, data: st.DataObject
) -> None:
    kept = data.draw(st.sets(st.integers(0, len(values))))
    found = standings(
        [(step, {"val/loss": value, "val/other": -value}) for step, value in enumerate(values)],
        Best(metric="val/loss", mode=mode),
        kept,
    )
    choose = min if mode == "min" else max
    finite = {step: value for step, value in enumerate(values) if math.isfinite(value)}
    there = {step: value for step, value in finite.items() if step in kept}
    assert found.best.best == (choose(there.values()) if there else None)
    assert found.best.best_step == next((step for step in there if there[step] == found.best.best), None)
    assert found.scores == ({"val/loss": found.best.best, "val/other": -there[found.best.best_step]} if there else {})
    is_missed = bool(finite) and (not there or choose(finite.values()) != found.best.best)
    assert bool(found.missed) >= is_missed
    if not found.missed:
        assert not is_missed


@pytest.mark.parametrize("order", [(2, 3), (3, 2), (3,), (2,)])
def test_the_best_before_is_the_best_again_when_saves_of_better_ones_fail(order: tuple[int, ...]) -> None:
    judge = a_judge()
    observe(judge, [3.0, 2.0, 1.0])
    for step in order:
        judge.standings.forget(step)
    left = max({1, 2, 3} - set(order))
    assert (judge.standings.best.best, judge.standings.best.best_step) == (4.0 - left, left)
    assert bool(judge.standings.missed) == (3 in order)


def test_min_delta_belongs_to_patience_and_not_to_the_best() -> None:
    judge = a_judge({"min_delta": 0.2, "patience_evaluations": 9})
    assert [is_best for is_best, _, _ in observe(judge, [1.0, 0.9, 0.85, 0.84])] == [True] * 4


@pytest.mark.parametrize(("lost", "missed"), [(0.5, ""), (0.75, "val/accuracy 0.7500 at 1 is better")])
def test_one_without_a_checkpoint_that_is_as_good_as_the_best_is_not_called_better(lost: float, missed: str) -> None:
    evaluations = [(1, {"val/accuracy": lost}), (2, {"val/accuracy": 0.5})]
    found = standings(evaluations, Best(metric="val/accuracy", mode="max"), {2})
    assert found.best.best_step == 2
    assert found.missed[: len("val/accuracy 0.7500 at 1 is better")] == missed


def test_an_evaluation_without_the_metric_is_neither_best_nor_missed() -> None:
    found = standings([(1, {"val/loss": 1.0}), (2, {"val/loss": None})], Best(metric="val/auc", mode="max"), {1, 2})
    assert (found.best.best, found.missed, found.scores) == (None, "", {})


# ---------------------------------------------------------------- metrics


# ---------------------------------------------------------------- signals


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the handlers of this process back in the end."""
    before = {number: signal.getsignal(number) for number in StopSignals.NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", StopSignals.NUMBERS)
def test_a_stop_signal_is_remembered_and_does_nothing_else(number: signal.Signals) -> None:
    signals = StopSignals()
    signals.install(second_interrupt_ends=False)
    assert signals.received is None
    os.kill(os.getpid(), number)
    assert signals.received is number


def exit_code_after(*sent: str, second_interrupt_ends: bool) -> int:
    """Return how a process of its own ends that is sent these signals."""
    program = (
        "import os, signal, sys\n"
        "from harness.stopping import StopSignals\n"
        f"StopSignals().install(second_interrupt_ends={second_interrupt_ends})\n"
        "for name in sys.argv[1:]:\n"
        "    os.kill(os.getpid(), signal.Signals[name])\n"
    )
    return subprocess.run([sys.executable, "-c", program, *sent], check=False).returncode


@pytest.mark.parametrize(
    ("sent", "exit_code"),
    [(["SIGINT", "SIGINT"], -signal.SIGINT), (["SIGINT"], 0), (["SIGTERM", "SIGTERM", "SIGUSR1"], 0)],
    ids=["a second Ctrl-C ends the process", "a first does not", "no other second signal does"],
)
def test_alone_a_second_interrupt_ends_the_process_at_once(sent: list[str], exit_code: int) -> None:
    assert exit_code_after(*sent, second_interrupt_ends=True) == exit_code


def test_under_torchrun_one_interrupt_may_reach_a_rank_twice() -> None:
    assert exit_code_after("SIGINT", "SIGINT", second_interrupt_ends=False) == 0


def test_time_that_is_too_short_for_a_save_is_a_reason_to_stop_and_a_signal_comes_first() -> None:
    assert StopSignals().vote(seconds_needed=1e9) == 0
    signals = StopSignals(end_time=time.time() + 100)
    assert signals.vote(seconds_needed=100 - MARGIN_SECONDS - 5) == 0
    vote = signals.vote(seconds_needed=100 - MARGIN_SECONDS + 1)
    assert vote > 0
    assert StopSignals.REASONS[vote - 1] == "TIME_LIMIT"
    signals.received = signal.SIGUSR1
    assert StopSignals.REASONS[signals.vote(seconds_needed=1e9) - 1] == "SIGUSR1"

"""Early stopping, the best score, and the plateau: one state machine that every rank runs on rank zero's scores."""

import math
import os
import signal
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from harness.config.fields import Mode
from harness.config.run import Best
from harness.config.run_config import RunConfig
from harness.config.training import PlateauSchedule
from harness.ranks.process import pending_signals

MARGIN_SECONDS = 10.0
"""Left between the end of a save and that of the job: for an evaluation, and for a disk that is slower than before."""


@dataclass
class Patience:
    """The best value of one metric, and for how many evaluations it has not improved.

    NaN and infinities are never an improvement.
    """

    metric: str
    mode: Mode
    min_delta: float
    best: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0

    def observe(self, value: float, *, step: int) -> bool:
        """Count one evaluation; return whether `value` improves on the best by more than `min_delta`."""
        sign = 1.0 if self.mode == "min" else -1.0
        improved = math.isfinite(value) and (self.best is None or sign * value < sign * self.best - self.min_delta)
        if improved:
            self.best, self.best_step, self.evaluations_without_improvement = value, step, 0
        else:
            self.evaluations_without_improvement += 1
        return improved


class Standings:
    """Which evaluation is the best: of those whose checkpoint is there, and of all. However little better is better."""

    def __init__(self, rule: Best) -> None:
        self._rule = rule
        self._ever = Patience(rule.metric, rule.mode, min_delta=0.0)
        self._bests: dict[int, dict[str, float]] = {}  # step and scores, each better than the one before

    @property
    def best(self) -> Patience:
        """The best of those with a checkpoint."""
        step = next(reversed(self._bests), None)
        value = None if step is None else self._bests[step][self._rule.metric]
        return Patience(self._rule.metric, self._rule.mode, min_delta=0.0, best=value, best_step=step)

    @property
    def scores(self) -> dict[str, float]:
        """All scores of the best that are numbers."""
        return next(reversed(self._bests.values()), {})

    @property
    def missed(self) -> str:
        """What there is to say where one without a checkpoint is better; empty if none is."""
        ever = self._ever
        if ever.best is None or ever.best == self.best.best:  # of two that are alike, neither is better
            return ""
        return f"{ever.metric} {ever.best:.4f} at {ever.best_step:,} is better, but its checkpoint is not there"

    def observe(self, metrics: Mapping[str, Any], *, step: int, has_checkpoint: bool = True) -> bool:
        """Count an evaluation, unless it lacks the metric; return whether it is the best of those with a checkpoint."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if self._rule.metric not in numbers:
            return False
        self._ever.observe(numbers[self._rule.metric], step=step)
        is_best = has_checkpoint and self.best.observe(numbers[self._rule.metric], step=step)
        if is_best:
            self._bests[step] = numbers
        return is_best

    def forget(self, step: int) -> None:
        """Let the best before be the best again where this one's checkpoint could not be saved."""
        self._bests.pop(step, None)


def standings(evaluations: Iterable[tuple[int, Mapping[str, Any]]], rule: Best, kept: Container[int]) -> Standings:
    """Return which evaluation is the best.

    Args:
        evaluations: step and scores of each, in order.
        kept: the steps whose checkpoints are there.
    """
    found = Standings(rule)
    for step, metrics in evaluations:
        found.observe(metrics, step=step, has_checkpoint=step in kept)
    return found


class Judge:
    """Judges each evaluation: is it the best, must the run stop, must the rate fall.

    Each is a question of its own, and `early_stopping.min_delta` belongs to the second.
    """

    def __init__(self, config: RunConfig) -> None:
        self._stopping = config.early_stopping
        self._plateau = config.schedule if isinstance(config.schedule, PlateauSchedule) else None
        self.standings = Standings(config.best_rule)
        self.lr_factor = 1.0
        if self._stopping:
            self._patience = Patience(self._stopping.metric, self._stopping.mode, self._stopping.min_delta)
        if self._plateau:
            plateau = self._plateau
            self._rate = Patience(plateau.metric, plateau.mode, plateau.min_delta)

    def observe(self, metrics: Mapping[str, Any], *, step: int) -> bool:
        """Count one evaluation at `step`; return whether it is the best so far."""
        if self._plateau:
            self._rate.observe(metrics[self._rate.metric], step=step)
            if self._rate.evaluations_without_improvement > self._plateau.patience_evaluations:
                self._rate.evaluations_without_improvement = 0
                self.lr_factor = max(self.lr_factor * self._plateau.factor, self._plateau.final_lr_fraction)
        if self._stopping:
            self._patience.observe(metrics[self._patience.metric], step=step)
        return self.standings.observe(metrics, step=step)

    @property
    def wants_to_stop(self) -> bool:
        """Whether patience is over."""
        if self._stopping is None:
            return False
        return self._patience.evaluations_without_improvement >= self._stopping.patience_evaluations

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain JSON values."""
        patience = asdict(self._patience) if self._stopping else None
        rate = asdict(self._rate) if self._plateau else None
        return {"score": asdict(self.standings.best), "patience": patience, "rate": rate, "lr_factor": self.lr_factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up `state_dict`'s counts; a metric, mode or delta that changed since starts afresh.

        In earlier versions the best and patience were one. Which is the best, the ledger says (`standings`).
        """
        patience = state.get("patience") or state["score"]
        if self._stopping and _same_rule(patience, self._patience):
            self._patience = Patience(**patience)
        if self._plateau and state["rate"] and _same_rule(state["rate"], self._rate):
            self._rate = Patience(**state["rate"])
            self.lr_factor = state["lr_factor"]


def _same_rule(stored: Mapping[str, Any], patience: Patience) -> bool:
    return all(stored[key] == getattr(patience, key) for key in ("metric", "mode", "min_delta"))


class StopSignals:
    """Remembers that this rank was asked to stop; the ranks vote on it later, at a step they agree on.

    Nothing is saved inside the handler: a flag is all it sets. The end of a job's time is a reason to stop as well.

    Args:
        end_time: when the job is ended, in seconds since 1970.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2)
    REASONS = (*(number.name for number in NUMBERS), "TIME_LIMIT")

    def __init__(self, *, end_time: float | None = None) -> None:
        self.received: signal.Signals | None = None
        self._end_time = math.inf if end_time is None else end_time

    def vote(self, *, seconds_needed: float) -> int:
        """Return 0 to go on, or the number in REASONS, from 1, of why to stop.

        Args:
            seconds_needed: for what comes until the next vote, and for a save.
        """
        if self.received:
            return 1 + self.NUMBERS.index(self.received)
        is_short = time.time() + seconds_needed + MARGIN_SECONDS >= self._end_time
        return len(self.REASONS) if is_short else 0

    def install(self, *, second_interrupt_ends: bool) -> None:
        """Catch the stop signals from here on.

        Args:
            second_interrupt_ends: a second Ctrl-C ends this process at once. Not under torchrun, where one Ctrl-C
                reaches a rank twice: from the terminal and from the agent.
        """
        self._second_interrupt_ends = second_interrupt_ends
        for number in self.NUMBERS:
            signal.signal(number, self._remember)
        # A launcher of a Slurm job blocks them, so that none is lost that came before this line.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.NUMBERS)
        for number in set(self.NUMBERS) & pending_signals(os.getppid()):
            self.received = signal.Signals(number)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT and self._second_interrupt_ends:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)

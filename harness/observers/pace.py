"""How fast a run goes, when it will be done, and which way its loss went."""

import math
import time
from collections import deque
from dataclasses import replace
from datetime import timedelta

from harness.agenda import Agenda
from harness.config.run_config import RunConfig
from harness.observers.base import Line
from harness.schedule import learning_rate
from harness.state import TrainState

_BLOCKS = "▁▂▃▄▅▆▇█"
_REMEMBERED = 240


class Pace:
    """Counts what a launch does from its start on.

    Args:
        state: of the run, which changes as it trains.
        samples_seen: before this launch.
    """

    def __init__(self, agenda: Agenda, state: TrainState, *, samples_seen: int) -> None:
        self._agenda, self._state = agenda, state
        self._first_step, self._first_samples = state.step, samples_seen
        self._began: float | None = None
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)
        self._told: list[float] = []
        self._tokens_per_sample: float | None = None
        self.line: Line | None = None
        """The last update."""

    def hear(self, line: Line) -> None:
        """Take note of an update."""
        if self._began is None:
            self._began = time.monotonic() - line["seconds"]
        self.line = line
        self._told.append(line["loss"])
        if "tokens_per_second" in line:
            self._tokens_per_sample = line["tokens_per_second"] / line["samples_per_second"]

    def settle(self) -> None:
        """Take the mean loss of the interval that is over for one point of the curve."""
        losses = [loss for loss in self._told if math.isfinite(loss)]
        if losses:
            self._losses.append(math.fsum(losses) / len(losses))
        self._told = []

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        return self._agenda.config

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self._agenda.total_updates

    def rate(self, update: int, **budget: int) -> float:
        """Return the scheduled rate of an update, from 1, if the run had another budget (`max_epochs`, `max_steps`)."""
        run = self.config.run.model_copy(update=budget)
        agenda = replace(self._agenda, config=self.config.model_copy(update={"run": run}))
        return learning_rate(
            max(1, update),
            self.config.schedule,
            peak_lr=self.config.optim.peak_lr,
            total_updates=agenda.total_updates,
            updates_per_epoch=agenda.updates_per_epoch,
        )

    @property
    def time_left(self) -> str:
        """Until the budget is spent, at the pace of this launch with all that it does between updates."""
        rate = (self._state.step - self._first_step) / self._seconds
        return _clock((self.total - self._state.step) / rate) if rate > 0 else "unknown"

    @property
    def time_to_evaluation(self) -> str:
        """Until the validation rows are next looked at, at the pace of the last updates."""
        updates = self._agenda.updates_until_evaluation(self._state)
        return _clock(updates * self.line["seconds"]) if self.line else "unknown"

    @property
    def throughput(self) -> str:
        """Over all ranks, with all that a run does between updates; in tokens where those are what is learned."""
        seen = self.line["samples_seen"] - self._first_samples if self.line else 0
        if self._tokens_per_sample is None:
            return f"{seen / self._seconds:,.0f} samples/s"
        return f"{seen * self._tokens_per_sample / self._seconds:,.0f} tokens/s"

    @property
    def _seconds(self) -> float:
        return max(1e-9, time.monotonic() - self._began) if self._began is not None else math.inf

    def sparkline(self, width: int) -> str:
        """Return the losses of the last intervals as so many blocks, fewer if there were fewer."""
        losses = list(self._losses)
        count = min(width, len(losses))
        groups = [losses[i * len(losses) // count : (i + 1) * len(losses) // count] for i in range(count)]
        points = [math.fsum(group) / len(group) for group in groups]
        low, high = min(points, default=0.0), max(points, default=0.0)
        scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(_BLOCKS[round((point - low) * scale)] for point in points)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "unknown"

"""Where the wall time of a run went: into updates that count, or elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np

from harness.report.read import Record


@dataclass(frozen=True)
class WallTime:
    """Seconds from the first start to the last sign of life; the parts add up to `total`."""

    useful: float
    """In updates that were applied and are in the ledger."""
    repeated: float
    """In updates that a crash lost, so that they were made again."""
    around: float
    """Evaluating, saving, skipped updates, and whatever else happened between the useful ones of a launch."""
    stopped: float
    """Between a launch's end and the next one's first update: down, in a queue, or starting."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.useful + self.repeated + self.around + self.stopped

    @property
    def goodput(self) -> float:
        """The useful fraction."""
        return self.useful / self.total if self.total else 0.0


def wall_time(record: Record) -> WallTime | None:
    """Return where the time went, or None before a first start.

    A launch that was killed ends with its last sign of life: its last event, or its start and the updates it made.
    """
    starts = record.starts
    if not starts:
        return None
    steps = [start["step"] for start in starts]
    begins = [_seconds(start["time"]) for start in starts]
    created = record.status.created if record.status.created is not None else begins[0]
    kept = _seconds_by_launch(record, steps)
    last_signs, repeated = list(begins), [0.0] * len(starts)
    launch = -1
    for event in record.events:
        if event["event"] == "started":
            launch += 1
        elif launch >= 0 and event["event"] == "cut back":
            repeated[launch] += event["seconds"]  # told by the launch after, before it says that it started
        elif launch >= 0 and event["event"] != "notice":  # a launch tells some before it says that it started
            last_signs[launch] = _seconds(event["time"])
    around, stopped = 0.0, max(0.0, begins[0] - created)
    for index, begin in enumerate(begins):
        worked = kept[index] + repeated[index]
        end = max(begin + worked, last_signs[index])
        if index + 1 < len(begins):
            end = min(end, begins[index + 1])
            stopped += begins[index + 1] - end
        around += max(0.0, end - begin - worked)
    return WallTime(sum(kept), sum(repeated), around, stopped)


def _seconds_by_launch(record: Record, first_steps: list[int]) -> list[float]:
    """Return the seconds of the applied updates that each launch made and that no later one made again."""
    step, applied = record.updates["step"], record.updates["applied"] != 0
    seconds = np.nan_to_num(record.updates["seconds"]) * applied
    made_by = np.zeros(len(step), dtype=int)
    for launch, first in enumerate(first_steps):
        made_by[step > first] = launch
    return [float(seconds[made_by == launch].sum()) for launch in range(len(first_steps))]


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()

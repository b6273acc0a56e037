"""The rows of a tracker: what is drawn of a ledger, one row a step, in the names that people look for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from harness.config.run_config import RunConfig
from harness.observers.base import Line
from harness.stopping import Standings

STEP = "trainer/global_step"
"""The x-axis of everything; it is in every row."""
NAMES = {
    "samples_seen": "trainer/samples_seen",
    "seconds": "time/seconds_per_update",
    "samples_per_second": "throughput/samples_per_second",
    "tokens_per_second": "throughput/tokens_per_second",
    "mfu": "throughput/mfu",
    "memory_bytes": "memory/max_bytes_over_ranks",
}
"""Keys of an update's line that are not called `train/KEY`; of `*_fraction`, see `_name`."""
NOT_DRAWN = {"event", "step", "applied", "num_targets"}


class Table(NamedTuple):
    """Validation rows to be looked at."""

    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Row:
    """Figures of one step; `STEP` is one of them."""

    step: int
    figures: dict[str, float]
    matrices: dict[str, list[list[float]]] = field(default_factory=dict)
    """Scores that are matrices, such as (actual class, predicted class) counts."""
    tables: dict[str, Table] = field(default_factory=dict)


@dataclass
class _Step:
    """One applied update, as far as it is known."""

    step: int
    figures: dict[str, Any] = field(default_factory=dict)
    is_due: bool = False


class Rows:
    """Makes rows of the lines of one run, read from its first to its last.

    A row is complete when a later update is applied, so that an evaluation stands in the row of its update.
    """

    def __init__(self, config: RunConfig, *, every_steps: int) -> None:
        self._every_steps = every_steps
        self._standings = Standings(config.best_rule)
        self._current = _Step(0)
        self._norms: dict[int, dict[str, float]] = {}
        self._tables: dict[int, dict[str, Table]] = {}
        self._lasting: dict[str, float] = {}
        self._num_skipped = self._num_since_row = self._num_clipped_since_row = 0

    def take(self, line: Line) -> Iterator[Row]:
        """Take the next line of the ledger; yield the row that is complete with it, if one is."""
        if line["event"] == "evaluation":
            if line["step"] == self._current.step:
                self._evaluated(line)
            return
        if line["event"] != "update":
            return  # of a later version
        if not line["applied"]:  # the row of the last one stays open: at an epoch's end its evaluation may follow
            self._num_skipped += 1
            return
        if line["step"] > self._current.step:
            yield from self.rest()
        self._updated(line)

    def take_event(self, line: Line) -> None:
        """Take a line of events.jsonl: the norms and the validation rows of a step come in its row."""
        if line["event"] == "gradients":
            self._norms[line["step"]] = line["norms"]
        elif line["event"] == "samples":
            self._tables[line["step"]] = {"val/samples": Table(line["columns"], line["rows"])}

    def rest(self) -> Iterator[Row]:
        """Yield the row that no later update has completed yet, if it is due."""
        current, self._current = self._current, _Step(self._current.step)
        norms, tables = self._norms.pop(current.step, {}), self._tables.pop(current.step, {})
        if not current.figures or not (current.is_due or norms):
            return
        figures: dict[str, Any] = {STEP: current.step, **self._lasting, **current.figures}
        figures["train/clipped_fraction"] = self._num_clipped_since_row / max(1, self._num_since_row)
        figures["trainer/skipped_updates"] = self._num_skipped
        figures |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        self._num_since_row = self._num_clipped_since_row = 0
        # What was not finite is null in the ledger.
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        matrices = {name: value for name, value in figures.items() if isinstance(value, list)}
        yield Row(current.step, numbers, matrices, tables)

    def _updated(self, line: Line) -> None:
        self._num_since_row += 1
        step: int = line["step"]
        figures = {_name(key): value for key, value in line.items() if key not in NOT_DRAWN}
        norm, coefficient = line.get("grad_norm"), line.get("clip_coefficient")
        if isinstance(norm, int | float) and isinstance(coefficient, int | float):
            self._num_clipped_since_row += coefficient < 1
            figures["train/grad_norm_clipped"] = norm * coefficient
        # Told once an interval, so that a row of another interval's step knows the last of them.
        self._lasting |= {name: value for name, value in figures.items() if not name.startswith("train/")}
        self._current = _Step(step, figures, is_due=step % self._every_steps == 0)

    def _evaluated(self, line: Line) -> None:
        metrics = line["metrics"]
        self._standings.observe(metrics, step=line["step"])
        best = self._standings.best
        if best.best is not None:
            self._current.figures |= {f"best/{best.metric}": best.best, "best/step": best.best_step}
        self._current.figures |= metrics
        self._current.is_due = True


def _name(key: str) -> str:
    if key.endswith("_fraction"):
        return f"time/{key}"
    return NAMES.get(key, f"train/{key}")

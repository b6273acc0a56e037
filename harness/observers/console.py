"""What a person sees: one moving line on a terminal, plain lines elsewhere. It can never end a run."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import Progress, TextColumn
from rich.table import Column

from harness.observers.base import Line, Observer
from harness.state import FitResult
from harness.stopping import Patience

SECONDS_BETWEEN_LINES = 5.0


class _Terminal(RichConsole):
    """Falls silent when nobody reads any more (`harness launch ... | head`)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console(Observer):
    """Prints to stdout.

    Args:
        directory: of the run.
        total_updates: of the whole run.
        step, samples_seen: before this segment.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total_updates: int,
        step: int = 0,
        samples_seen: int = 0,
        terminal: RichConsole | None = None,
    ) -> None:
        self._out = terminal or _Terminal(highlight=False, soft_wrap=True)
        self._directory, self._total = directory, total_updates
        self._first_step, self._first_samples = step, samples_seen
        self._began: float | None = None
        self._printed = -SECONDS_BETWEEN_LINES
        self._line: Line | None = None
        self._best = ""
        self._saved = ""
        self._progress: Progress | None = None
        if self._out.is_terminal:
            whole_line = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            self._progress = Progress(whole_line, console=self._out)
            self._task = self._progress.add_task("")
            self._progress.start()

    def on_update(self, line: Line) -> None:
        if self._began is None:
            self._began = time.monotonic() - line["seconds"]
        self._line = line

    def on_settled(self) -> None:
        if self._progress:
            self._progress.update(self._task, description=self._figures())
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print(self._figures())
            self._printed = time.monotonic()

    def on_evaluation(self, line: Line, best: Patience) -> None:
        scores = "  ".join(_scores(line["metrics"]))
        mark = "  best so far" if best.best_step == line["step"] else ""
        self._best = f"best {best.metric} {best.best:.4f} at {best.best_step:,}" if best.best is not None else ""
        self._print(f"evaluation at update {line['step']:,}: {scores}{mark}")

    def on_event(self, line: Line) -> None:
        if line["event"] == "nonfinite":
            ranks = ", ".join(map(str, line["ranks"])) or "none"
            self._print(
                f"update {line['step']:,} was not applied: the gradient is not finite, first in {line['parameter']} "
                f"(ranks with a non-finite loss: {ranks})"
            )
        elif line["event"] == "saved":
            self._saved = line["directory"]
        elif line["event"] == "save failed":
            self._print(
                f"the save at update {line['step']:,} failed (at {line['limit']} in a row the run gives up, this is "
                f"number {line['in_a_row']}): {line['reason']}"
            )
        elif line["event"] == "notice":
            self._print(line["text"])

    def on_end(self, result: FitResult) -> None:
        if self._line and not self._progress:
            self._print(self._figures())
        self.close()
        where = f"after update {result.step:,} of {self._total:,}"
        if result.reason == "interrupted":
            saved = f"saved as {self._directory / 'checkpoints' / self._saved}" if self._saved else "already saved"
            self._print(f"interrupted {where}, {saved}; the same command goes on from there")
            return
        why = {"budget": "the budget is spent", "early_stopping": "no better evaluation within the patience"}
        scores = ", ".join(_scores(result.metrics))
        self._print(f"done {where}, {why[result.reason]}: {scores or 'not evaluated'}; {self._best or 'no best'}")
        self._print(f"run directory {self._directory}")

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        try:
            self._out.print(text, markup=False)
        except OSError:  # the terminal is gone; the ledger and events.jsonl have everything
            self._out.quiet = True

    def _figures(self) -> str:
        """Return one line, what matters most first, since a narrow terminal cuts its end."""
        line = self._line
        if line is None or self._began is None:
            return ""
        seconds = max(1e-9, time.monotonic() - self._began)
        rate = (line["step"] - self._first_step) / seconds
        eta = timedelta(seconds=round((self._total - line["step"]) / rate)) if rate > 0 else "unknown"
        figures = (
            f"update {line['step']:,}/{self._total:,}",
            f"ETA {eta}",
            f"loss {line['loss']:.4f}",
            f"norm {line['grad_norm']:.3f}",
            f"rate {line['learning_rate']:.1e}",
            f"{(line['samples_seen'] - self._first_samples) / seconds:,.0f} samples/s",
            self._best,
        )
        return "  ".join(figure for figure in figures if figure)


def _scores(metrics: dict[str, Any]) -> list[str]:
    """Return `name value` of each number; tables are in the ledger."""
    return [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]

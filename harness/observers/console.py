"""What a person sees: one moving line on a terminal, plain lines elsewhere."""

import time
from datetime import timedelta

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.observers.base import Line, Observer
from harness.state import FitResult
from harness.stopping import Patience

SECONDS_BETWEEN_LINES = 5.0


class Console(Observer):
    """Prints to stdout.

    Args:
        total_updates: of the whole run.
        start_step: applied updates before this segment.
    """

    def __init__(self, *, total_updates: int, start_step: int, terminal: RichConsole | None = None) -> None:
        self._out = terminal or RichConsole(highlight=False, soft_wrap=True)
        self._total, self._start = total_updates, start_step
        self._first_samples: int | None = None
        self._began = time.monotonic()
        self._printed = -SECONDS_BETWEEN_LINES
        self._line: Line | None = None
        self._best = ""
        self._progress: Progress | None = None
        if self._out.is_terminal:
            columns = (
                TextColumn("update"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._out)
            self._bar = self._progress.add_task("", total=total_updates, completed=start_step)
            self._progress.start()

    def on_update(self, line: Line) -> None:
        if self._first_samples is None:
            self._first_samples, self._began = line["samples_seen"], time.monotonic() - line["seconds"]
        self._line = line

    def on_settled(self) -> None:
        if self._line is None:
            return
        if self._progress:
            self._progress.update(self._bar, completed=self._line["step"], description=self._figures(self._line))
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print_line(self._line)

    def on_evaluation(self, line: Line, best: Patience) -> None:
        scores = "  ".join(f"{name} {value:.4f}" for name, value in line["metrics"].items())
        mark = "  best so far" if best.best_step == line["step"] else ""
        self._best = f"best {best.metric} {best.best:.4f} at {best.best_step:,}" if best.best is not None else ""
        self._out.print(f"evaluation at update {line['step']:,}: {scores}{mark}")

    def on_event(self, line: Line) -> None:
        if line["event"] == "nonfinite":
            ranks = ", ".join(map(str, line["ranks"])) or "unknown"
            self._out.print(
                f"update {line['step']:,} was not applied: non-finite gradient, first in {line['parameter']} "
                f"(rank with a non-finite loss: {ranks})"
            )
        elif line["event"] == "notice":
            self._out.print(line["text"])

    def on_end(self, result: FitResult) -> None:
        if self._progress:
            self._progress.stop()
        elif self._line:
            self._print_line(self._line)

    def _print_line(self, line: Line) -> None:
        rate = (line["step"] - self._start) / max(1e-9, time.monotonic() - self._began)
        eta = timedelta(seconds=round((self._total - line["step"]) / rate)) if rate > 0 else "unknown"
        self._out.print(f"update {line['step']:,}/{self._total:,}  {self._figures(line)}  ETA {eta}")
        self._printed = time.monotonic()

    def _figures(self, line: Line) -> str:
        samples = line["samples_seen"] - (self._first_samples or 0)
        throughput = samples / max(1e-9, time.monotonic() - self._began)
        figures = (
            f"loss {line['loss']:.4f}",
            f"rate {line['learning_rate']:.2e}",
            f"norm {line['grad_norm']:.3f}",
            f"{throughput:,.0f} samples/s",
            self._best,
        )
        return "  ".join(figure for figure in figures if figure)

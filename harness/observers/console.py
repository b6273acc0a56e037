"""What a person sees: a few moving lines on a terminal, plain lines elsewhere. It can never end a run."""

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.agenda import Agenda
from harness.config.run import Best
from harness.observers.base import Line, Link, Observer
from harness.observers.pace import Pace
from harness.state import FitResult, StopReason, TrainState
from harness.stopping import Standings

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.2
_REASONS = {"budget": "the budget is spent", "early_stopping": "no better evaluation within the patience"}


class _Terminal(RichConsole):
    """Falls silent when nobody reads any more (`harness launch ... | head`)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console(Observer):
    """Prints to stdout.

    Args:
        directory: of the run.
        state: of the run, which changes as it trains.
        samples_seen: before this launch.
        standings: which evaluation is the best; it changes as the run trains.
        command: what starts the run again.
        report: where its report will be, if one is drawn.
        links: where else the run can be looked at; asked at the start and again at the end.
    """

    def __init__(
        self,
        directory: Path,
        *,
        agenda: Agenda,
        state: TrainState,
        samples_seen: int,
        command: str,
        standings: Standings | None = None,
        report: Path | None = None,
        links: Callable[[], Sequence[Link]] = list,
        terminal: RichConsole | None = None,
    ) -> None:
        # Not what rich makes of FORCE_COLOR and the like: a log file gets plain lines whatever they say.
        self._out = terminal or _Terminal(force_terminal=sys.stdout.isatty(), highlight=False, soft_wrap=True)
        self._directory, self._command, self._report, self._links = directory, command, report, links
        self._pace = Pace(agenda, state, samples_seen=samples_seen)
        self._shown_at = -SECONDS_BETWEEN_LINES
        self._standings, self._saved, self._only_answer = standings, "", ""
        self._live: Live | None = None
        if self._out.is_terminal and not self._out.is_dumb_terminal:
            self._live = Live(console=self._out, auto_refresh=False, transient=True)

    def on_update(self, line: Line) -> None:
        self._pace.hear(line)

    def on_settled(self) -> None:
        self._pace.settle()
        wait = SECONDS_BETWEEN_FRAMES if self._live else SECONDS_BETWEEN_LINES
        if self._pace.line is None or time.monotonic() - self._shown_at < wait:
            return
        self._shown_at = time.monotonic()
        if self._live:
            self._safely(self._show)
        else:
            self._print(self._figures())

    def on_evaluation(self, line: Line, standings: Standings) -> None:
        scores = "  ".join(_scores(line["metrics"]))
        self._standings = standings
        is_best = standings.best.best_step == line["step"]
        mark = "  best so far" if is_best else ""
        if self._only_answer:
            mark, self._only_answer = f"{mark}  every answer is {self._only_answer}", ""
        self._print(f"evaluation at update {line['step']:,}: {scores}{mark}", style="bold" if is_best else "")

    def on_event(self, line: Line) -> None:
        if line["event"] == "started":
            self._print_panel(self._facts())
        elif line["event"] == "nonfinite":
            ranks = ", ".join(map(str, line["ranks"])) or "none"
            self._print(
                f"update {line['step']:,} was not applied: the gradient is not finite, first in {line['parameter']} "
                f"(ranks with a non-finite loss: {ranks})",
                style="red",
            )
        elif line["event"] == "one answer":
            self._only_answer = repr(line["answer"])
        elif line["event"] == "saved":
            self._saved = line["directory"]
        elif line["event"] == "save failed":
            self._print(
                f"the save at update {line['step']:,} failed (at {line['limit']} in a row the run gives up, this is "
                f"number {line['in_a_row']}): {line['reason']}",
                style="red",
            )
        elif line["event"] == "cut back":
            self._print(f"{line['updates']:,} updates after the last save were lost; they are made again")
        elif line["event"] == "promises":
            for text in promised(line["promises"], seconds=line["seconds"]):
                self._print(text)
        elif line["event"] == "notice":
            self._print(line["text"])
        elif line["event"] == "failed":
            self.close()
            self._print(f"failed after update {line['step']:,}: exit code {line['code']}", style="bold red")
            self._print_panel(self._facts())

    def on_end(self, result: FitResult) -> None:
        if self._pace.line and not self._live:
            self._print(self._figures())
        self.close()
        where = f"after update {result.step:,} of {self._pace.total:,}"
        if result.reason == "interrupted":
            saved = f"saved as {self._directory / 'checkpoints' / self._saved}" if self._saved else "already saved"
            self._print(f"interrupted {where}, {saved}; the same command goes on from there", style="bold yellow")
        else:
            scores = ", ".join(_scores(result.metrics))
            text = f"done {where}, {_REASONS[result.reason]}: {scores or 'not evaluated'}; {self._verdict(result)}"
            self._print(text, style="bold green")
        self._print_panel(self._facts(None if result.reason == "interrupted" else result.reason, step=result.step))

    def close(self) -> None:
        if self._live:
            live, self._live = self._live, None
            self._safely(live.stop)

    @property
    def _best(self) -> str:
        best = self._standings.best if self._standings else None
        return f"best {best.metric} {best.best:.4f} at {best.best_step:,}" if best and best.best is not None else ""

    def _verdict(self, result: FitResult) -> str:
        """Return which evaluation is the best, with its other scores, and whether a better one cannot be had back."""
        standings = self._standings
        if not standings or not self._best:
            return "no best"
        others = ""
        if standings.best.best_step != result.step:
            scores = {name: value for name, value in standings.scores.items() if name != standings.best.metric}
            others = f" ({', '.join(_scores(scores))} there)" if scores else ""
        missed = f"; {standings.missed}" if standings.missed else ""
        return f"{self._best}{others}{missed}"

    def _facts(self, reason: StopReason | None = None, *, step: int = 0) -> list[Link]:
        """Return where things are and what to type, for a panel.

        Args:
            reason: why the run is over, if it is; after `step`.
        """
        facts = [("run directory", str(self._directory))]
        if self._report:
            draw = shlex.join(["harness", "report", str(self._directory)])
            facts.append(("report", str(self._report) if reason else f"{draw} (drawn at the end anyway)"))
        facts += self._links()
        return facts + ([("to resume", self._command)] if reason is None else self._longer(reason, step))

    def _longer(self, reason: StopReason, step: int) -> list[Link]:
        """Return what makes a run that is over go on, a budget of twice as much or no patience, and with which rate."""
        run, pace = self._pace.config.run, self._pace
        factor = 2 * max(1, -(-step // pace.total))  # the run may be past a budget that was made smaller
        budget = {"max_epochs": run.max_epochs, "max_steps": run.max_steps}
        larger = {name: factor * count for name, count in budget.items() if count}
        changes = {f"run.{name}": str(count) for name, count in larger.items()}
        if reason == "early_stopping":
            larger, changes = {}, {"early_stopping": "null"}
            rule = pace.config.best_rule
            if rule != Best(metric="val/loss", mode="min"):  # else BEST would be the lowest val/loss from then on
                changes["checkpoint.best"] = f"{{metric: {rule.metric}, mode: {rule.mode}}}"
        given = [word for word in shlex.split(self._command) if not word.partition("=")[0].startswith(tuple(changes))]
        command = shlex.join([*given, *(f"{key}={value}" for key, value in changes.items())])
        before, after = pace.rate(step), pace.rate(step + 1, **larger)
        total = pace.config.schedule.length(pace.total)
        if after == 0:
            stays = f"would stay 0, since schedule.total_steps={total} is over; raise that too, or train longer in vain"
            return [("to train longer", command), ("its learning rate", stays)]
        if math.isclose(before, after, rel_tol=0.1):
            return [("to train longer", command)]
        rates = f"would go from {before:.2g} to {after:.2g}"
        if left := pace.rate(total + 1):
            rates += f" (with schedule.total_steps={total} to {left:.2g})"
        return [("to train longer", command), ("its learning rate", rates)]

    def _print_panel(self, facts: list[Link]) -> None:
        if not self._out.is_terminal:
            for name, text in facts:
                self._print(f"{name}: {text}")
            return
        grid = Table.grid(padding=(0, 2))
        for name, text in facts:
            grid.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
        # No borders at the sides: what is between them is there to be copied.
        panel = Panel(grid, box=HORIZONTALS, title=self._directory.name, title_align="left", border_style="dim")
        self._safely(lambda: self._out.print(panel, soft_wrap=False))

    def _print(self, text: str, *, style: str = "") -> None:
        self._safely(lambda: self._out.print(Text(text, style=style), soft_wrap=True))

    def _safely(self, show: Callable[[], None]) -> None:
        try:
            show()
        except OSError:  # the terminal is gone; the ledger and events.jsonl have everything
            self._out.quiet, self._live = True, None

    def _show(self) -> None:
        assert self._live, "only a terminal has moving lines"
        if not self._live.is_started:
            self._live.start()
        self._live.update(self._frame(), refresh=True)

    def _frame(self) -> Group:
        pace = self._pace
        line = pace.line or {}
        progress = Table.grid(padding=(0, 1), expand=True)
        progress.add_column(no_wrap=True)
        progress.add_column(ratio=1)
        progress.add_column(no_wrap=True)
        progress.add_row(
            f"update {line['step']:,}/{pace.total:,}",
            ProgressBar(total=pace.total, completed=line["step"]),
            f"{pace.time_left} left, evaluation in {pace.time_to_evaluation}",
        )
        curve = "" if self._out.options.ascii_only else pace.sparkline(max(8, min(40, self._out.width - 62)))
        figures = "  ".join(filter(None, [f"loss {line['loss']:.4f}", curve, *self._gauges(line)]))
        return Group(
            progress, *(Text(text, no_wrap=True, overflow="ellipsis") for text in (figures, self._best) if text)
        )

    def _gauges(self, line: Line) -> list[str]:
        return [
            f"norm {line['grad_norm']:.3f}",
            f"rate {line['learning_rate']:.1e}",
            self._pace.throughput,
        ]

    def _figures(self) -> str:
        """Return one line, what matters most first."""
        line, pace = self._pace.line, self._pace
        assert line, "there is nothing to tell before the first update"
        times = [f"ETA {pace.time_left}", f"evaluation in {pace.time_to_evaluation}"]
        words = [f"update {line['step']:,}/{pace.total:,}", *times, f"loss {line['loss']:.4f}", *self._gauges(line)]
        return "  ".join([*words, *filter(None, [self._best])])


def _scores(metrics: dict[str, Any]) -> list[str]:
    """Return `name value` of each number; tables are in the ledger."""
    return [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]


def promised(promises: Sequence[Mapping[str, str]], *, seconds: float) -> Iterator[str]:
    """Yield what a run promises: one line if all is held, else one for each promise below it."""
    others = [promise for promise in promises if promise["verdict"] != "held"]
    names = ", ".join(promise["name"] for promise in promises)
    kept = f"all held ({names})" if not others else f"{len(promises) - len(others)} of {len(promises)} held"
    yield f"promises: {kept}; looked at in {seconds:.1f} s"
    width = max(len(promise["name"]) for promise in promises)
    for promise in promises if others else ():
        between = {"held": "", "held if": " ", "not": ", because "}[promise["verdict"]]
        yield f"  {promise['name']:{width}}  {promise['verdict']}{between}{promise['reason']}"

"""`harness runs [ROOT]`: the runs below a folder, one a line."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.record.run_status import RunStatus, duration, find_runs, run_status

SORT_KEYS: dict[str, Callable[[RunStatus], Any]] = {
    "run": lambda run: str(run.directory),
    "state": lambda run: run.state,
    "step": lambda run: -(run.step or 0),
    "best": lambda run: (run.best is None, run.metric or "", (run.best or 0.0) * (1 if run.mode == "min" else -1)),
    "age": lambda run: run.age_seconds or 0.0,
    "strategy": lambda run: (run.strategy or "", run.ranks or 0),
    "ranks": lambda run: -(run.ranks or 0),
}
"""What each column is sorted by: the furthest, the best, the youngest first."""


def statuses(root: Path, *, sort: str, is_reversed: bool) -> list[RunStatus]:
    """Return how every run below `root` is doing.

    Raises:
        ConfigError: there is no such folder.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; give the run.output_root of your runs, such as harness runs runs")
    found = sorted(map(run_status, find_runs(root)), key=SORT_KEYS["run"])
    return sorted(found, key=SORT_KEYS[sort], reverse=is_reversed)


def as_table(runs: Iterable[RunStatus], *, root: Path) -> str:
    """Return aligned columns with a heading, for people."""
    heading = ("run", "state", "step", "best", "age", "strategy", "ranks")
    rows = [heading, *(_row(run, root) for run in runs)]
    if len(rows) == 1:
        return f"no run below {root}"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(run: RunStatus, root: Path) -> tuple[str, ...]:
    name = str(run.directory.relative_to(root)) if run.directory != root else str(root)
    state = f"{run.state} ({run.code})" if run.state == "failed" else run.state
    return (
        name,
        f"{state}: {run.reason}" if run.state == "unreadable" else state,
        "-" if run.step is None else f"{run.step:,}",
        "-" if run.best is None else f"{run.metric} {run.best:.4g} at {run.best_step:,}",
        "-" if run.age_seconds is None else duration(run.age_seconds),
        run.strategy or "-",
        "-" if run.ranks is None else str(run.ranks),
    )


def as_json(runs: Iterable[RunStatus]) -> str:
    """Return a list of objects, for programs."""
    rows = [{**vars(run), "directory": str(run.directory), "age_seconds": run.age_seconds} for run in runs]
    return json.dumps(rows, indent=1)

"""Reads a run directory into one object: what is broken in it is left out and named, never guessed."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel

from harness.config.changes import leaves
from harness.config.io import load_stored
from harness.config.run import Best
from harness.errors import ConfigError
from harness.record.checkpoints import CheckpointDirectory, step_of
from harness.record.json_lines import Line, has, whole_lines
from harness.record.manifest import read_json
from harness.record.run_directory import SCHEMA
from harness.record.run_status import RunStatus, run_status
from harness.stopping import Patience, Standings, standings

COLUMNS = (
    *("step", "loss", "grad_norm", "clip_coefficient", "learning_rate", "samples_seen", "applied", "seconds"),
    *("samples_per_second", "tokens_per_second", "mfu", "memory_bytes"),
    *("data_wait_fraction", "compute_fraction", "reduction_fraction", "rest_fraction"),
)
"""What is read of an update; where a line has no such number it is NaN."""
MAX_TOLD = 8
_WANTED_OF_LINE: dict[str, dict[str, Any]] = {"evaluation": {"metrics": dict}}
_WANTED_OF_EVENT: dict[str, dict[str, Any]] = {
    "started": {"step": int},
    "cut back": {"seconds": int | float},
    "overflow": {"step": int},
    "gradients": {"step": int, "norms": dict},
    "samples": {"step": int, "columns": list, "rows": list},
}
"""What is read of an event of these kinds, besides its time."""


@dataclass(frozen=True)
class Record:
    """One run as its directory tells it."""

    status: RunStatus
    identity: dict[str, Any]
    updates: dict[str, np.ndarray]
    """Attempted updates in the order they were made, a float64 (N,) for each of COLUMNS."""
    evaluations: list[tuple[int, dict[str, float]]]
    events: list[Line]
    standings: Standings
    settings: dict[str, Any]
    """The whole configuration by dotted path."""
    changed: frozenset[str] = frozenset()
    """The paths of `settings` that are not their defaults."""
    ignored: list[str] = field(default_factory=list)
    """A sentence for each thing that could not be read."""
    matrices: dict[str, np.ndarray] = field(default_factory=dict)
    """The last of each score that is a (classes, classes) matrix."""
    has_twin: bool = False
    """Another run of the same report has this one's name."""

    @property
    def own_name(self) -> str:
        """What its configuration calls it."""
        return str(self.settings.get("run.name", self.status.directory.name))

    @property
    def name(self) -> str:
        """What a report calls it: its directory where the name does not tell it from the others."""
        return str(self.status.directory) if self.has_twin else self.own_name

    @property
    def slug(self) -> str:
        """Its name, fit for a part of a file's name."""
        return self.name.strip("/").replace("/", "-")

    @property
    def starts(self) -> list[Line]:
        """The event of each start that reached training, in order."""
        return [event for event in self.events if event["event"] == "started"]

    @property
    def restarts(self) -> list[int]:
        """The steps after which the run went on after a pause or a crash."""
        return [start["step"] for start in self.starts[1:]]

    @property
    def samples(self) -> Line | None:
        """The last event that shows validation rows, of those that count."""
        found: Line | None = None
        for event in self.events:
            if event["event"] == "started" and found and found["step"] > event["step"]:
                found = None  # it is made again
            elif event["event"] == "samples":
                found = event
        return found

    @property
    def best(self) -> Patience:
        """The best evaluation of those whose checkpoint is there."""
        return self.standings.best

    @property
    def last_evaluated(self) -> int | None:
        """The step of the last evaluation."""
        return self.evaluations[-1][0] if self.evaluations else None

    @property
    def final_metrics(self) -> dict[str, float]:
        """The scores of the last evaluation."""
        return self.evaluations[-1][1] if self.evaluations else {}


def read_run(directory: Path) -> Record:
    """Return everything a run directory says.

    Raises:
        ConfigError: it is no run directory.
    """
    if not (directory / "run.json").is_file():
        raise ConfigError(f"{directory} is not a run directory: it has no run.json. Give one such as runs/mnist-cnn")
    ignored: list[str] = []
    status = run_status(directory)
    if status.state == "unreadable":
        ignored.append(str(status.reason))
    identity = _identity(directory, ignored)
    settings, changed, rule = _settings(directory / "config.yaml", ignored)
    updates, evaluations, matrices = _ledger(directory / "ledger.jsonl", ignored)
    judged = standings(evaluations, rule, _kept_steps(directory) or {step for step, _ in evaluations})
    events = _events(directory / "events.jsonl", ignored)
    return Record(
        status,
        identity,
        updates,
        evaluations,
        events,
        judged,
        settings,
        changed,
        ignored,
        matrices,
    )


def _kept_steps(directory: Path) -> set[int]:
    """Return the steps of a run's checkpoints; none where they were not copied with the rest."""
    checkpoints = CheckpointDirectory(directory / "checkpoints")
    return {step_of(path.name) for path in checkpoints.steps()} if checkpoints.path.is_dir() else set()


def _identity(directory: Path, ignored: list[str]) -> dict[str, Any]:
    try:
        identity = read_json(directory / "run.json")
        schema = identity.get("schema")
    except (OSError, ValueError, AttributeError):
        return {}  # the status has told it
    if schema != SCHEMA:
        ignored.append(
            f"run.json is of schema {schema!r}, this harness writes and reads {SCHEMA}: what it does not know is not "
            "shown. Draw it with the harness that wrote it"
        )
    return dict(identity)


def _settings(path: Path, ignored: list[str]) -> tuple[dict[str, Any], frozenset[str], Best]:
    """Return the settings, the paths that are not defaults, and what decides which evaluation is best."""
    try:
        config = load_stored(path)
    except ConfigError as error:
        ignored.append(f"{error.args[0]} (so it is not known which of its settings are defaults)")
        return _raw_settings(path), frozenset(), Best(metric="val/loss", mode="min")
    settings = dict(leaves(config.model_dump(mode="json")))
    changed = {path for path, _ in leaves(config.model_dump(mode="json", exclude_defaults=True))}
    of_sections = tuple(f"{section}." for section in _turned_on(config))
    changed |= {path for path, value in settings.items() if path.startswith(of_sections) and value not in (None, [])}
    return settings, frozenset(changed), config.best_rule


def _turned_on(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the path of each section that is there although there is none by default: what it says is a difference."""
    for name, about in type(section).model_fields.items():
        value, path = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from (path,) if about.default is None else _turned_on(value, f"{path}.")


def _raw_settings(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # load_stored has said why
    return dict(leaves(raw)) if isinstance(raw, dict) else {}


def _ledger(
    path: Path, ignored: list[str]
) -> tuple[dict[str, np.ndarray], list[tuple[int, dict[str, float]]], dict[str, np.ndarray]]:
    columns = {name: array("d") for name in COLUMNS}
    evaluations, matrices = [], dict[str, np.ndarray]()

    def is_good(line: Line) -> bool:
        return _is_whole(line, {"step": int}, _WANTED_OF_LINE)

    for line in _lines(path, ignored, is_good):
        if line["event"] == "evaluation":
            scores = line["metrics"]
            numbers = {name: number(value) for name, value in scores.items() if not isinstance(value, list)}
            evaluations.append((line["step"], numbers))
            matrices |= {name: matrix for name, value in scores.items() if (matrix := _matrix(value)) is not None}
        elif line["event"] == "update":
            for name, column in columns.items():
                column.append(number(line.get(name)))
    return {name: np.array(column) for name, column in columns.items()}, evaluations, matrices


def _events(path: Path, ignored: list[str]) -> list[Line]:
    def is_good(line: Line) -> bool:
        return _is_whole(line, {"time": str}, _WANTED_OF_EVENT) and _is_time(line["time"])

    return list(_lines(path, ignored, is_good))


def _lines(path: Path, ignored: list[str], is_good: Callable[[Line], bool]) -> Iterator[Line]:
    """Yield the lines of a file that are good; name the first of those that are not."""
    problems: list[str] = []
    try:
        with path.open("rb") as file:
            for line in whole_lines(file, ignored=problems):
                if is_good(line):
                    yield line
                else:
                    problems.append(f"a line that lacks what its kind has ({json.dumps(line)[:60]})")
    except FileNotFoundError:
        return  # of a run that has not come so far
    except OSError as error:
        problems.append(f"the rest cannot be read ({error.strerror})")
    ignored += [f"{path.name}, left out: {problem}" for problem in problems[:MAX_TOLD]]
    if len(problems) > MAX_TOLD:
        ignored.append(f"{path.name}: {len(problems) - MAX_TOLD:,} more lines were left out")


def _is_whole(line: Line, of_all: dict[str, Any], of_kind: dict[str, dict[str, Any]]) -> bool:
    return has(line, {"event": str, **of_all}) and has(line, of_kind.get(line["event"], {}))


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _matrix(value: Any) -> np.ndarray | None:
    """Return a square matrix of numbers, or None if it is something else."""
    rows = value if isinstance(value, list) else []
    if not rows or not all(isinstance(row, list) and len(row) == len(rows) for row in rows):
        return None
    return np.array([[number(value) for value in row] for row in rows])


def number(value: Any) -> float:
    """Return a value of a file as a float, NaN where it is none."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan

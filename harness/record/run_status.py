"""How a run is doing, at a glance: from the ends of its files, however long they are, and without touching its lock."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.config.io import load_stored
from harness.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError
from harness.record.checkpoints import CheckpointDirectory, step_of
from harness.record.json_lines import ends
from harness.record.manifest import TRAINER, read_json
from harness.record.progress import trainer_problems

END_BYTES = 2**15
"""How much of the head and of the tail of a file is read: a hundred lines of a ledger."""
SECONDS_OF_SILENCE = 600.0
"""After how long without a line a run on another machine counts as killed: its lock cannot be seen from here."""


_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@dataclass(frozen=True)
class RunStatus:
    """One run; what its directory does not tell is None."""

    directory: Path
    state: str
    """running, finished, interrupted (saved; start it again), failed, killed (it could not say why), unreadable."""
    code: int | None = None
    reason: str | None = None
    step: int | None = None
    metric: str | None = None
    mode: str | None = None
    best: float | None = None
    best_step: int | None = None
    strategy: str | None = None
    ranks: int | None = None
    created: float | None = None
    """Seconds since 1970."""

    @property
    def failed_to_start(self) -> bool:
        """Whether it ended with an error before it had made an update."""
        return self.state == "failed" and self.step == 0

    @property
    def age_seconds(self) -> float | None:
        """Seconds since the run was first started."""
        return None if self.created is None else max(0.0, time.time() - self.created)


def find_runs(root: Path) -> Iterator[Path]:
    """Yield every run directory in a folder, at any depth, and itself; does not look inside of them."""
    for folder, below, files in os.walk(root):
        if "run.json" in files:
            below.clear()
            yield Path(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))


def run_status(directory: Path) -> RunStatus:
    """Return the status of the run in `directory`; what cannot be read makes it unreadable and is its reason."""
    try:
        return _status(directory)
    except KeyError as error:
        return RunStatus(directory, "unreadable", reason=f"one of its files does not say {error.args[0]!r}")
    except (OSError, ValueError, TypeError) as error:
        return RunStatus(directory, "unreadable", reason=str(error) or repr(error))


def _status(directory: Path) -> RunStatus:
    created = _created(_object(directory / "run.json"))
    trainer = _last_save(directory)
    score = _best(directory, trainer) if trainer else {}
    first, last = ends(directory / "events.jsonl", num_bytes=END_BYTES)
    starts = [[line for line in lines if line.get("event") == "started"] for lines in (first, last)]
    # The last start counts; where many events came after it, the last save knows it too.
    started = starts[1][-1] if starts[1] else {"strategy": None, **(starts[0][0] if starts[0] else {}), **trainer}
    state, code, reason, step = _ending(directory)
    if step is None:
        lines = [line for line in ends(directory / "ledger.jsonl", num_bytes=END_BYTES)[1] if "step" in line]
        step = lines[-1]["step"] if lines else 0
    return RunStatus(
        directory,
        state,
        code=code,
        reason=reason,
        step=step,
        metric=score.get("metric"),
        mode=score.get("mode"),
        best=score.get("best"),
        best_step=score.get("best_step"),
        strategy=started.get("strategy"),
        ranks=started.get("world_size"),
        created=created,
    )


def _best(directory: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    """Return which evaluation is the best by the last save; where another judge has moved BEST since, by that one."""
    score: dict[str, Any] = trainer["judge"]["score"]
    checkpoints = CheckpointDirectory(directory / "checkpoints")
    named = checkpoints.best()
    if not named or step_of(named) == score["best_step"]:
        return score
    try:
        rule = load_stored(directory / "config.yaml").best_rule
    except ConfigError:
        return score  # of another version
    own = _object(checkpoints.path / named / TRAINER)
    if own.get("evaluated_step") != step_of(named) or trainer_problems(own, step=step_of(named)):
        return score
    value = own["metrics"].get(rule.metric)
    return {"metric": rule.metric, "mode": rule.mode, "best": value, "best_step": step_of(named)}


def _created(identity: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(identity["created"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError("run.json is broken: it does not say when the run was created") from error


def _ending(directory: Path) -> tuple[str, int | None, str | None, int | None]:
    """Return state, exit code, reason and step, as far as the run has said them."""
    if not (directory / "exit.json").exists():
        return ("running" if is_alive(directory) else "killed"), None, None, None
    ending = _object(directory / "exit.json")
    code, reason, step = ending.get("code"), ending.get("reason"), ending.get("step")
    if not (isinstance(code, int) and isinstance(reason, str) and isinstance(step, int)):
        raise ValueError("exit.json is broken: it does not say code, reason and step")
    return {EXIT_DONE: "finished", EXIT_INTERRUPTED: "interrupted"}.get(code, "failed"), code, reason, step


def is_alive(directory: Path) -> bool:
    """Whether a process trains in this run directory.

    Trying to lock it would tell, but could make a run that starts just now believe that its directory is in use.
    """
    try:
        lock = directory / "lock"
        inode, holder = f":{lock.stat().st_ino}", lock.read_text()
        locks = Path("/proc/locks").read_text().splitlines()
    except FileNotFoundError:
        return False
    if socket.gethostname() not in holder:
        changed = [path.stat().st_mtime for path in (lock, *directory.glob("*.jsonl"))]
        return time.time() - max(changed) < SECONDS_OF_SILENCE
    # 1: FLOCK  ADVISORY  WRITE 4242 fe:01:1573 0 EOF
    return any(" FLOCK " in line and line.split()[-3].endswith(inode) for line in locks)


def _last_save(directory: Path) -> dict[str, Any]:
    checkpoints = CheckpointDirectory(directory / "checkpoints")
    name = checkpoints.named_by("LATEST")
    if not name:
        return {}
    trainer = _object(checkpoints.path / name / TRAINER)
    problems = trainer_problems(trainer, step=step_of(name))
    if problems:
        raise ValueError(f"{name}/{TRAINER} is broken: {problems[0]}")
    return trainer


def _object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path.name} is broken: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is broken: it holds no JSON object")
    return value


def duration(seconds: float) -> str:
    """Return a time to two digits or more, in the largest unit of which there is at least one: 3 h."""
    size, unit = next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])
    return f"{seconds / size:.0f} {unit}"

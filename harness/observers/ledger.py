"""ledger.jsonl, the truth about a run, and events.jsonl, what happened to it.

Lines are JSON objects. Floats read back to the same bits; NaN and infinities, which JSON does not have, are null.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import StorageError
from harness.observers.base import Line, Observer
from harness.record.files import own_file, storage_errors, sync_directory
from harness.record.json_lines import (
    event_line,
    first_line,
    json_line,
    last_line,
    missing_newline,
    read_lines,
    whole_lines,
)
from harness.stopping import Standings

__all__ = ["MEASURED", "Ledger", "read_lines"]

NAME = "ledger.jsonl"
MEASURED = {
    *("seconds", "samples_per_second", "tokens_per_second", "mfu", "memory_bytes"),
    *("data_wait_fraction", "compute_fraction", "reduction_fraction", "rest_fraction"),
}
"""Keys of an update's line that two runs of the same updates do not share; all but the first once an interval."""


class Ledger(Observer):
    """Writes both files; the ledger is cut back to `keep_bytes`, where the checkpoint that is resumed from left it.

    What the disk does not take is kept and tried again with the next lines, so that a full disk stops no training; a
    checkpoint that refers to such lines cannot be made (`sync`).

    Raises:
        StorageError: the ledger is shorter than that, so lines were lost.
    """

    def __init__(self, directory: Path, *, keep_bytes: int) -> None:
        path = directory / NAME
        found = path.stat().st_size if path.exists() else 0
        if found < keep_bytes:
            raise StorageError(
                f"{path} has {found:,} bytes, the checkpoint was made when it had {keep_bytes:,}: somebody cut it. "
                "Put the whole file back, or start afresh under another run.name"
            )
        with storage_errors("write", path):
            cut_off = updates_after(path, keep_bytes) if found > keep_bytes else []
            self._ledger = _Appender(path, keep_bytes=keep_bytes)
        with storage_errors("write", directory / "events.jsonl"):
            self._events = _Appender(directory / "events.jsonl")
            sync_directory(directory)
        self._lines: list[Line] = []
        if cut_off:
            seconds = math.fsum(line["seconds"] for line in cut_off)
            self.on_event({"event": "cut back", "updates": len(cut_off), "seconds": seconds})

    def on_update(self, line: Line) -> None:
        self._lines.append(line)

    def on_settled(self) -> None:
        lines, self._lines = self._lines, []
        self._ledger.append(b"".join(map(json_line, lines)))

    def on_evaluation(self, line: Line, standings: Standings) -> None:
        self._lines.append(line)
        self.on_settled()

    def on_event(self, line: Line) -> None:
        self._events.append(event_line(line))

    def seal(self) -> int:
        self.on_settled()
        self._sealed = self._ledger.length
        return self._sealed

    def sync(self) -> None:
        self._ledger.sync(self._sealed)

    def close(self) -> None:
        try:
            self._ledger.close()
        finally:
            self._events.close()


class _Appender:
    """A file that only grows. What the disk refuses stays here and is tried again before the next lines."""

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0, opener=own_file)  # noqa: SIM115 - until close()
        if keep_bytes is not None:
            self._file.truncate(keep_bytes)
        self._written = self._file.seek(0, os.SEEK_END)
        self._pending = b""
        self._problem: OSError | None = None
        if keep_bytes is None:
            self.append(missing_newline(path))

    @property
    def length(self) -> int:
        """Bytes of the file once everything is in it."""
        return self._written + len(self._pending)

    def append(self, content: bytes) -> None:
        """Write what is pending and `content`, as much of it as the disk takes."""
        self._pending += content
        try:
            while self._pending:
                count = os.write(self._file.fileno(), self._pending)
                self._written += count
                self._pending = self._pending[count:]
            self._problem = None
        except OSError as error:
            self._problem = error  # the next save fails with it

    def sync(self, length: int) -> None:
        """Wait until the disk has the first `length` bytes.

        Raises:
            StorageError: it did not take them, or the file is no longer in its directory.
        """
        with storage_errors("write", self._path):
            problem = self._problem  # training goes on beside this, and the disk may take the lines just now
            if self._written < length and problem:
                raise problem
            os.fsync(self._file.fileno())
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "it was deleted while the run wrote to it")

    def close(self) -> None:
        """Close the file.

        Raises:
            StorageError: lines are lost.
        """
        self.append(b"")
        problem, self._problem, self._pending = self._problem, None, b""
        with storage_errors("write", self._path):
            self._file.close()
            if problem:
                raise problem


def kept_bytes(trainer: Mapping[str, Any], *, run_id: str) -> int:
    """Return how much of a run's ledger comes before a checkpoint: nothing if it is the checkpoint of another run."""
    ledger_bytes: int = trainer["ledger_bytes"]
    return 0 if is_of_another_run(trainer, run_id=run_id) else ledger_bytes


def is_of_another_run(trainer: Mapping[str, Any], *, run_id: str) -> bool:
    """Whether a checkpoint was put into a run's directory to begin it with: its updates are in another ledger."""
    return trainer.get("run_id") not in (None, run_id)


def ledger_problem(run_directory: Path, trainer: Mapping[str, Any], *, run_id: str) -> str | None:
    """Return why a run cannot go on from a checkpoint with the ledger that it has: its lines up to there must be there.

    Raises:
        OSError: the ledger cannot be read.
    """
    path, step, num_bytes = run_directory / NAME, trainer["step"], trainer["ledger_bytes"]
    if path.is_symlink():
        return None  # opening it says so
    found = path.stat().st_size if path.is_file() else 0
    if is_of_another_run(trainer, run_id=run_id):
        is_fit = not found or (first_line(path) or {}).get("step") == step + 1
        return None if is_fit else f"it is of run {trainer['run_id']}, and {NAME} does not begin after it"
    if found < num_bytes:
        return f"{NAME} has {found:,} bytes, it had {num_bytes:,} when this was saved: lines are lost"
    last = last_line(path, num_bytes=num_bytes) or {}
    # A skipped update has the step that it would have been.
    is_fit = last.get("step") == step + (last.get("applied") is False)
    return None if is_fit else f"{NAME} is another than when this was saved: update {step:,} is not where it was"


def read_back(path: Path, *, num_bytes: int) -> tuple[list[tuple[int, dict[str, Any]]], float | None]:
    """Return step and scores of each evaluation in the first bytes of a ledger, and the rate of its last update.

    Raises:
        OSError: it cannot be read.
    """
    evaluations, last = [], b""
    with path.open("rb") as file:
        for line in file.read(num_bytes).splitlines():
            if b'"evaluation"' in line:  # of the others only one is needed, and there may be millions
                evaluation = json.loads(line)
                evaluations.append((evaluation["step"], evaluation["metrics"]))
            elif b'"applied": true' in line:
                last = line
    return evaluations, json.loads(last)["learning_rate"] if last else None


def updates_after(path: Path, num_bytes: int) -> list[Line]:
    """Return the updates told after the first `num_bytes` of a ledger: they were lost, and are made again."""
    with path.open("rb") as file:
        file.seek(num_bytes)
        return [line for line in whole_lines(file) if line.get("event") == "update" and "seconds" in line]

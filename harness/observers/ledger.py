"""ledger.jsonl, the truth about a run, and events.jsonl, what happened to it.

Lines are JSON objects. Floats read back to the same bits; NaN and infinities, which JSON does not have, are null.
"""

import json
import math
import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import StorageError
from harness.files import storage_errors
from harness.observers.base import Line, Observer
from harness.stopping import Patience

_encoder = json.JSONEncoder(allow_nan=False)


class Ledger(Observer):
    """Writes both files; the ledger is cut back to `keep_bytes`, where the checkpoint that is resumed from left it.

    Raises:
        StorageError: the ledger is shorter than that, so lines were lost.
    """

    def __init__(self, directory: Path, *, keep_bytes: int) -> None:
        path = directory / "ledger.jsonl"
        found = path.stat().st_size if path.exists() else 0
        if found < keep_bytes:
            raise StorageError(
                f"{path} has {found:,} bytes, the checkpoint was made when it had {keep_bytes:,}: somebody cut it. "
                "Put the whole file back, or start afresh under another run.name"
            )
        self._writing = partial(storage_errors, "write", path)
        with self._writing():
            self._ledger = path.open("ab")
            self._ledger.truncate(keep_bytes)
            self._ledger.seek(0, os.SEEK_END)
            self._events = (directory / "events.jsonl").open("ab")
        self._lines: list[Line] = []

    def on_update(self, line: Line) -> None:
        self._lines.append(line)

    def on_settled(self) -> None:
        lines, self._lines = self._lines, []
        with self._writing():
            self._ledger.write(b"".join(map(encode, lines)))
            self._ledger.flush()

    def on_evaluation(self, line: Line, best: Patience) -> None:
        self._lines.append(line)
        self.on_settled()

    def on_event(self, line: Line) -> None:
        with self._writing():
            self._events.write(encode({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}))
            self._events.flush()

    def seal(self) -> int:
        self.on_settled()
        with self._writing():
            os.fsync(self._ledger.fileno())
            return self._ledger.tell()

    def close(self) -> None:
        with self._writing():
            self._ledger.close()
            self._events.close()


def encode(line: Line) -> bytes:
    """Return one line of JSON."""
    try:
        text = _encoder.encode(line)
    except ValueError:  # NaN or infinity somewhere
        text = _encoder.encode(_finite(line))
    return (text + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a ledger or of an events file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]

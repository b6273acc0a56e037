"""ledger.jsonl, the truth about a run, and events.jsonl, what happened to it.

Lines are JSON objects. Floats read back to the same bits; NaN and infinities, which JSON does not have, are null.
"""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import StorageError
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
        self._ledger = path.open("ab")
        self._ledger.truncate(keep_bytes)
        self._events = (directory / "events.jsonl").open("ab")

    def on_update(self, line: Line) -> None:
        self._ledger.write(encode(line))

    def on_settled(self) -> None:
        self._ledger.flush()

    def on_evaluation(self, line: Line, best: Patience) -> None:
        self._ledger.write(encode(line))
        self._ledger.flush()

    def on_event(self, line: Line) -> None:
        self._events.write(encode({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}))
        self._events.flush()

    def seal(self) -> int:
        self._ledger.flush()
        os.fsync(self._ledger.fileno())
        return self._ledger.tell()


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
    return value


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a ledger or of an events file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]

"""Writing files so that a crash leaves the old one or the new one, never a half."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import StorageError

_encoder = json.JSONEncoder(allow_nan=False)
_PIECE_BYTES = 8 * 2**20  # hashed and written while it is still in a core's cache


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file and wait until the disk has it.

    Args:
        chunks: contiguous bytes; each is asked for when the one before is written.
    Returns:
        The size and the SHA-256 of what was in memory, not of what can be read back.
    """
    size, digest = 0, hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            size += len(chunk)
            for start in range(0, len(chunk), _PIECE_BYTES):
                piece = memoryview(chunk)[start : start + _PIECE_BYTES]
                digest.update(piece)
                while piece:
                    piece = piece[os.write(file.fileno(), piece) :]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def replace_durably(path: Path, content: bytes) -> None:
    """Put `content` in the place of whatever `path` held, in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_durably(temporary, [content])
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any) -> bytes:
    """Encode for a file that people read as well; floats read back to the same bits."""
    return (json.dumps(value, indent=1) + "\n").encode()


def json_line(line: dict[str, Any]) -> bytes:
    """Return one line of JSON; NaN and infinities, which JSON does not have, are null."""
    try:
        text = _encoder.encode(line)
    except ValueError:  # NaN or infinity somewhere
        text = _encoder.encode(_finite(line))
    return (text + "\n").encode()


def event_line(event: dict[str, Any]) -> bytes:
    """Return a line of events.jsonl, with the time of now."""
    return json_line({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **event})


def append_event(run_directory: Path, event: str, **details: Any) -> None:
    """Add a line to the events.jsonl of a run, in one write, so that lines of several processes do not mix."""
    path = run_directory / "events.jsonl"
    with storage_errors("write", path), path.open("ab", buffering=0) as file:
        file.write(event_line({"event": event, **details}))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ledger or of an events file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn what the operating system says of `path` into the run's exit code 5.

    Args:
        doing: a verb, such as "write".
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {doing} {path}: {error.strerror or error}. Mend that, then start the same command again"
        ) from error

"""Files of one JSON object a line, the ledger and the events of a run. A reader may find a half-written end."""

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.record.files import own_file, storage_errors, sync_directory

Line = dict[str, Any]

_TAIL_BYTES = 2**12
_encoder = json.JSONEncoder(allow_nan=False)


def json_line(line: Line) -> bytes:
    """Return one line of JSON; NaN and infinities, which JSON does not have, are null."""
    try:
        text = _encoder.encode(line)
    except ValueError:  # NaN or infinity somewhere
        text = _encoder.encode(_finite(line))
    return (text + "\n").encode()


def event_line(event: Line) -> bytes:
    """Return a line of events.jsonl, with the time of now."""
    return json_line({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **event})


def append_event(run_directory: Path, event: str, **details: Any) -> None:
    """Add a line to the events.jsonl of a run, in one write, so that lines of several processes do not mix.

    The disk has it when this returns.
    """
    path = run_directory / "events.jsonl"
    with storage_errors("write", path), open(path, "ab", buffering=0, opener=own_file) as file:
        line = missing_newline(path) + event_line({"event": event, **details})
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
        sync_directory(run_directory)


def missing_newline(path: Path) -> bytes:
    """Return what has to come before the next line where a process died while it wrote the last one."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return b"" if file.read() in (b"", b"\n") else b"\n"


def read_events(run_directory: Path) -> list[Line]:
    """Return the events of a run so far, which other processes may be writing; none where there is no file yet."""
    path = run_directory / "events.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as file:
        return list(whole_lines(file))


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a ledger or of an events file that nobody is writing to."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def whole_lines(file: Iterable[bytes], *, ignored: list[str] | None = None) -> Iterator[Line]:
    """Yield the objects of an open file, in order.

    Args:
        ignored: gets a sentence for every line that is no JSON object.
    """
    for number, text in enumerate(file, start=1):
        line = parse_line(text)
        if line is not None:
            yield line
        elif ignored is not None and text.endswith(b"\n"):
            ignored.append(f"line {number:,} is no JSON object ({_shown(text)})")
        elif ignored is not None:
            ignored.append(f"the last line, {number:,}, is half-written")


def ends(path: Path, *, num_bytes: int) -> tuple[list[Line], list[Line]]:
    """Return the whole objects in the first and in the last `num_bytes` of a file, the same ones if it is short."""
    try:
        with path.open("rb") as file:
            head = file.read(num_bytes)
            size = os.fstat(file.fileno()).st_size
            if size <= num_bytes:
                return (lines := list(whole_lines(head.splitlines()))), lines
            file.seek(size - num_bytes)
            tail = file.read()
    except FileNotFoundError:
        return [], []
    return list(whole_lines(head.splitlines()[:-1])), list(whole_lines(tail.splitlines()[1:]))


def first_line(path: Path) -> Line | None:
    """Return the first line of a file; None if it is no JSON object."""
    with path.open("rb") as file:
        return parse_line(file.readline())


def last_line(path: Path, *, num_bytes: int) -> Line | None:
    """Return the line that the first `num_bytes` of a file end with; None if they do not end with one."""
    length = _TAIL_BYTES
    with path.open("rb") as file:
        while True:
            length = min(length, num_bytes)
            file.seek(num_bytes - length)
            *before, text = file.read(length).splitlines(keepends=True) or [b""]
            if before or length == num_bytes:
                return parse_line(text) if text.endswith(b"\n") else None
            length *= 2  # an evaluation may have tables


def parse_line(text: bytes) -> Line | None:
    """Return the JSON object of one line, or None if it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def has(line: Line, wanted: Mapping[str, Any]) -> bool:
    """Return whether a line has every key of `wanted`, with a value of that type; integers of at most 64 bits."""
    return all(
        isinstance(value := line.get(key), kind) and not (isinstance(value, int) and abs(value) >= 2**63)
        for key, kind in wanted.items()
    )


def _shown(text: bytes) -> str:
    start = text[:40].decode("ascii", errors="replace").strip()
    return repr(start if len(text) <= 41 else f"{start}...")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

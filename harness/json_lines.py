"""Reading files of one JSON object a line that another process may be writing, or may have died while writing."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def whole_lines(file: Iterable[bytes], *, ignored: list[str] | None = None) -> Iterator[Line]:
    """Yield the objects of an open file, in order.

    Args:
        ignored: gets a sentence for every line that is no JSON object.
    """
    for number, text in enumerate(file, start=1):
        line = _parse(text)
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


def _parse(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _shown(text: bytes) -> str:
    start = text[:40].decode("ascii", errors="replace").strip()
    return repr(start if len(text) <= 41 else f"{start}...")

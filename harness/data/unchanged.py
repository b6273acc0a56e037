"""Sees that a file is not written while it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import DataError


@contextmanager
def unchanged(paths: Iterable[Path]) -> Iterator[None]:
    """Refuse files that change while the block runs; what is not there before it is the block's to find.

    Raises:
        DataError: names the file.
    """
    before = {path: _state(path) for path in paths}
    yield
    for path, state in before.items():
        if state is not None and _state(path) != state:
            raise DataError(
                f"{path}: changed while it was read ({state[0]:,} bytes then), so its rows may be of two files. Start "
                "again when nothing writes it"
            )


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino

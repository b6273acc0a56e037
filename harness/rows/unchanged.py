"""Sees that files are not written while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.errors import DataError

FileState = tuple[int, int, int]


def file_states(paths: Iterable[Path]) -> dict[Path, FileState]:
    """Return what tells later whether a file was written since; what is not there is left to whoever reads it."""
    return {path: _state(path) for path in paths if path.exists()}


def check_unchanged(before: Mapping[Path, FileState]) -> None:
    """Refuse what was read of files of which one is no longer as it was.

    Raises:
        DataError: names the file.
    """
    for path, state in before.items():
        if not path.exists() or _state(path) != state:
            raise DataError(
                f"{path}: changed while it was read ({state[0]:,} bytes before), so its rows may be of two files. "
                "Start again when nothing writes it"
            )


def _state(path: Path) -> FileState:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino

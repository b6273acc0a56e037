"""Files and connections that a Dataset holds open: processes that are forked would share them, and where they stand."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DESCRIPTORS, _MAPS = Path("/proc/self/fd"), Path("/proc/self/maps")


class OpenFiles:
    """What was opened while a Dataset's code ran, and not closed."""

    def __init__(self) -> None:
        self._found: set[tuple[int, str]] = set()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Take note of what is opened meanwhile."""
        before = _open_now()
        try:
            yield
        finally:
            self._found |= _open_now() - before

    def names(self) -> list[str]:
        """Return the paths of the files, and `socket:[N]` of connections, that are open still.

        A file that is mapped into memory is none of them: nothing in it moves when it is read.
        """
        still = {path for _, path in self._found & _open_now()}
        if not still:
            return []
        mapped = {
            fields[5].strip() for line in _MAPS.read_text().splitlines() if len(fields := line.split(None, 5)) > 5
        }
        return sorted(still - mapped)


def _open_now() -> set[tuple[int, str]]:
    """Return descriptor and path of each open file and connection; nothing where there is no /proc."""
    found = set()
    for name in os.listdir(_DESCRIPTORS) if _DESCRIPTORS.exists() else ():
        with suppress(OSError):  # the descriptor of this very listing
            mode = os.stat(_DESCRIPTORS / name).st_mode
            if stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
                found.add((int(name), os.readlink(_DESCRIPTORS / name)))
    return found

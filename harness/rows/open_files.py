"""What a Dataset holds that a fork does not copy: open files and connections, which would be shared, and threads."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

_DESCRIPTORS, _MAPS = Path("/proc/self/fd"), Path("/proc/self/maps")


class OpenFiles:
    """What was opened while a Dataset's code ran and not closed, and which threads it has started."""

    def __init__(self) -> None:
        self._found: set[tuple[int, str]] = set()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Take note of what is opened meanwhile."""
        before, threads = _open_now(), set(threading.enumerate())
        try:
            yield
        finally:
            self._found |= _open_now() - before
            self._threads |= set(filter(_is_waited_for, set(threading.enumerate()) - threads))

    def names(self) -> list[str]:
        """Return what is open or alive still: paths, `socket:[N]` of connections, `pipe:[N]` and `thread NAME`.

        A file that is mapped into memory is none of them: nothing in it moves when it is read.
        """
        still = {path for _, path in self._found & _open_now()}
        still |= {f"thread {thread.name}" for thread in set(self._threads) & set(threading.enumerate())}
        if not still:
            return []
        mapped = {
            fields[5].strip() for line in _MAPS.read_text().splitlines() if len(fields := line.split(None, 5)) > 5
        }
        return sorted(still - mapped)


def _is_waited_for(thread: threading.Thread) -> bool:
    """Return whether a Dataset may wait for a thread; it does not for the one that refreshes bars of progress."""
    return not type(thread).__module__.startswith("tqdm.")


def _open_now() -> set[tuple[int, str]]:
    """Return descriptor and path of each open file, pipe and connection; nothing where there is no /proc."""
    found = set()
    trackers = resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]  # multiprocessing's; may be shared
    for name in os.listdir(_DESCRIPTORS) if _DESCRIPTORS.exists() else ():
        with suppress(OSError):  # the descriptor of this very listing
            mode = os.stat(_DESCRIPTORS / name).st_mode
            if (stat.S_ISREG(mode) or stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)) and int(name) != trackers:
                found.add((int(name), os.readlink(_DESCRIPTORS / name)))
    return found

"""All processes that come from this one, also those whose parent has died: their CPU seconds, and which are left."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_TOKEN = "HARNESS_TESTS_OF"
_LOOK_EVERY_SECONDS = 1.0


class Process(NamedTuple):
    """A process; a pid alone is given away again."""

    pid: int
    started_at_tick: int


class _Row(NamedTuple):
    parent: int
    cpu_seconds: float  # its own, and of the children that it has reaped


class Descendants:
    """Those of this process. A look finds them by their parents, or by a variable that they have inherited.

    What a reaped process has used, its parent has: killed ones count as well. Of one whose parent had died, the end is
    nobody's: it counts as of the last look, of which a thread takes one each second.
    """

    def __init__(self) -> None:
        os.environ[_TOKEN] = str(os.getpid())
        self._mark = f"{_TOKEN}={os.getpid()}".encode()
        self._is_marked: dict[Process, bool] = {}
        self._known: set[Process] = set()
        self._orphans: dict[Process, float] = {}
        self._of_ended_orphans = 0.0
        self._lock = threading.Lock()
        threading.Thread(target=self._look_on, daemon=True).start()

    def cpu_seconds(self) -> float:
        """Return what this process and all its descendants, living and ended, have used by now.

        The fork server's own are left out: it imports once, for whichever file is the first.
        """
        with self._lock:
            used = sum(row.cpu_seconds for row in self._look().values()) + self._of_ended_orphans
        return used - own_cpu_seconds(fork_server())

    def living(self) -> set[Process]:
        """Return the descendants that have not ended."""
        with self._lock:
            return {process for process in self._look() if process.pid != os.getpid() and not has_ended(process)}

    def _look_on(self) -> None:
        while True:
            time.sleep(_LOOK_EVERY_SECONDS)
            self.cpu_seconds()

    def _look(self) -> dict[Process, _Row]:
        rows = dict(filter(None, map(_read, os.listdir("/proc"))))
        self._is_marked = {
            process: self._is_marked[process] if process in self._is_marked else self._look_for_mark(process)
            for process in rows
        }
        family = {
            process
            for process in rows
            if process.pid == os.getpid() or process in self._known or self._is_marked[process]
        }
        pids, grows = {process.pid for process in family}, True
        while grows:
            children = {process for process, row in rows.items() if row.parent in pids} - family
            family |= children
            pids |= {process.pid for process in children}
            grows = bool(children)
        self._of_ended_orphans += sum(used for process, used in self._orphans.items() if process not in family)
        self._orphans = {
            process: rows[process].cpu_seconds
            for process in family
            if rows[process].parent not in pids and process.pid != os.getpid()
        }
        self._known = family
        return {process: rows[process] for process in family}

    def _look_for_mark(self, process: Process) -> bool:
        try:
            return self._mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False  # somebody else's, or it has just ended


def fork_server() -> int | None:
    """Return the pid of multiprocessing's fork server, if it runs."""
    pid: int | None = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def own_cpu_seconds(pid: int | None) -> float:
    """Return what a process has used itself, without its children; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def _read(pid: str) -> tuple[Process, _Row] | None:
    if not pid.isdigit():
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None  # it has just ended
    fields = stat[stat.rindex(b")") + 2 :].split()  # from the third of proc(5) on
    ticks = sum(map(int, fields[11:15]))  # utime stime cutime cstime
    return Process(int(pid), int(fields[19])), _Row(int(fields[1]), ticks / _TICKS_PER_SECOND)


def has_ended(process: Process) -> bool:
    """Whether a process is gone, or waits only to be reaped."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return True
    return fields[0] in (b"Z", b"X") or int(fields[19]) != process.started_at_tick


def command_of(process: Process) -> str:
    """Return the command line of a process, for a message."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(it has just ended)"

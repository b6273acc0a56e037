"""Tie processes to the life of their parents (Linux), so that nothing trains on after its launcher has died, and to
the packages of those who start them."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import MutableMapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_PACKAGES = Path(__file__).parents[2]
CHECKOUT = None if _PACKAGES.name in ("site-packages", "dist-packages") else _PACKAGES
"""The folder of this very package, where Python would not find it by itself."""


def pin_packages(environment: MutableMapping[str, str]) -> None:
    """Have `python -m harness.train`, wherever it is started, be of this package and no other."""
    environment["PYTHONSAFEPATH"] = "1"  # the working directory is not where modules are looked for
    if CHECKOUT:
        others = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, [str(CHECKOUT), *others])))


def die_with_parent(*, signal_number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process `signal_number` when its parent dies.

    It survives exec and is not inherited by children. A parent that dies during this call counts as well. To the
    kernel the parent is the thread that started this process.

    Args:
        parent: the process that is to be it; a parent that is another one has died before.
    """
    parent = parent or os.getppid()
    _prctl(PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal_number)


def adopt_orphans() -> None:
    """Become the parent, in the place of process 1, of every descendant whose own parent dies."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def pending_signals(pid: int) -> set[int]:
    """Return the signals that a process was sent and blocks; none where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return set()
    masks = [int(line.split()[1], base=16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return {number + 1 for mask in masks for number in range(64) if mask >> number & 1}


def let_go_of_frames(error: BaseException) -> None:
    """Empty the frames that an error and those that it came from hold, so that what was built there is deleted now.

    Otherwise DDP's reducer lives until the error is handled, after the process group was left. Deleted then, it deletes
    the group while it holds Python's lock, and now and then waits for ever for a thread of gloo that wants the lock.
    """
    errors: list[BaseException | None] = [error]
    seen = set()
    while errors:
        found = errors.pop()
        if found is not None and id(found) not in seen:  # `raise a from b` where b came from a
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            errors += [found.__cause__, found.__context__]


def shell_code(exit_code: int) -> int:
    """Return the code a shell shows: a signal, negative here, becomes 128 plus its number."""
    return exit_code if exit_code >= 0 else 128 - exit_code


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        raise OSError(f"prctl({option}, {value}) failed")

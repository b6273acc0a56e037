"""`python -m tests.mutants.guard SECONDS FOLDER COMMAND...`: runs a command that leaves no process, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

from harness.launch.torchrun import _kill_leftovers
from harness.ranks.process import adopt_orphans, die_with_parent

RAN_OUT = 124
"""The exit code where the time was over, as of timeout(1)."""


def main(arguments: list[str]) -> int:
    """Return the exit code of the command."""
    seconds, folder, *command = arguments
    adopt_orphans()
    signal.signal(signal.SIGTERM, _end)
    die_with_parent(signal_number=signal.SIGTERM)
    try:
        return subprocess.Popen(command, cwd=folder).wait(float(seconds))
    except subprocess.TimeoutExpired:
        return RAN_OUT
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_leftovers(frozenset(), grace_seconds=0)
        _reap()


def _reap() -> None:
    """Take the exit codes of those that were killed: nobody else would."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            continue
    except ChildProcessError:
        return


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

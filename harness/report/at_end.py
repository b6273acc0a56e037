"""Draws the report of a run that has just ended: rank zero does it, or who started a rank zero that was killed."""

import subprocess
import sys
from pathlib import Path

TIMEOUT_SECONDS = 60.0
"""How long the ranks' machine is held for a drawing at most; of an ordinary run it takes a second or two."""


def write_report(directory: Path) -> None:
    """Write report.html into a run directory; that it could not be drawn is told, and is no failure of the run.

    In a process of its own: what a library does there cannot change how the run ended. And in a session of its own:
    when a run fails, torchrun sends SIGTERM to every rank's process group as soon as the first rank is gone.
    """
    command = [sys.executable, "-m", "harness.report", str(directory)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            start_new_session=True,
            check=False,
        )
        problem = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        print(f"the report was not drawn ({problem}); try: harness report {directory}", file=sys.stderr, flush=True)

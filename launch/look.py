"""What `harness check` says of the data of a good configuration, by a process that may read tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

from harness.config.run_config import RunConfig

LOOK_MODULE = "harness.config.look"
LOOK_SECONDS = 2.0


def look_at_data(config: RunConfig, *, seconds: float = LOOK_SECONDS) -> int:
    """Print what is found and what was not looked at, and return the exit code: 0, or that of a run that refuses it."""
    if not config.data.is_ours:  # whose code is not run for a look
        return _say(config.data.look(config.task))
    command, given = [sys.executable, "-m", LOOK_MODULE], config.model_dump_json().encode()
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        rest = f"the rest was not looked at, since it takes more than {seconds:g} s here"
        return _say([*(error.stdout or b"").decode().splitlines(), rest])
    print(done.stderr.decode(), end="", file=sys.stderr)
    return _say(done.stdout.decode().splitlines(), done.returncode)


def _say(lines: Iterable[str], code: int = 0) -> int:
    for line in lines:
        print(f"{'looked at':11}{line}")
    return code

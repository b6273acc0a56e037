"""Checks that stand in for real ones in the tests of the runner. Imports no torch."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any


def answer() -> dict[str, Any]:
    return {"answer": 42, "share": 0.12345}


def complain() -> dict[str, Any]:
    raise AssertionError("three is not\nfour")


def hang_with_a_child() -> dict[str, Any]:
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["PLACE_OF_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return {}


def leave_a_child() -> dict[str, Any]:
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["PLACE_OF_PIDS"]).write_text(f"{child.pid}")
    return {}


def crash() -> dict[str, Any]:
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def crash_at_the_end() -> dict[str, Any]:
    atexit.register(os.kill, os.getpid(), signal.SIGABRT)
    return {}

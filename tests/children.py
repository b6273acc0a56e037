"""Processes of a test's own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


def start_python(script: str, *, stdout: Any = subprocess.PIPE) -> "subprocess.Popen[str]":
    """Start a script in the repository's root, with a pipe for each of its three streams, but for another stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )

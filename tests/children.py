"""Processes of a test's own."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def start_python(script: str) -> "subprocess.Popen[str]":
    """Start a script in the repository's root, with a pipe for each of its three streams."""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )

"""What a test must leave as it found it, for the tests that run after it and beside it."""

from __future__ import annotations

import multiprocessing.resource_tracker
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.descendants import Descendants, Process, command_of, fork_server, has_ended

REPOSITORY = Path(__file__).parents[1]
_SECONDS_TO_END = 10.0


def surroundings() -> dict[str, Any]:
    """What of this process and of the disk a test must not change; each value can be compared."""
    folders = {Path.cwd(), REPOSITORY, Path(tempfile.gettempdir())}
    return {
        "working directory": Path.cwd(),
        **{f"environment variable {k}": v for k, v in os.environ.items() if k not in _NOT_OF_A_TEST},
        **{f"files in {folder}": sorted(set(os.listdir(folder)) - _IGNORED) for folder in folders},
        "umask": _umask(),
        "signal handlers": {int(number): signal.getsignal(number) for number in signal.valid_signals()},
        "sys.path": list(sys.path),
        **_of_torch(),
    }


def _of_torch() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "default dtype of torch": torch.get_default_dtype(),
        "threads of torch": torch.get_num_threads(),
        "determinism of torch": torch.are_deterministic_algorithms_enabled(),
    }


_NOT_OF_A_TEST = {"PYTEST_CURRENT_TEST", "PYTORCH_NVML_BASED_CUDA_CHECK", "HF_HUB_OFFLINE"}
"""Variables of pytest, and those that an import sets: of deepspeed, of harness.catalogue.pretrained.network."""
_IGNORED = {".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", ".venv"}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a sentence for each thing that is not as it was."""
    return [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def processes_left(descendants: Descendants, before: set[Process]) -> list[str]:
    """End the processes that have come since `before`, and return the command of each that did not end by itself."""
    helpers = {fork_server(), multiprocessing.resource_tracker._resource_tracker._pid}  # type: ignore[attr-defined]
    give_up = time.monotonic() + _SECONDS_TO_END
    while left := {process for process in descendants.living() - before if process.pid not in helpers}:
        if time.monotonic() > give_up:
            break
        time.sleep(0.1)
    commands = [f"{process.pid}: {command_of(process)}" for process in sorted(left)]
    for process in left:
        if not has_ended(process):
            os.kill(process.pid, signal.SIGKILL)
    return commands


def _umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found

"""How far wandb has got with a run, as its files and its server tell it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.errors import TrackingError
from harness.tracking.points import STEP

SECONDS_UNTIL_COUNTED = 5.0
"""How long a server may take to count what it has been sent."""
MORE = "wandb's own warnings say more, beside a run in tracking-wandb.log; harness track sync sends what is missing"


def last_step_on_disk(folder: Path, run_id: str) -> int:
    """Return the last step in what earlier processes have written of a run, 0 if there is none."""
    segments = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    # The folder of a segment is [offline-]run-DATE_TIME-ID; the newest comes first.
    for path in sorted(segments, key=lambda path: path.parent.name.removeprefix("offline-"), reverse=True):
        read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        records = subprocess.run(read, capture_output=True, check=False).stdout.splitlines()
        for record in reversed(records):
            if b'"history"' in record and (found := json.loads(record)).get("type") == "history":
                return int(found["history"]["item"][STEP])
    return 0


def loss_at(step: int, summary: Mapping[str, Any]) -> float | None:
    """Return the loss of a step that a server has, if what it says of a run is of that step."""
    loss = summary.get("train/loss")
    return float(loss) if summary.get(STEP) == step and isinstance(loss, int | float) else None


def last_step_at_server(wandb: ModuleType, path: str) -> int:
    """Return the last step that wandb's server has of a run.

    Raises:
        TrackingError: it does not say.
    """
    try:
        return int(wandb.Api(timeout=10).run(path).lastHistoryStep)
    except (wandb.Error, ValueError, OSError) as error:
        raise TrackingError(f"wandb does not say what it has: {error}") from error


def what_is_missing(wandb: ModuleType, path: str, *, of: int) -> str:
    """Return a sentence about rows that the server does not have after a while, or nothing if it has the last one.

    Args:
        path: of the run at its server.
        of: the last step that was sent.
    """
    end = time.monotonic() + SECONDS_UNTIL_COUNTED
    try:
        while (found := last_step_at_server(wandb, path)) < of:
            if time.monotonic() > end:
                return f"wandb: its server has the rows up to step {max(0, found):,} of {of:,} only; {MORE}"
            time.sleep(0.5)
    except TrackingError as error:
        return f"wandb: whether its server has every row is not known ({error.args[0]}); {MORE}"
    return ""

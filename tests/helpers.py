"""What several test files do in the same words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.observers.ledger import MEASURED, read_lines
from tests.neighbours import REPOSITORY


def wait_until(is_so: Callable[[], object], what: str, *, seconds: float = 60) -> None:
    """Wait for something, and say what was waited for if it does not come."""
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.05)


def write_config(path: Path, defaults: dict[str, Any], /, **sections: Any) -> Path:
    """Write a config: the sections of `defaults`, and in their place those that are given.

    Args:
        path: of the file. YAML reads JSON.
    """
    path.write_text(json.dumps({**defaults, **sections}))
    return path


def write_small_table(folder: Path, *, name: str, **sections: Any) -> Path:
    """Write 80 rows of two numbers, the second of which decides the class, and the config of a net that learns them.

    Args:
        name: of the run and of the config.
        sections: of the config, in the place of the usual ones.
    """
    rows = [f"{index},{index % 7},{int(index % 7 > 3)}" for index in range(80)]
    (folder / "rows.csv").write_text("\n".join(["a,b,y", *rows]))
    values = {
        "run": {"name": name, "max_epochs": 2},
        "model": {"kind": "mlp", "hidden": [8]},
        "data": {"source": "csv", "path": "rows.csv", "targets": ["y"], "validation_fraction": 0.25, "global_batch": 8},
        "task": {"kind": "classification", "num_classes": 2},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
    }
    return write_config(folder / f"{name}.yaml", values, **sections)


def plain_ledger(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger without what is measured: all that two equal runs share."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_lines(path)]


def tracked(*folders: str) -> list[str]:
    """Return the files that git has, below these folders."""
    command = ["git", "ls-files", "-z", *folders]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout
    return [os.fsdecode(name) for name in listed.split(b"\0") if name]


def copy_tracked(to: Path) -> Path:
    """Copy what git has, as it is in this checkout now; return the new folder."""
    for name in tracked():
        if (REPOSITORY / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, to / name, follow_symlinks=False)
    return to

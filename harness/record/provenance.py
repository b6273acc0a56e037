"""Where a run comes from: its code's commit, its job, its versions. What cannot be found out is left out."""

import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import __version__
from harness.ranks.process import CHECKOUT

SLURM = {
    "job_id": "SLURM_JOB_ID",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "job_name": "SLURM_JOB_NAME",
    "partition": "SLURM_JOB_PARTITION",
    "nodes": "SLURM_JOB_NODELIST",
    "restarts": "SLURM_RESTART_COUNT",
}
GIT_SECONDS = 5.0
PACKAGES = ("torch", "numpy", "accelerate", "deepspeed", "datasets", "transformers", "wandb")


def git_state(folder: Path | None = CHECKOUT) -> dict[str, Any] | None:
    """Return the commit that a folder has checked out and whether tracked files differ; None outside a repository.

    Args:
        folder: this code's; None where it was installed, perhaps inside of somebody's repository.
    """
    if folder is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "is_dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here, or a repository on a slow disk
    return done.stdout.strip() if done.returncode == 0 else None


def slurm_job(environment: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """Return the ids of the Slurm job that this process is part of; None outside one."""
    found = {name: environment[variable] for name, variable in SLURM.items() if variable in environment}
    return found or None


def versions() -> dict[str, str]:
    """Return the versions of this package and of those of `PACKAGES` that are installed."""
    found = {"harness": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional one
    return found

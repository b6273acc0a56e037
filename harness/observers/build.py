"""Which trackers a configuration wants, by name."""

from harness.config.tracking import Tracking, wandb_settings
from harness.observers.sidecar import Sidecar
from harness.observers.tensorboard import TensorBoardTracker
from harness.observers.tracker import TrackedRun, Tracker
from harness.observers.wandb import WandbTracker
from harness.run_directory import RunDirectory

TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (WandbTracker, TensorBoardTracker)}


def start_trackers(tracking: Tracking, directory: RunDirectory) -> list[Sidecar]:
    """Start a process for each tracker that a configuration wants; none of them is waited for."""
    sidecars = []
    if wandb := wandb_settings(tracking):
        timeout = wandb.start_timeout_seconds if wandb.mode == "online" else None
        sidecars.append(_sidecar("wandb", directory, start_timeout_seconds=timeout))
    if tracking.tensorboard:
        sidecars.append(_sidecar("tensorboard", directory, start_timeout_seconds=None))
    return sidecars


def _sidecar(name: str, directory: RunDirectory, *, start_timeout_seconds: float | None) -> Sidecar:
    path = directory.path
    return Sidecar(name, path, links=TRACKERS[name].links(path), start_timeout_seconds=start_timeout_seconds)


def build_tracker(name: str, run: TrackedRun) -> Tracker:
    """Return the tracker of that name for a run, not yet opened."""
    return TRACKERS[name](run)

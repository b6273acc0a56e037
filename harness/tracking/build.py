"""Which trackers a configuration wants, by name."""

import os
import sys
from collections.abc import Sequence
from pkgutil import resolve_name

from harness.config.tracking import Tracking, wandb_settings
from harness.errors import ConfigError
from harness.parts import registered
from harness.record.run_directory import RunDirectory
from harness.tracking.sidecar import Sidecar
from harness.tracking.tensorboard import TensorBoardTracker
from harness.tracking.tracker import TrackedRun, Tracker
from harness.tracking.wandb import WandbTracker

TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (WandbTracker, TensorBoardTracker)}


def start_trackers(tracking: Tracking, directory: RunDirectory, *, use: Sequence[str] = ()) -> list[Sidecar]:
    """Start a process for each tracker that a configuration wants; none of them is waited for.

    Args:
        use: what the configuration brings, for the process of a tracker that it registers.
    """
    sidecars = []
    if wandb := wandb_settings(tracking):
        timeout = wandb.start_timeout_seconds if wandb.mode == "online" else None
        sidecars.append(_sidecar("wandb", directory, start_timeout_seconds=timeout))
    if tracking.tensorboard:
        sidecars.append(_sidecar("tensorboard", directory, start_timeout_seconds=None))
    for name in tracking.own:
        brings = () if "." in name else use
        sidecars.append(_sidecar(name, directory, start_timeout_seconds=None, use=brings))
    return sidecars


def _sidecar(
    name: str, directory: RunDirectory, *, start_timeout_seconds: float | None, use: Sequence[str] = ()
) -> Sidecar:
    path = directory.path
    links = TRACKERS[name].links(path) if name in TRACKERS else ()  # a stranger's code stays in its own process
    return Sidecar(name, path, links=links, start_timeout_seconds=start_timeout_seconds, use=use)


def build_tracker(name: str, run: TrackedRun) -> Tracker:
    """Return the tracker of that name for a run, not yet opened.

    Raises:
        ConfigError: it is none of ours, and no tracker can be imported by that name.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where nothing of ours is looked for (`pin_packages`)
    try:
        own = registered().of("tracker").get(name)
        tracker = TRACKERS.get(name) or (own.section if own else resolve_name(name))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"tracking.own: {name} cannot be imported ({error})") from error
    if not (isinstance(tracker, type) and issubclass(tracker, Tracker)):
        raise ConfigError(f"tracking.own: {name} is no subclass of harness.tracking.tracker.Tracker")
    return tracker(run)

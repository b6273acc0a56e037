"""The launcher's environment, read in one place: which rank this process is, and of how many. Never imports torch."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Placement:
    """This process among the ranks of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    under_torchrun: bool = False
    restart: int = 0
    """How often Slurm has started this job again."""
    attempt: int = 0
    """How often torchrun has started these ranks again."""
    log_file: Path | None = None
    """Where this rank's output goes; None leaves it as it is."""
    end_time: float | None = None
    """When the job will be ended, in seconds since 1970."""

    def command(self, config: str, overrides: Sequence[str]) -> str:
        """Return what a person types to start a run again as this process was started."""
        is_alone = self.world_size == 1 and not self.under_torchrun
        ranks = [] if is_alone else ["--gpus", str(self.world_size)]
        return shlex.join(["harness", "train" if is_alone else "launch", config, *ranks, *overrides])


def placement(environment: Mapping[str, str] = os.environ) -> Placement:
    """Read what torchrun (or any launcher that speaks its variables) says of this process.

    Raises:
        ConfigError: some of the variables are missing or are not numbers that fit together.
    """
    rank, world_size, local_rank = _ranks(environment)
    end_time = environment.get("HARNESS_END_TIME")
    return Placement(
        rank,
        world_size,
        local_rank,
        under_torchrun="TORCHELASTIC_RUN_ID" in environment,
        restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0),
        log_file=log_file(rank, environment),
        end_time=float(end_time) if end_time else None,
    )


def log_file(rank: int, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return where the output of a rank goes; None if it stays with whoever launched it, or there is no launcher."""
    folder = environment.get("HARNESS_LOG_DIRECTORY")
    if folder is None or environment.get("HARNESS_TERMINAL_RANK") == str(rank):
        return None
    return Path(folder) / f"rank-{rank}.log"


def _ranks(environment: Mapping[str, str]) -> tuple[int, int, int]:
    found = {name: environment[name] for name in _NAMES if name in environment}
    if not found:
        return 0, 1, 0
    shown = ", ".join(f"{name}={environment.get(name, '(unset)')}" for name in _NAMES)
    if len(found) < len(_NAMES) or not all(value.isdecimal() for value in found.values()):
        raise ConfigError(f"the launcher's environment is incomplete: {shown}; start with torchrun, or unset them all")
    rank, world_size, local_rank = (int(found[name]) for name in _NAMES)
    if not (rank < world_size and local_rank <= rank):
        raise ConfigError(f"the launcher's environment contradicts itself: {shown}; start with torchrun")
    return rank, world_size, local_rank

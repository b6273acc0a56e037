"""The launcher's environment, read in one place: which rank this process is, and of how many. Never imports torch."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Placement:
    """This process among the ranks of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    under_torchrun: bool = False

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
    found = {name: environment[name] for name in _NAMES if name in environment}
    if not found:
        return Placement()
    shown = ", ".join(f"{name}={environment.get(name, '(unset)')}" for name in _NAMES)
    if len(found) < len(_NAMES) or not all(value.isdecimal() for value in found.values()):
        raise ConfigError(f"the launcher's environment is incomplete: {shown}; start with torchrun, or unset them all")
    rank, world_size, local_rank = (int(found[name]) for name in _NAMES)
    if not (rank < world_size and local_rank <= rank):
        raise ConfigError(f"the launcher's environment contradicts itself: {shown}; start with torchrun")
    return Placement(rank, world_size, local_rank, under_torchrun="TORCHELASTIC_RUN_ID" in environment)

"""What a launch consists of, on this machine or on the nodes of a Slurm job."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError
from harness.ranks.visible_gpus import count_gpus

DEFAULT_CPU_RANKS = 2


@dataclass(frozen=True)
class Machine:
    """What there is to launch on."""

    num_gpus: int
    num_cores: int
    variables: frozenset[str] = frozenset()
    """Names of the environment variables that are set."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the agents of a launch meet."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: torchrun takes a free port itself, so that no other process can take it in between."""
    id: str | None = None
    """Agents with another one are sent away, such as those of the attempt before."""


@dataclass(frozen=True)
class LaunchPlan:
    """One launch: how many ranks of which command, with what around them; each number is said here and nowhere else."""

    command: tuple[str, ...]
    """The module each rank runs, and its arguments."""
    run_directory: Path
    ranks_per_node: int
    threads_per_rank: int
    nodes: int = 1
    rendezvous: Rendezvous = Rendezvous()
    local_address: str | None = "127.0.0.1"
    """At which the other ranks find those of this node; None is what its host name stands for."""
    max_restarts: int = 0
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that are added."""
    dropped_variables: tuple[str, ...] = ()
    """Variables that are taken away, because torchrun would read options from them."""
    agent: str = "harness.ranks.agent"
    """The module that takes torchrun's options and starts the ranks."""


def this_machine() -> Machine:
    """Look at the GPUs, cores and environment of this machine, without torch."""
    return Machine(
        num_gpus=count_gpus(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        variables=frozenset(os.environ),
    )


def choose_ranks(gpus: int | None, machine: Machine) -> int:
    """Return one rank for each of `gpus` GPUs, or `gpus` CPU ranks where there is no GPU; None is what fits."""
    if gpus is not None and machine.num_gpus and gpus > machine.num_gpus:
        raise ConfigError(
            f"--gpus {gpus}: this machine has {machine.num_gpus} visible to CUDA; "
            f"use --gpus {machine.num_gpus} or less, or look at nvidia-smi -L and CUDA_VISIBLE_DEVICES"
        )
    return gpus or machine.num_gpus or DEFAULT_CPU_RANKS


def launch_plan(
    command: Sequence[str], *, run_directory: Path, ranks: int, machine: Machine, max_restarts: int = 0
) -> LaunchPlan:
    """Return the plan to run `command`, a module and its arguments, in `ranks` processes on `machine`."""
    threads_per_rank = max(1, machine.num_cores // ranks)
    threads = () if "OMP_NUM_THREADS" in machine.variables else (("OMP_NUM_THREADS", str(threads_per_rank)),)
    # Rank zero speaks in the terminal, the others in files.
    logs = (("HARNESS_LOG_DIRECTORY", os.path.abspath(run_directory / "logs")), ("HARNESS_TERMINAL_RANK", "0"))
    return LaunchPlan(
        command=tuple(command),
        run_directory=run_directory,
        ranks_per_node=ranks,
        threads_per_rank=threads_per_rank,
        max_restarts=max_restarts,
        environment=(*threads, *logs),
        dropped_variables=tuple(
            sorted(name for name in machine.variables if name.startswith("PET_") or name == "PYTHON_EXEC")
        ),
    )


def child_environment(plan: LaunchPlan) -> dict[str, str]:
    """Return this process's environment with the changes of the plan."""
    kept = {name: value for name, value in os.environ.items() if name not in plan.dropped_variables}
    return kept | dict(plan.environment)

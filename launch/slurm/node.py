"""One task of a Slurm step: `python -m harness.launch.slurm.node --style STYLE --ranks-per-node N -- MODULE CONFIG`.

It becomes the agent that starts this node's ranks, or (style srun) the one rank of this task. Signals for the ranks are
blocked until a rank can take them, so that none is lost and none kills the agent, which has no use for them.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import ConfigError, HarnessError
from harness.launch.plan import LaunchPlan, Rendezvous
from harness.launch.slurm.network import address_of
from harness.launch.slurm.preflight import (
    EXIT_BAD_NODE,
    PREFLIGHT_FAILED,
    ROLL_CALL_MODULE,
    USED_FILES,
    bad_node_file,
    node_name,
    node_problems,
    used_file_problems,
)
from harness.launch.torchrun import torchrun_command

SIGNALS_FOR_RANKS = (signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Become the agent or the rank; return only if that cannot be."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        parser = argparse.ArgumentParser(
            prog="python -m harness.launch.slurm.node", description=__doc__, allow_abbrev=False
        )
        parser.add_argument("--style", choices=("torchrun", "srun"), required=True)
        parser.add_argument("--ranks-per-node", type=int, required=True)
        split = list(arguments).index("--")
        options, command = parser.parse_args(arguments[:split]), tuple(arguments[split + 1 :])
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_FOR_RANKS)
        logs = Path(_read(os.environ, "HARNESS_LOG_DIRECTORY"))
        if os.environ.get("SLURM_LOCALID") == "0" and not (is_fit(logs, command) and all_answer(logs)):
            (logs / PREFLIGHT_FAILED).touch()
            return EXIT_BAD_NODE
        if options.style == "srun":
            os.execve(sys.executable, [sys.executable, "-m", *command], rank_environment(os.environ))
        argv = torchrun_command(node_plan(command, os.environ, ranks_per_node=options.ranks_per_node))
        os.execv(argv[0], argv)
    except HarnessError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code


def is_fit(logs: Path, command: Sequence[str] = ()) -> bool:
    """Look at this node; write and say what is wrong with it."""
    problems = list(node_problems(logs, os.environ))
    problems += used_file_problems(Path(command[1]).with_name(USED_FILES)) if len(command) > 1 else []
    if problems:
        _name(node_name(os.environ), "; ".join(problems), logs)
    return not problems


def all_answer(logs: Path) -> bool:
    """Add up numbers with the other nodes; write and say which of them did not answer, as far as this one is to say."""
    nodes = _read(os.environ, "HARNESS_NODES").split()
    if len(nodes) == 1:
        return True
    place = [
        node_name(os.environ),
        _read(os.environ, "HARNESS_ROLL_CALL"),
        _read(os.environ, "HARNESS_ROLL_CALL_SECONDS"),
    ]
    command = [sys.executable, "-m", ROLL_CALL_MODULE, *place, *nodes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        name, _, reason = line.partition(": ")
        if name in nodes:
            _name(name, reason, logs)
    return done.returncode == 0


def _name(node: str, reason: str, logs: Path) -> None:
    print(f"node {node} cannot train: {reason}", file=sys.stderr, flush=True)
    bad_node_file(logs, node).write_text(reason)


def node_plan(command: Sequence[str], environment: Mapping[str, str], *, ranks_per_node: int) -> LaunchPlan:
    """Return the part of a job's plan that is one node's."""
    interface = environment.get("HARNESS_INTERFACE")
    return LaunchPlan(
        command=tuple(command),
        run_directory=Path(_read(environment, "HARNESS_LOG_DIRECTORY")),
        ranks_per_node=ranks_per_node,
        threads_per_rank=int(environment.get("OMP_NUM_THREADS") or 1),
        nodes=int(_read(environment, "SLURM_STEP_NUM_NODES")),
        rendezvous=Rendezvous(
            host=_read(environment, "MASTER_ADDR"),
            port=int(_read(environment, "MASTER_PORT")),
            id=_read(environment, "HARNESS_RENDEZVOUS_ID"),
        ),
        local_address=address_of(interface) if interface else None,
    )


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a rank that is a Slurm task of its own."""
    return {
        **environment,
        "RANK": _read(environment, "SLURM_PROCID"),
        "WORLD_SIZE": _read(environment, "SLURM_STEP_NUM_TASKS"),
        "LOCAL_RANK": _read(environment, "SLURM_LOCALID"),
    }


def _read(environment: Mapping[str, str], name: str) -> str:
    try:
        return environment[name]
    except KeyError:
        raise ConfigError(f"{name} is not set: this is to be started by the script of harness submit") from None


if __name__ == "__main__":
    sys.exit(main())

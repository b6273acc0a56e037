"""What a job knows of itself, of Slurm and of its run. Needs nothing but the standard library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from harness.errors import ConfigError
from harness.launch.slurm.client import ask_patiently, ask_slurm, field

TASK = "@TASK@"
"""In a path, the folder of a task of an array."""


@dataclass(frozen=True)
class Job:
    """This attempt at a Slurm job, by its environment."""

    number: int
    """The job's own, also of a task of an array."""
    name: str
    """What Slurm's programs take: by its bare number, the last task of an array would stand for the whole array."""
    restart: int
    nodes: str
    task: int | None = None
    """Of an array."""


@dataclass(frozen=True)
class Outlook:
    """What Slurm says of a job that runs."""

    state: str
    """UNKNOWN where the controller did not answer, however often it was asked."""
    end_time: float | None
    """Seconds since 1970."""
    is_preempted: bool
    partition: str | None = None


def job_of(environment: Mapping[str, str]) -> Job:
    """Return the job that this process runs in.

    Raises:
        ConfigError: it runs in none.
    """
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if not environment.get(name)]
    if missing:
        raise ConfigError(f"this is not a Slurm job ({', '.join(missing)} is not set): start it with harness submit")
    number, nodes = int(environment["SLURM_JOB_ID"]), environment["SLURM_JOB_NODELIST"]
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    restart = int(environment.get("SLURM_RESTART_COUNT") or 0)
    name = f"{array}_{task}" if array else str(number)
    return Job(number, name, restart, nodes, int(task) if task is not None else None)


def own_run(text: str, task: int) -> str:
    """Return a path, or a list of some, with the folder of an array's task in the place of TASK."""
    return text.replace(TASK, f"{task:03d}")


def check_plan(expected: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Refuse a job that is not the one of the plan, such as one submitted with sbatch --nodes.

    Raises:
        ConfigError: one sentence.
    """
    found = {name: environment.get(name) for name in expected}
    different = [
        f"{name} is {found[name] or 'not set'}, the plan has {expected[name]}"
        for name in expected
        if found[name] != expected[name]
    ]
    if different:
        raise ConfigError(
            f"the job is not the one of the plan: {'; '.join(different)}. Set it in the cluster file (or with harness "
            "submit --nodes, --gpus), and give sbatch no options of its own"
        )


def look(job: Job, *, cancelled: Sequence[int] = ()) -> Outlook:
    """Ask Slurm about this job, until it answers or the job is cancelled."""
    return outlook(ask_patiently("scontrol", "show", "job", "--oneliner", job.name, cancelled=cancelled).stdout)


def comes_back_by_itself(partition: str | None) -> bool:
    """Whether Slurm queues a job of this partition again that it has preempted, or else just ends it."""
    text = ask_patiently("scontrol", "show", "partition", "--oneliner", partition or "").stdout
    return "CANCEL" not in (field(text, "PreemptMode") or "").upper()


def outlook(text: str) -> Outlook:
    """Return what `scontrol show job` says."""
    end = field(text, "EndTime")
    end_time = datetime.fromisoformat(end).timestamp() if end else None
    state, is_preempted = field(text, "JobState") or "UNKNOWN", field(text, "PreemptTime") is not None
    return Outlook(state, end_time, is_preempted, field(text, "Partition"))


def lost_nodes(job: Job) -> tuple[str, ...]:
    """Return the nodes of the job that are down or do not answer."""
    lines = ask_slurm("sinfo", "--noheader", "--Node", "--nodes", job.nodes, "--format", "%N %T").stdout.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines)
    return tuple(node for node, state in found.items() if state.endswith("*") or state.startswith(("down", "fail")))


def newest_step(run_directory: Path) -> int:
    """Return the step of the newest published checkpoint, 0 without one."""
    names = [path.parent.name for path in run_directory.glob("checkpoints/step-*/COMMIT.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)

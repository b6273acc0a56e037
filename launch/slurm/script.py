"""A launch plan as the text of a Slurm batch script: pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from harness.errors import ConfigError
from harness.launch.plan import LaunchPlan
from harness.launch.slurm.cluster import Cluster

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """Where a job finds its files; all paths are absolute, and the same on every node."""

    working_directory: Path
    """Relative paths of a configuration begin here."""
    packages: Path | None
    """The folder that holds the package `harness`, unless it is installed there for the interpreter."""
    python: str
    """The interpreter that submits."""
    folders: tuple[Path, ...] = ()
    """Others that a container must have."""


def job_script(plan: LaunchPlan, cluster: Cluster, place: Place, *, job_name: str, array: str | None = None) -> str:
    """Return the text of the batch script that runs `plan` on `cluster`.

    Args:
        array: such as 0,2,3%2; every task of the array runs the plan with its number in the place of `job_facts.TASK`.
    Raises:
        ConfigError: a path has a character that no batch script can hold.
    """
    paths = (*place.folders, plan.run_directory, place.working_directory, place.packages, Path(place.python))
    for path in filter(None, paths):
        if not str(path).isprintable():
            raise ConfigError(f"{str(path)!r} has a character that a batch script cannot hold; rename that folder")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template("train.sbatch.j2").render(
        cluster=cluster,
        directives=directives(plan, cluster, place, job_name=job_name, array=array),
        expected=expected_variables(plan, cluster),
        plan=plan,
        place=place,
        python=job_python(cluster, place),
        script=script_folder(plan, array=array) / "slurm" / "train.sbatch",
        srun=_lines(srun_command(plan, cluster, place)),
    )


def directives(
    plan: LaunchPlan, cluster: Cluster, place: Place, *, job_name: str, array: str | None = None
) -> list[str]:
    """Return the options of the `#SBATCH` lines, quoted."""
    log = _no_patterns(script_folder(plan, array=array) / "logs") + ("/slurm-%A_%a.log" if array else "/slurm-%j.log")
    options: dict[str, object] = {
        "job-name": job_name,
        "array": array,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        **_shape(plan, cluster),
        "mem": f"{cluster.memory_gb_per_node}G" if cluster.memory_gb_per_node else None,
        "time": cluster.time_limit_minutes,
        "signal": f"{cluster.signal}@{cluster.signal_lead_seconds}",
        "chdir": place.working_directory,
        "output": log,
        "open-mode": "append",
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*lines, "--requeue"]


def script_folder(plan: LaunchPlan, *, array: str | None) -> Path:
    """Return the folder that a script and its log belong to: the run's, or that of the sweep."""
    return plan.run_directory.parent if array else plan.run_directory


def srun_command(plan: LaunchPlan, cluster: Cluster, place: Place) -> list[str]:
    """Return the command line that starts one task a node, or one a rank, in the container if there is one."""
    shape = [f"--{name}={value}" for name, value in _shape(plan, cluster).items() if value is not None]
    hygiene = ["--export=ALL", "--kill-on-bad-exit=1", "--wait=0", "--open-mode=append"]
    container = cluster.container
    ours = (place.working_directory, plan.run_directory, place.packages, *place.folders)
    binds = [str(path) for path in (*container.binds, *filter(None, ours))]
    before: list[str] = []
    if container.runtime == "pyxis":
        mounts = ",".join(bind if ":" in bind else f"{bind}:{bind}" for bind in binds)
        workdir = f"--container-workdir={place.working_directory}"
        hygiene += [f"--container-image={container.image}", f"--container-mounts={mounts}", workdir]
    elif container.runtime == "apptainer":
        gpus = ["--nv"] if cluster.gpus_per_node else []
        before = ["apptainer", "exec", *gpus, "--bind", ",".join(binds), "--pwd", str(place.working_directory)]
        before.append(str(container.image))
    python = cluster.python or place.python
    node = [
        python,
        "-m",
        "harness.launch.slurm.node",
        "--style",
        cluster.style,
        "--ranks-per-node",
        str(plan.ranks_per_node),
    ]
    return ["srun", *shape, *hygiene, *before, *node, "--", *plan.command]


def job_python(cluster: Cluster, place: Place) -> str:
    """Return the interpreter of the batch script, which runs outside the container."""
    return cluster.python if cluster.python and cluster.container.runtime == "none" else place.python


def expected_variables(plan: LaunchPlan, cluster: Cluster) -> dict[str, int]:
    """Return what Slurm must say on the first node if the job is that of the plan."""
    expected = {"SLURM_JOB_NUM_NODES": plan.nodes, "SLURM_NTASKS_PER_NODE": _tasks_per_node(plan, cluster)}
    if cluster.gpus_per_node:
        expected["SLURM_GPUS_ON_NODE"] = plan.ranks_per_node
    return expected


def _shape(plan: LaunchPlan, cluster: Cluster) -> dict[str, object]:
    tasks = _tasks_per_node(plan, cluster)
    return {
        "nodes": plan.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": plan.threads_per_rank * plan.ranks_per_node // tasks,
        # Not --gpus-per-task: every rank is to see all devices of its node and takes that of its local rank.
        "gpus-per-node": plan.ranks_per_node if cluster.gpus_per_node else None,
    }


def _tasks_per_node(plan: LaunchPlan, cluster: Cluster) -> int:
    return plan.ranks_per_node if cluster.style == "srun" else 1


def _no_patterns(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace("%", "%%")


def _lines(command: Sequence[str], *, width: int = 110) -> list[str]:
    """Return a quoted command in lines of about `width` characters, to be joined by a backslash each."""
    lines = [""]
    for word in map(shlex.quote, command):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return lines

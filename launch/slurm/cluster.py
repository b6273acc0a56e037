"""The facts of a Slurm site, apart from any run: read from a YAML file such as slurm/cluster.example.yaml."""

from __future__ import annotations

import re
from os import PathLike
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from harness.config.checks import batch_problems
from harness.config.fields import CountInt, PositiveInt, Section
from harness.config.io import LoadedConfig, read_mapping, refuse, validated
from harness.errors import ConfigError

EXAMPLE = "slurm/cluster.example.yaml"


def _one_word(value: str) -> str:
    if not re.fullmatch(r"[^\s'\"`$\\#;|<>]+", value):
        raise ValueError("one word is wanted, without spaces, quotes or characters that mean something to a shell")
    return value


def _one_line(value: str) -> str:
    if not value.strip() or any(not character.isprintable() for character in value):
        raise ValueError("one line of text is wanted")
    return value


def _a_folder(value: str) -> str:
    if "$" in value:
        raise ValueError(
            "it is not expanded; for a folder of each user or job use setup: ['export TMPDIR=/scratch/$USER']"
        )
    return value


Word = Annotated[str, AfterValidator(_one_word)]
Line = Annotated[str, AfterValidator(_one_line)]


class Container(Section):
    """What each rank runs in."""

    runtime: Literal["none", "apptainer", "pyxis"] = "none"
    image: Line | None = None
    """A .sif file or docker://... for apptainer, what --container-image takes for pyxis."""
    binds: tuple[Line, ...] = ()
    """Folders to see inside, as outside or as OUTSIDE:INSIDE; the working and the run directory are added."""

    @model_validator(mode="after")
    def _image_where_there_is_a_runtime(self) -> Container:
        if (self.runtime == "none") == (self.image is not None):
            raise ValueError("runtime apptainer or pyxis wants an image, and an image wants one of these runtimes")
        return self


class Cluster(Section):
    """Where jobs run and what a node has. Nothing here changes what a run computes."""

    partition: Word | None = None
    """null is the site's default, as for account, qos, constraint and reservation."""
    account: Word | None = None
    qos: Word | None = None
    constraint: Line | None = None
    """Features that nodes must have, such as h100 or a100&nvlink."""
    reservation: Word | None = None

    gpus_per_node: CountInt
    """One rank each; 0 is a cluster of CPU nodes."""
    ranks_per_node: PositiveInt | None = None
    """On CPU nodes; on GPU nodes there is one rank a GPU."""
    cpus_per_rank: PositiveInt = 1
    memory_gb_per_node: PositiveInt | None = None
    """null is the site's default."""
    nodes: PositiveInt = 1
    time_limit_minutes: PositiveInt

    signal: Literal["USR1", "USR2"] = "USR1"
    """What Slurm sends every rank `signal_lead_seconds` before the end."""
    signal_lead_seconds: Annotated[PositiveInt, Field(le=65535)] = 120
    """Longer than the slowest save takes, an update and an evaluation included."""
    style: Literal["torchrun", "srun"] = "torchrun"
    """torchrun: one agent a node starts its ranks, as on a workstation. srun: one Slurm task a rank."""
    preflight_seconds: PositiveInt = 120
    """In which every node of a job must answer the first one, before the ranks start; one that does not is left out."""
    max_crash_requeues: CountInt = 3
    """How often a job that crashed is queued again, if it had saved a new step."""

    modules: tuple[Word, ...] = ()
    """For `module load`."""
    setup: tuple[Line, ...] = ()
    """Shell lines to run on the first node before the ranks start; what they export reaches every rank."""
    container: Container = Container()
    network_interface: Word | None = None
    """Between nodes, such as ib0; null leaves the choice to gloo and NCCL."""
    scratch: Annotated[Line, AfterValidator(_a_folder)] | None = None
    """A folder on a node's own disk for temporary files and caches."""
    python: Line | None = None
    """On the nodes, and in the container if there is one; null is the interpreter that submits."""

    @model_validator(mode="after")
    def _ranks(self) -> Cluster:
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"ranks_per_node is {self.ranks_per_node} and gpus_per_node is {self.gpus_per_node}: there is one rank "
                "a GPU; leave out ranks_per_node"
            )
        if not self.gpus_per_node and self.ranks_per_node is None:
            raise ValueError("gpus_per_node is 0, so say how many CPU ranks a node runs: ranks_per_node")
        if self.signal_lead_seconds >= self.time_limit_minutes * 60:
            raise ValueError(
                f"signal_lead_seconds {self.signal_lead_seconds} is not less than the time limit of "
                f"{self.time_limit_minutes} minutes, so that a job would be asked to stop when it starts"
            )
        return self

    @property
    def ranks_on_a_node(self) -> int:
        """One a GPU, or as many CPU ranks as were asked for."""
        return self.gpus_per_node or self.ranks_per_node or 1


def load_cluster(path: str | PathLike[str]) -> Cluster:
    """Return what a cluster file says.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong; the message has a line for every problem.
    """
    raw, problems = read_mapping(path, example=EXAMPLE, start="a fact of the site, such as gpus_per_node: 8")
    cluster = validated(raw, Cluster, path=path, problems=problems)
    refuse(path, problems)
    return cluster


def with_options(cluster: Cluster, *, nodes: int | None, gpus: int | None, time_limit_minutes: int | None) -> Cluster:
    """Return the cluster as the command line asks for it.

    Args:
        gpus: on each node; CPU ranks on each node where there is no GPU.
    Raises:
        ConfigError: a node does not have so many, or the time is too short.
    """
    if gpus is not None and cluster.gpus_per_node and gpus > cluster.gpus_per_node:
        raise ConfigError(
            f"--gpus {gpus}: a node of this cluster has {cluster.gpus_per_node} (gpus_per_node); use --gpus "
            f"{cluster.gpus_per_node} or less, and --nodes {-(-gpus // cluster.gpus_per_node)} for {gpus} in all"
        )
    key = "gpus_per_node" if cluster.gpus_per_node else "ranks_per_node"
    options = {"nodes": nodes, key: gpus, "time_limit_minutes": time_limit_minutes}
    given = {name: value for name, value in options.items() if value is not None}
    values = {**cluster.model_dump(exclude_unset=True), **given}
    if cluster.gpus_per_node:
        values.pop("ranks_per_node", None)
    return validated(values, Cluster, path="the cluster file with these options", problems=[])


def check_batch(loaded: LoadedConfig, cluster: Cluster) -> None:
    """Refuse a global batch that does not divide over all ranks of a job.

    Raises:
        ConfigError: says which sizes and which numbers of ranks would.
    """
    ranks = cluster.nodes * cluster.ranks_on_a_node
    where = f"{cluster.nodes} nodes x {cluster.ranks_on_a_node} ranks"
    refuse(where, batch_problems(loaded.config, world_size=ranks))

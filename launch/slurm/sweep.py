"""Sweeps: a grid of overrides as one array of jobs, each a run of its own in the sweep's directory."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from harness.config.io import dump_config, load_config, read_mapping, refuse, shown
from harness.config.run_config import RunConfig
from harness.config.use import Used
from harness.errors import EXIT_DONE, ConfigError
from harness.launch.slurm import client as slurm_client
from harness.launch.slurm.cluster import Cluster, check_batch
from harness.launch.slurm.job_facts import TASK
from harness.launch.slurm.submit import Submission, last_job, script_of, write
from harness.record.exit_file import ExitFile
from harness.record.files import json_bytes, replace_durably, storage_errors
from harness.record.json_lines import append_event

EXAMPLE = "slurm/sweep.example.yaml"
TABLE = "sweep.json"
MAX_TASKS = 1000
OWN_KEYS = ("run.name", "run.output_root")
"""What every task has of its own."""


def load_grid(path: str | PathLike[str]) -> list[tuple[str, ...]]:
    """Return the overrides of every task: each key's values with each of all the others', the last key's fastest.

    Raises:
        ConfigError: it is no mapping of dotted keys to lists.
    """
    raw, problems = read_mapping(
        path, example=EXAMPLE, start="a key and its values, such as optim.peak_lr: [1e-3, 3e-4]"
    )
    for key, values in raw.items():
        if not (isinstance(values, list) and values):
            problems.append(f"{key}: {shown(values)} is not a list of values")
        elif key in OWN_KEYS:
            problems.append(f"{key}: every task has a directory of its own by its number; leave it out")
        elif key == "use":
            problems.append("use: all tasks of a sweep use the same files; name them in the configuration")
    refuse(path, problems)
    choices = [[f"{key}={json.dumps(value)}" for value in values] for key, values in raw.items()]
    tasks = list(itertools.islice(itertools.product(*choices), MAX_TASKS + 1))
    if len(tasks) > MAX_TASKS:
        raise ConfigError(f"{path}: more than {MAX_TASKS:,} tasks; take some values out, or sweep in parts")
    return tasks


def task_name(index: int) -> str:
    """Return the name of a task's run, which is that of its folder as well."""
    return f"{index:03d}"


class Sweep:
    """A grid over one configuration, and where its runs lie.

    Raises:
        ConfigError: one of the tasks is wrong; the message has its overrides.
    """

    def __init__(
        self, config: str, overrides: Sequence[str], grid: str | PathLike[str], cluster: Cluster, *, at_once: int | None
    ) -> None:
        base = load_config(config, overrides).config
        self.directory = Path(os.path.abspath(base.run_directory))
        self.tasks = load_grid(grid)
        self._name, self._cluster, self._at_once = base.run.name, cluster, at_once
        self._configs: dict[str, str] = {}
        self._used = Used()
        for index, task in enumerate(self.tasks):
            own = [f"run.name={json.dumps(task_name(index))}", f"run.output_root={json.dumps(str(self.directory))}"]
            kept = [override for override in overrides if override.partition("=")[0] not in OWN_KEYS]
            try:
                loaded = load_config(config, [*kept, *task, *own])
                check_batch(loaded, cluster)
            except ConfigError as error:
                raise ConfigError(f"task {index} of {grid} ({' '.join(task)}): {error.args[0]}") from None
            self._used = loaded.used
            self._configs[task_name(index)] = dump_config(_grouped(loaded.config, base.run.name))

    def submission(self, indices: Sequence[int]) -> Submission:
        """Return the array of some of the tasks."""
        limit = f"%{self._at_once}" if self._at_once else ""
        array = ",".join(map(str, indices)) + limit
        script = script_of(self.directory / TASK, self._cluster, job_name=self._name, array=array, used=self._used)
        configs = {task_name(index): self._configs[task_name(index)] for index in indices}
        return Submission(self.directory, script, configs, self._used.files)

    def open_tasks(self) -> list[int]:
        """Return the tasks that are not done, and that no job waits for or trains."""
        found = []
        for index in range(len(self.tasks)):
            run = self.directory / task_name(index)
            job = last_job(run)
            if ExitFile(run).code() != EXIT_DONE and not (job and slurm_client.job_state(job)):
                found.append(index)
        return found

    def submit(self) -> tuple[str, list[int]]:
        """Submit the open tasks and return the number of the array, and which they are.

        Raises:
            ConfigError: there is no Slurm here, it refuses the jobs, or there is nothing to submit.
        """
        slurm_client.require_slurm()
        table = self._table()
        path = self.directory / TABLE
        if path.exists() and json.loads(path.read_bytes()) != table:
            raise ConfigError(f"{self.directory} holds another sweep (see {TABLE}); give this one another run.name")
        indices = self.open_tasks()
        if not indices:
            raise ConfigError(
                f"all {len(self.tasks)} tasks of {self.directory} are done, or have jobs; see harness status"
            )
        submission = self.submission(indices)
        write(submission)
        with storage_errors("write", path):
            replace_durably(path, json_bytes(table))
        job = slurm_client.sbatch(submission.script_path, "--parsable").partition(";")[0]
        for index in indices:
            append_event(self.directory / task_name(index), "submitted", job=f"{job}_{index}")
        return job, indices

    def _table(self) -> dict[str, list[str]]:
        return {task_name(index): list(task) for index, task in enumerate(self.tasks)}


def _grouped(config: RunConfig, name: str) -> RunConfig:
    """Return the configuration of a task that is in a group of wandb: its own, or that of the sweep."""
    wandb = config.tracking.wandb
    if wandb is None or wandb.group is not None:
        return config
    tracking = config.tracking.model_copy(update={"wandb": wandb.model_copy(update={"group": name})})
    return config.model_copy(update={"tracking": tracking})


def runs_of(directory: Path) -> dict[Path, list[str]]:
    """Return the runs of a sweep with their overrides; a directory that is no sweep's is the only one of its own."""
    table = directory / TABLE
    if not table.exists():
        return {directory: []}
    tasks: dict[str, Any] = json.loads(table.read_bytes())
    return {directory / name: overrides for name, overrides in tasks.items()}

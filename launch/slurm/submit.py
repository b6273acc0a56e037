"""`harness submit`: a run as a Slurm job. Everything that can be wrong is told before anything is submitted."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.config.io import LoadedConfig, dump_config
from harness.config.use import NOTHING_USED, Used, UsedFile
from harness.errors import ConfigError
from harness.launch.plan import LaunchPlan
from harness.launch.slurm import client as slurm_client
from harness.launch.slurm.cluster import Cluster, check_batch
from harness.launch.slurm.preflight import USED_FILES
from harness.launch.slurm.script import Place, job_script
from harness.ranks.process import CHECKOUT
from harness.record.files import json_bytes, replace_durably, storage_errors
from harness.record.json_lines import append_event, read_events

TRAIN_MODULE = "harness.train"


@dataclass(frozen=True)
class Submission:
    """A job, or an array of jobs, that is ready to be submitted."""

    directory: Path
    """Of the run, or of the sweep that its runs lie in."""
    script: str
    configs: Mapping[str, str]
    """The whole configuration of every run by its folder in `directory`, so that a job trains what was submitted,
    whatever becomes of the file until then."""
    used: tuple[UsedFile, ...] = ()
    """The files whose code the runs bring; each node looks whether it has the same."""

    @property
    def script_path(self) -> Path:
        """Where the batch script is written."""
        return self.directory / "slurm" / "train.sbatch"


def prepare(loaded: LoadedConfig, cluster: Cluster, *, python: str = sys.executable) -> Submission:
    """Return the job of a run.

    Raises:
        ConfigError: the batch does not divide over the ranks, or a path cannot stand in a batch script.
    """
    check_batch(loaded, cluster)
    config = loaded.config
    directory = Path(os.path.abspath(config.run_directory))
    script = script_of(directory, cluster, job_name=config.run.name, python=python, used=loaded.used)
    return Submission(directory, script, {".": dump_config(config)}, loaded.used.files)


def script_of(
    run_directory: Path,
    cluster: Cluster,
    *,
    job_name: str,
    python: str = sys.executable,
    array: str | None = None,
    used: Used = NOTHING_USED,
) -> str:
    """Return the batch script of a run.

    Args:
        used: the code that the configuration brings. The job's command line names it by absolute paths: the stored
            configuration is not followed in this.
        array: the tasks of an array; then `run_directory` is that of each, with TASK of `job_facts` for its number.
    """
    plan = LaunchPlan(
        command=(
            TRAIN_MODULE,
            str(run_directory / "slurm" / "config.yaml"),
            *([f"use={json.dumps(used.names)}"] if used.names else []),
        ),
        run_directory=run_directory,
        nodes=cluster.nodes,
        ranks_per_node=cluster.ranks_on_a_node,
        threads_per_rank=cluster.cpus_per_rank,
    )
    place = Place(
        working_directory=Path.cwd(),
        packages=CHECKOUT,
        python=python,
        folders=tuple(sorted({Path(name).parent for name in used.names if os.path.isabs(name)})),
    )
    return job_script(plan, cluster, place, job_name=job_name, array=array)


def check_with_slurm(submission: Submission) -> str:
    """Have Slurm judge the script without queueing or writing anything, and return what it says.

    Raises:
        ConfigError: it would be refused.
    """
    slurm_client.require_slurm()
    return slurm_client.sbatch(submission.script, "--test-only")


def submit(submission: Submission) -> str:
    """Write the script into the run directory, submit it, and return the number of the job.

    Raises:
        ConfigError: there is no Slurm here, it refuses the job, or one of this run is already there.
        StorageError: the run directory cannot be written.
    """
    slurm_client.require_slurm()
    directory = submission.directory
    if (job := last_job(directory)) and (state := slurm_client.job_state(job)):
        raise ConfigError(
            f"{directory} is trained by job {job} ({state}) already. Wait for it, end it with harness cancel "
            f"{os.path.relpath(directory)}, or give this run another run.name"
        )
    write(submission)
    job = slurm_client.sbatch(submission.script_path, "--parsable").partition(";")[0]
    append_event(directory, "submitted", job=job)
    return job


def last_job(directory: Path) -> str | None:
    """Return the number of the job that was last submitted for a run, by its events."""
    jobs = [line["job"] for line in read_events(directory) if line["event"] == "submitted"]
    return jobs[-1] if jobs else None


def write(submission: Submission) -> None:
    """Write the script, the configurations, and the folders that Slurm and the ranks write to.

    Raises:
        StorageError: that is not possible.
    """
    with storage_errors("write in", submission.directory):
        for folder in ("slurm", "logs"):  # Slurm makes no folder for a job's log: the job would fail without a word
            (submission.directory / folder).mkdir(parents=True, exist_ok=True)
        for folder, config in submission.configs.items():
            path = submission.directory / folder / "slurm" / "config.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(path, config.encode())
            if submission.used:
                replace_durably(path.with_name(USED_FILES), json_bytes([file.to_json() for file in submission.used]))
            # How the run ended before is no news: a job that is queued again would take it for its own end.
            (submission.directory / folder / "exit.json").unlink(missing_ok=True)
        replace_durably(submission.script_path, submission.script.encode())

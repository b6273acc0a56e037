"""`harness status | tail | cancel RUN`: what Slurm and the run directory say of a run. Only cancel changes anything."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError
from harness.launch.slurm.client import ask_slurm, field, job_state
from harness.launch.slurm.submit import last_job
from harness.record.exit_file import ExitFile
from harness.record.json_lines import ends, read_events

LAST_BYTES = 2**16


@dataclass(frozen=True)
class Status:
    """One run, as it is now."""

    run: Path
    step: int
    """The last update in the ledger."""
    job: str | None
    state: str
    """Of the job, in Slurm's words, with its reason."""
    restarts: int
    code: int | None
    """In exit.json; None while it trains and before it was started."""
    last_end: str
    """How the last attempt ended and what came of it."""

    def line(self) -> str:
        """Return one line for a person."""
        job = f"job {self.job} {self.state}, {self.restarts} restarts" if self.job else "no job"
        code = "" if self.code is None else f"  exit code {self.code}"
        return f"{self.run}  update {self.step:,}  {job}{code}" + (f"  ({self.last_end})" if self.last_end else "")


def status_of(run: Path) -> Status:
    """Return how a run stands.

    Raises:
        ConfigError: `run` is no run directory.
    """
    job = _job(run)
    events = read_events(run)
    ended = [event for event in events if event["event"] == "job ended"]
    starts = [event for event in events if event["event"] == "job started"]
    return Status(
        run=run,
        step=_last_step(run / "ledger.jsonl"),
        job=job,
        state=state_of(job) if job else "",
        restarts=starts[-1]["restart"] if starts else 0,
        code=ExitFile(run).code(),
        last_end=f"the last attempt: {ended[-1]['cause']}, at update {ended[-1]['step']:,}" if ended else "",
    )


def state_of(job: str) -> str:
    """Return the state of a job by squeue, then scontrol, then sacct, which many clusters do not have."""
    try:
        state = job_state(job)
        shown = ask_slurm("scontrol", "show", "job", "--oneliner", job).stdout
    except ConfigError:
        return "in an unknown state (Slurm does not answer here)"
    if state := state or field(shown, "JobState"):
        reason = field(shown, "Reason")
        return state.lower() + (f" ({reason})" if reason else "")
    accounted = ask_slurm("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job, "--format", "State")
    states = accounted.stdout.split() if accounted.returncode == 0 else []
    return states[0].lower() if states else "ended, and Slurm has forgotten it"


def newest_log(run: Path) -> Path:
    """Return what rank zero says in the newest attempt, or what the job says where no rank has spoken.

    Raises:
        ConfigError: `run` is no run directory, or there is no log yet.
    """
    _check(run)
    for pattern in ("logs/*/*/rank-0.log", "logs/slurm-*.log"):
        logs = sorted(run.glob(pattern), key=lambda path: path.stat().st_mtime)
        if logs:
            return logs[-1]
    raise ConfigError(f"{run} has no log yet; harness status {run} says whether its job waits")


def tail(run: Path) -> int:
    """Become `tail`, which shows the newest log and what is added to it."""
    log = newest_log(run)
    print(f"==> {log} <==", flush=True)
    os.execvp("tail", ["tail", "-n", "40", "-F", str(log)])


def cancel(runs: Iterable[Path]) -> list[str]:
    """End the jobs of a run, or of those of a sweep, for good and return what was done; what was saved stays.

    Raises:
        ConfigError: there is no job to end, or Slurm does not end it.
    """
    said, runs = [], list(runs)
    for run in runs:
        job = _job(run)
        if job is None or (state := job_state(job)) is None:
            continue
        done = ask_slurm("scancel", job)
        if done.returncode != 0:
            raise ConfigError(f"scancel {job} failed: {' '.join(done.stderr.split())}")
        said.append(f"job {job} ({state.lower()}) is cancelled; submit again to go on from the newest checkpoint")
    if not said:
        raise ConfigError(f"{runs[0]} has no job that waits or runs; harness status {runs[0]} says how it ended")
    return said


def _job(run: Path) -> str | None:
    _check(run)
    return last_job(run)


def _check(run: Path) -> None:
    if not any((run / name).exists() for name in ("run.json", "slurm", "events.jsonl")):
        raise ConfigError(f"{run} is not a run directory. Give one such as runs/mnist-cnn")


def _last_step(ledger: Path) -> int:
    lines = [line for line in ends(ledger, num_bytes=LAST_BYTES)[1] if "step" in line]
    return int(lines[-1]["step"]) if lines else 0

"""Takes the place of a Slurm job's batch shell: starts the ranks, once an attempt, and decides what comes after them.

`python -m harness.launch.slurm.job ... -- srun ...`, on the first node of the job, outside of any container, with
nothing but the standard library. What it decides is one pure function, `decide` of launch/slurm/attempts.py.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from harness.errors import EXIT_DONE, HarnessError
from harness.launch.slurm.attempts import Attempt, decide, earlier_attempts
from harness.launch.slurm.client import ask_patiently, field, sbatch
from harness.launch.slurm.job_facts import (
    Job,
    Outlook,
    check_plan,
    comes_back_by_itself,
    job_of,
    look,
    lost_nodes,
    newest_step,
    own_run,
)
from harness.launch.slurm.network import address_of, is_free, rendezvous_port
from harness.launch.slurm.preflight import EXIT_BAD_NODE, PREFLIGHT_FAILED, bad_nodes
from harness.launch.torchrun import FINAL_CODES, exit_code_of
from harness.record.exit_file import ExitFile
from harness.record.files import storage_errors
from harness.record.json_lines import append_event, read_events

SECONDS_AFTER_PREEMPTION = 120.0
"""How long after the announced end Slurm is given to end a preempted job."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one attempt and return the exit code of the job."""
    try:
        options, srun = parse(sys.argv[1:] if arguments is None else arguments)
        job = job_of(os.environ)
        if job.task is not None:  # of an array: its run lies in the folder of its number
            options.run_directory = Path(own_run(str(options.run_directory), job.task))
            srun = [own_run(word, job.task) for word in srun]
        return attempt(job, options, srun)
    except HarnessError as error:
        say(str(error))
        return error.exit_code


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the command after `--`."""
    parser = argparse.ArgumentParser(prog="python -m harness.launch.slurm.job", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run-directory", type=Path, required=True)
    parser.add_argument("--script", type=Path, required=True, help="to submit again where a requeue is refused")
    parser.add_argument("--max-crash-requeues", type=int, required=True)
    parser.add_argument("--expect", action="append", default=[], help="NAME=VALUE: what Slurm must say")
    parser.add_argument("--preflight-seconds", required=True, help="in which every node must answer the first one")
    parser.add_argument("--interface", help="the network between the nodes")
    split = list(arguments).index("--")
    return parser.parse_args(arguments[:split]), list(arguments[split + 1 :])


def attempt(job: Job, options: argparse.Namespace, srun: Sequence[str]) -> int:
    """Start the ranks, wait for them, and do what is decided; return the exit code of the job."""
    directory: Path = options.run_directory
    if job.restart and ExitFile(directory).code() == EXIT_DONE:
        say(f"{directory} is done; there is nothing to start again")
        return EXIT_DONE
    check_plan(dict(pair.split("=", 1) for pair in options.expect), os.environ)
    terminated = leave_signals_to_the_ranks()
    nodes = ask_patiently("scontrol", "show", "hostnames", job.nodes).stdout.split()
    logs = directory / "logs" / job.name / f"r{job.restart}"
    with storage_errors("write", logs):
        logs.mkdir(parents=True, exist_ok=True)
    environment = meeting(job, options, nodes=nodes, logs=logs)
    earlier = earlier_attempts(read_events(directory))
    step_before, began = newest_step(directory), time.monotonic()
    about = {"job": job.name, "restart": job.restart}
    rendezvous = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    append_event(directory, "job started", **about, nodes=nodes, rendezvous=rendezvous, step=step_before)
    say(f"job {job.name}, restart {job.restart}, on {' '.join(nodes)}; the ranks' output is in {logs}")

    code = run_ranks(srun, directory, logs=logs, environment=os.environ | environment)
    now, bad = look(job, cancelled=terminated), bad_nodes(logs)
    end = Attempt(
        code=code,
        state="ENDING" if terminated and now.state in ("RUNNING", "UNKNOWN") and not now.is_preempted else now.state,
        is_preempted=now.is_preempted,
        step_before=step_before,
        step_after=newest_step(directory),
        crash_requeues=earlier.crash_requeues,
        was_fruitless_before=earlier.was_fruitless,
        exclusions=earlier.exclusions,
        losses=earlier.losses,
        bad_nodes=tuple(bad),
        lost_nodes=() if code in FINAL_CODES else lost_nodes(job),
    )
    action, cause = decide(end, max_crash_requeues=options.max_crash_requeues)
    facts = {"code": code, "cause": cause, "action": action, "has_saved_a_new_step": end.has_saved_a_new_step}
    seconds = round(time.monotonic() - began, 1)
    append_event(directory, "job ended", **about, **facts, step=end.step_after, seconds=seconds)
    for name, problems in bad.items():
        say(f"node {name} cannot train: {problems}")
    say(f"exit code {code}, newest checkpoint at update {end.step_after:,}: {cause}")
    again = Continuation(job, directory, options.script, terminated)
    if action == "leave" and end.is_preempted:
        again.after_preemption(now)
    elif action == "requeue":
        again.requeue()
    elif action == "exclude":
        again.without(bad)
    return code


def leave_signals_to_the_ranks() -> list[int]:
    """Take no notice of the signals for the ranks; return a list that gets SIGTERM, on which the ranks end as well."""
    terminated: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        terminated.append(number)

    signal.signal(signal.SIGTERM, remember)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    return terminated


def meeting(job: Job, options: argparse.Namespace, *, nodes: Sequence[str], logs: Path) -> dict[str, str]:
    """Return the variables by which the ranks find each other, their logs and the end of their time."""
    host = address_of(options.interface) if options.interface else nodes[0]
    port = rendezvous_port(job.number, is_free=is_free)
    roll_call_port = rendezvous_port(job.number, is_free=lambda other: other != port and is_free(other))
    end_time = look(job).end_time
    return {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        # With a nonce: a port that was free may by now be that of another cluster's job of the same number.
        "HARNESS_RENDEZVOUS_ID": f"{job.name}-{job.restart}-{secrets.token_hex(4)}",
        "HARNESS_LOG_DIRECTORY": str(logs),
        "HARNESS_NODES": " ".join(nodes),
        "HARNESS_ROLL_CALL": f"{host}:{roll_call_port}",
        "HARNESS_ROLL_CALL_SECONDS": options.preflight_seconds,
        **({"HARNESS_END_TIME": str(end_time)} if end_time else {}),
        **({"HARNESS_INTERFACE": options.interface} if options.interface else {}),
    }


def run_ranks(srun: Sequence[str], directory: Path, *, logs: Path, environment: Mapping[str, str]) -> int:
    """Run the ranks to their end and return the run's exit code: its own word, before what srun makes of it."""
    exit_file = ExitFile(directory)
    output = f"--output={str(logs).replace('%', '%%')}/task-%t.log"
    step_code = subprocess.Popen([srun[0], output, *srun[1:]], env=environment).wait()
    if (logs / PREFLIGHT_FAILED).exists():
        return EXIT_BAD_NODE
    recorded = exit_file.new_code()
    if step_code == EXIT_DONE and recorded is None:
        return 1  # no rank has trained: srun could not start one, and does not mind
    return exit_code_of(recorded=recorded, agent=step_code, stop_signal=None)


@dataclass(frozen=True)
class Continuation:
    """What can come after an attempt. Once somebody has cancelled the job, nothing comes any more."""

    job: Job
    run_directory: Path
    script: Path
    cancelled: Sequence[int]
    """Is given something when Slurm ends the job."""

    def requeue(self) -> None:
        """Queue the job again; where that is refused, submit the same script as a job that waits for this one's end.

        Raises:
            ConfigError: Slurm refuses both.
        """
        done = ask_patiently("scontrol", "requeue", self.job.name, cancelled=self.cancelled)
        if done.returncode != 0 and not self.cancelled:
            self.submit(f"requeue was refused ({' '.join(done.stderr.split())})")

    def without(self, bad: Iterable[str]) -> None:
        """Submit the same script as a job that does without these nodes, and those that are left out already.

        Raises:
            ConfigError: Slurm refuses it.
        """
        shown = ask_patiently("scontrol", "show", "job", "--oneliner", self.job.name, cancelled=self.cancelled).stdout
        excluded = field(shown, "ExcNodeList")
        names = ",".join([*([excluded] if excluded else []), *bad])
        self.submit(f"{names} are left out", f"--exclude={names}")

    def after_preemption(self, now: Outlook) -> None:
        """Wait until Slurm ends a preempted job, as it has announced, and queues it again; if it does not, do that."""
        if not comes_back_by_itself(now.partition):
            return self.submit(f"preempted, and Slurm ends such jobs in partition {now.partition}")
        give_up = (now.end_time or time.time()) + SECONDS_AFTER_PREEMPTION
        say("preempted: Slurm requeues the job by itself")
        while time.time() < give_up and not self.cancelled:
            time.sleep(1)
        return self.requeue()

    def submit(self, why: str, *options: str) -> None:
        """Submit the same script as a job that waits for the end of this one."""
        if self.cancelled:
            return
        task = [] if self.job.task is None else [f"--array={self.job.task}"]
        waits = f"--dependency=afterany:{self.job.name}"
        number = sbatch(self.script, "--parsable", waits, *task, *options, cancelled=self.cancelled).partition(";")[0]
        number += "" if self.job.task is None else f"_{self.job.task}"
        append_event(self.run_directory, "submitted", job=number, after=self.job.name)
        say(f"{why}, so job {number} goes on when this one has ended")


def say(text: str) -> None:
    """Print a line to the job's log."""
    print(f"harness: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

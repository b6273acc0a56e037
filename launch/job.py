"""Takes the place of a Slurm job's batch shell: starts the ranks, once an attempt, and decides what comes after them.

`python -m launch.job ... -- srun ...`, on the first node of the job, outside of any container, with nothing but the
standard library. What it decides is one pure function, `launch.attempts.decide`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from harness.errors import EXIT_DONE, HarnessError
from harness.exit_file import ExitFile
from harness.json_lines import append_event, read_events
from harness.process import shell_code
from launch.attempts import Action, Attempt, decide, earlier_attempts
from launch.job_facts import Job, check_plan, job_of, look, lost_nodes, newest_step, own_run
from launch.network import address_of, is_free, rendezvous_port
from launch.preflight import EXIT_BAD_NODE, PREFLIGHT_FAILED, bad_nodes
from launch.slurm_client import ask_slurm, field, sbatch
from launch.torchrun import FINAL_CODES

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
    parser = argparse.ArgumentParser(prog="python -m launch.job", description=__doc__, allow_abbrev=False)
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
    nodes = ask_slurm("scontrol", "show", "hostnames", job.nodes).stdout.split()
    logs = directory / "logs" / job.name / f"r{job.restart}"
    logs.mkdir(parents=True, exist_ok=True)
    environment = meeting(job, options, nodes=nodes, logs=logs)
    earlier = earlier_attempts(read_events(directory))
    step_before, began = newest_step(directory), time.monotonic()
    about = {"job": job.name, "restart": job.restart}
    rendezvous = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    append_event(directory, "job started", **about, nodes=nodes, rendezvous=rendezvous, step=step_before)
    say(f"job {job.name}, restart {job.restart}, on {' '.join(nodes)}; the ranks' output is in {logs}")

    code = run_ranks(srun, directory, logs=logs, environment=os.environ | environment)
    now, bad = look(job), bad_nodes(logs)
    end = Attempt(
        code=code,
        state="ENDING" if terminated and now.state == "RUNNING" and not now.is_preempted else now.state,
        is_preempted=now.is_preempted,
        step_before=step_before,
        step_after=newest_step(directory),
        crash_requeues=earlier.crash_requeues,
        was_fruitless_before=earlier.was_fruitless,
        exclusions=earlier.exclusions,
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
    if action == "leave" and end.is_preempted:
        action = wait_for_slurm(job, terminated)
    if action == "requeue":
        requeue(job, directory, options.script)
    elif action == "exclude":
        leave_out(bad, job, directory, options.script)
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
        "HARNESS_RENDEZVOUS_ID": f"{job.name}-{job.restart}",
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
    return shell_code(step_code) if recorded is None else recorded


def leave_out(bad: Iterable[str], job: Job, run_directory: Path, script: Path) -> None:
    """Submit the same script as a job that does without these nodes, and those that are left out already."""
    excluded = field(ask_slurm("scontrol", "show", "job", "--oneliner", job.name).stdout, "ExcNodeList")
    names = ",".join([*([excluded] if excluded else []), *bad])
    again = submit_again(job, run_directory, script, f"--exclude={names}")
    say(f"job {again} goes on without {names} when this one has ended")


def wait_for_slurm(job: Job, terminated: Sequence[int]) -> Action:
    """Wait until Slurm ends a job that is preempted, as it has announced; `requeue` if it does not, after all."""
    now = look(job)
    give_up = (now.end_time or time.time()) + SECONDS_AFTER_PREEMPTION
    say("preempted: Slurm requeues the job by itself")
    while time.time() < give_up and not terminated:
        time.sleep(1)
    return "leave" if terminated else "requeue"


def requeue(job: Job, run_directory: Path, script: Path) -> None:
    """Queue the job again; where that is refused, submit the same script as a job that waits for the end of this one.

    Raises:
        ConfigError: Slurm refuses both.
    """
    refused = ask_slurm("scontrol", "requeue", job.name)
    if refused.returncode == 0:
        return
    number = submit_again(job, run_directory, script)
    say(f"requeue was refused ({' '.join(refused.stderr.split())}), so job {number} goes on when this one has ended")


def submit_again(job: Job, run_directory: Path, script: Path, *options: str) -> str:
    """Submit the same script as a job that waits for the end of this one, and return its number."""
    task = [] if job.task is None else [f"--array={job.task}"]
    number = sbatch(script, "--parsable", f"--dependency=afterany:{job.name}", *task, *options).partition(";")[0]
    number += "" if job.task is None else f"_{job.task}"
    append_event(run_directory, "submitted", job=number, after=job.name)
    return number


def say(text: str) -> None:
    """Print a line to the job's log."""
    print(f"harness: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Takes the place of a Slurm job's batch shell: starts the ranks, once an attempt, and decides what comes after them.

`python -m launch.job ... -- srun ...`, on the first node of the job, outside of any container, with nothing but the
standard library. What it decides is one pure function, `launch.attempts.decide`.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from harness.errors import EXIT_DONE, ConfigError, HarnessError
from harness.exit_file import ExitFile
from harness.json_lines import append_event, read_lines
from launch.attempts import Action, Attempt, decide, earlier_attempts
from launch.preflight import EXIT_BAD_NODE, PREFLIGHT_FAILED, bad_nodes
from launch.slurm_client import ask_slurm, field, sbatch
from launch.torchrun import FINAL_CODES

FIRST_PORT, NUM_PORTS = 12_000, 20_000
"""Below those that the kernel gives to outgoing connections."""
SIOCGIFADDR = 0x8915
SECONDS_AFTER_PREEMPTION = 120.0
"""How long after the announced end Slurm is given to end a preempted job."""


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
    end_time: float | None
    """Seconds since 1970."""
    is_preempted: bool


def job_of(environment: Mapping[str, str]) -> Job:
    """Return the job that this process runs in.

    Raises:
        ConfigError: it runs in none.
    """
    try:
        number = int(environment["SLURM_JOB_ID"])
        nodes = environment["SLURM_JOB_NODELIST"]
    except (KeyError, ValueError):
        raise ConfigError("this is not a Slurm job (SLURM_JOB_ID is not set): start it with harness submit") from None
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    name = f"{array}_{task}" if array else str(number)
    return Job(number, name, restart, nodes, int(task) if task is not None else None)


def own_run(word: str, task: int) -> str:
    """Return a path with the folder of an array's task in the place of TASK."""
    return "/".join(f"{task:03d}" if part == "TASK" else part for part in word.split("/"))


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


def rendezvous_port(number: int, *, is_free: Callable[[int], bool]) -> int:
    """Return the port at which the ranks of a job meet: one that follows from its number, the next if it is taken.

    Raises:
        ConfigError: none of a hundred is free.
    """
    for attempt in range(100):
        port = FIRST_PORT + (number + 613 * attempt) % NUM_PORTS  # not the next one, which is that of the next job
        if is_free(port):
            return port
    raise ConfigError(f"no free port among a hundred from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS}; see ss -ltn")


def is_free(port: int) -> bool:
    """Whether this machine listens at no address on a port."""
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError:
            return False
    return True


def newest_step(run_directory: Path) -> int:
    """Return the step of the newest published checkpoint, 0 without one."""
    names = [path.parent.name for path in run_directory.glob("checkpoints/step-*/COMMIT.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def outlook(text: str) -> Outlook:
    """Return what `scontrol show job` says."""
    end = field(text, "EndTime")
    end_time = datetime.fromisoformat(end).timestamp() if end else None
    return Outlook(field(text, "JobState") or "UNKNOWN", end_time, field(text, "PreemptTime") is not None)


# ---------------------------------------------------------------- one attempt


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
    exit_file = ExitFile(directory)
    if job.restart and exit_file.code() == EXIT_DONE:
        say(f"{directory} is done; there is nothing to start again")
        return EXIT_DONE
    check_plan(dict(pair.split("=", 1) for pair in options.expect), os.environ)
    # Asked to end, this process waits for the ranks, which are asked as well.
    terminated: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        terminated.append(number)

    signal.signal(signal.SIGTERM, remember)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # those are for the ranks
    hosts = ask_slurm("scontrol", "show", "hostnames", job.nodes).stdout.split()
    host = address_of(options.interface) if options.interface else hosts[0]
    port = rendezvous_port(job.number, is_free=is_free)
    roll_call_port = rendezvous_port(job.number, is_free=lambda other: other != port and is_free(other))
    end_time = look(job).end_time
    logs = directory / "logs" / job.name / f"r{job.restart}"
    logs.mkdir(parents=True, exist_ok=True)
    earlier = earlier_attempts(events_of(directory))
    step_before, began = newest_step(directory), time.monotonic()
    about = {"job": job.name, "restart": job.restart}
    append_event(directory, "job started", **about, nodes=hosts, rendezvous=f"{host}:{port}", step=step_before)
    say(f"job {job.name}, restart {job.restart}, on {' '.join(hosts)}; the ranks' output is in {logs}")
    environment = {
        **os.environ,
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "HARNESS_RENDEZVOUS_ID": f"{job.name}-{job.restart}",
        "HARNESS_LOG_DIRECTORY": str(logs),
        "HARNESS_NODES": " ".join(hosts),
        "HARNESS_ROLL_CALL": f"{host}:{roll_call_port}",
        "HARNESS_ROLL_CALL_SECONDS": options.preflight_seconds,
        **({"HARNESS_END_TIME": str(end_time)} if end_time else {}),
        **({"HARNESS_INTERFACE": options.interface} if options.interface else {}),
    }
    output = f"--output={str(logs).replace('%', '%%')}/task-%t.log"
    step_code = wait_for(subprocess.Popen([srun[0], output, *srun[1:]], env=environment))
    code = EXIT_BAD_NODE if (logs / PREFLIGHT_FAILED).exists() else exit_file.new_code()
    code = step_code if code is None else code
    bad = bad_nodes(logs)
    now = look(job)
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
    append_event(
        directory,
        "job ended",
        **about,
        code=end.code,
        cause=cause,
        action=action,
        step=end.step_after,
        has_saved_a_new_step=end.has_saved_a_new_step,
        seconds=round(time.monotonic() - began, 1),
    )
    for name, problems in bad.items():
        say(f"node {name} cannot train: {problems}")
    say(f"exit code {end.code}, newest checkpoint at update {end.step_after:,}: {cause}")
    if action == "leave" and end.is_preempted:
        action = wait_for_slurm(job, terminated)
    if action == "requeue":
        requeue(job, directory, options.script)
    elif action == "exclude":
        excluded = field(ask_slurm("scontrol", "show", "job", "--oneliner", job.name).stdout, "ExcNodeList")
        names = ",".join([*([excluded] if excluded else []), *bad])
        again = submit_again(job, directory, options.script, f"--exclude={names}")
        say(f"job {again} goes on without {names} when this one has ended")
    return end.code


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process and return the code that a shell would show."""
    code = process.wait()
    return code if code >= 0 else 128 - code


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


def look(job: Job) -> Outlook:
    """Ask Slurm about this job."""
    return outlook(ask_slurm("scontrol", "show", "job", "--oneliner", job.name).stdout)


def lost_nodes(job: Job) -> tuple[str, ...]:
    """Return the nodes of the job that are down or do not answer."""
    lines = ask_slurm("sinfo", "--noheader", "--Node", "--nodes", job.nodes, "--format", "%N %T").stdout.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines)
    return tuple(node for node, state in found.items() if state.endswith("*") or state.startswith(("down", "fail")))


def events_of(run_directory: Path) -> list[dict[str, Any]]:
    """Return the events of a run so far."""
    path = run_directory / "events.jsonl"
    return read_lines(path) if path.exists() else []


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface of this node.

    Raises:
        ConfigError: there is none of that name, or it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"network_interface: {socket.gethostname()} has no address on {interface} ({error.strerror}); it has "
                f"the interfaces {names}"
            ) from error
    return socket.inet_ntoa(answer[20:24])


def say(text: str) -> None:
    """Print a line to the job's log."""
    print(f"harness: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

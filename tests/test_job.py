"""What the batch script of a job decides, and what it reads of Slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.launch.slurm.attempts import Action, Attempt, Earlier, decide, earlier_attempts
from harness.launch.slurm.job_facts import check_plan, job_of, newest_step, outlook
from harness.launch.slurm.network import address_of, is_free, rendezvous_port
from harness.launch.slurm.node import node_plan, rank_environment
from harness.launch.torchrun import torchrun_command
from harness.ranks.process import pending_signals

ROOT = Path(__file__).parents[1]


def attempt(code: int, *, progress: int = 10, **known: object) -> Attempt:
    facts: dict[str, object] = {
        "state": "RUNNING",
        "is_preempted": False,
        "step_before": 20,
        "step_after": 20 + progress,
        "crash_requeues": 0,
        "was_fruitless_before": False,
        **known,
    }
    return Attempt(code=code, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ended", "action", "cause"),
    [
        (attempt(0), "end", "done"),
        (attempt(0, is_preempted=True), "end", "done"),
        (attempt(75), "requeue", "interrupted and saved"),
        (attempt(75, progress=0), "requeue", "interrupted"),
        (attempt(75, progress=0, was_fruitless_before=True), "end", "twice in a row"),
        (attempt(75, is_preempted=True), "leave", "preempted"),  # Slurm requeues by itself
        (attempt(75, state="UNKNOWN"), "requeue", "interrupted and saved"),  # the controller does not answer
        (attempt(0, state="UNKNOWN"), "end", "done"),
        *[
            (attempt(128 + number, progress=0), "requeue", "interrupted") for number in (10, 12)
        ],  # before there was Python
        (attempt(138, progress=0, was_fruitless_before=True), "end", "twice in a row"),
        (attempt(75, state="COMPLETING"), "leave", "completing"),  # cancelled: a requeue would bring it back to life
        (attempt(75, state="CANCELLED"), "leave", "cancelled"),
        (attempt(0, state="TIMEOUT"), "leave", "timeout"),
        *[(attempt(code), "end", f"exit code {code}") for code in (2, 3, 4, 5, 6, 8)],
        *[(attempt(code, is_preempted=True), "end", f"exit code {code}") for code in (2, 6)],
        *[(attempt(code), "requeue", "crashed") for code in (1, 7, 137, 143)],
        *[(attempt(code, progress=0), "end", "no new step was saved") for code in (1, 7, 137)],
        (attempt(1, crash_requeues=2), "requeue", "crashed"),
        (attempt(1, crash_requeues=3), "end", "after 3 requeues"),
        (attempt(7, progress=0, crash_requeues=3, lost_nodes=("n4",)), "requeue", "lost n4"),
        (attempt(7, progress=0, losses=3, lost_nodes=("n4",)), "end", "no new step was saved"),
        (attempt(7, losses=3, lost_nodes=("n4",)), "requeue", "lost n4"),
        (attempt(76, progress=0, bad_nodes=("n4",)), "exclude", "bad nodes n4"),
        (attempt(76, progress=0, bad_nodes=("n4",), exclusions=2), "end", "left out 2 times"),
        (attempt(76, progress=0), "end", "is network_interface right?"),
        (attempt(1, is_preempted=True, progress=0), "leave", "preempted"),
    ],
)
def test_what_comes_after_an_attempt(ended: Attempt, action: Action, cause: str) -> None:
    found, why = decide(ended, max_crash_requeues=3)
    assert found == action
    assert cause in why


def test_crashes_are_counted_from_the_submission_by_a_person_on() -> None:
    crash = {"event": "job ended", "action": "requeue", "cause": "crashed", "code": 1, "has_saved_a_new_step": True}
    events = [
        {"event": "submitted", "job": "1"},
        crash,
        {"event": "submitted", "job": "2"},
        crash,
        {"event": "submitted", "job": "3", "after": "2"},  # where a requeue was refused
        {**crash, "action": "end"},
        crash,
    ]
    assert earlier_attempts(events) == Earlier(crash_requeues=2, was_fruitless=False, exclusions=0, losses=0)
    fruitless = {**crash, "code": 75, "cause": "interrupted", "has_saved_a_new_step": False}
    assert earlier_attempts([*events, fruitless]) == Earlier(
        crash_requeues=2, was_fruitless=True, exclusions=0, losses=0
    )
    assert earlier_attempts([*events, {**crash, "action": "exclude"}]).exclusions == 1
    assert earlier_attempts([]) == Earlier(crash_requeues=0, was_fruitless=False, exclusions=0, losses=0)
    lost = {**crash, "cause": "lost n4", "has_saved_a_new_step": False}
    assert earlier_attempts([lost, crash, lost, lost]).losses == 2
    assert earlier_attempts([lost, lost, {**lost, "has_saved_a_new_step": True}]).losses == 0


def test_a_task_of_an_array_is_named_so_that_its_siblings_are_left_alone() -> None:
    environment = {"SLURM_JOB_ID": "40", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert (job_of(environment).name, job_of(environment).restart) == ("40", 0)
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    job = job_of(environment | array | {"SLURM_JOB_ID": "44"})
    assert (job.name, job.number, job.restart) == ("40_3", 44, 2)
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST is not set"):
        job_of({"SLURM_JOB_ID": "3"})


def test_the_ports_of_jobs_differ_and_one_that_is_taken_is_passed_over() -> None:
    ports = {rendezvous_port(number, is_free=lambda _: True) for number in range(1000, 3000)}
    assert len(ports) == 2000
    first = rendezvous_port(17, is_free=lambda _: True)
    second = rendezvous_port(17, is_free=lambda port: port != first)
    assert second not in {first, rendezvous_port(18, is_free=lambda _: True)}
    with pytest.raises(ConfigError, match="no free port"):
        rendezvous_port(17, is_free=lambda _: False)
    with socket.create_server(("", 0)) as server:
        assert not is_free(server.getsockname()[1])


def test_a_job_that_is_not_that_of_the_plan_is_refused_in_one_sentence() -> None:
    check_plan({"A": "1"}, {"A": "1"})
    with pytest.raises(ConfigError, match="A is 2, the plan has 1; B is not set, the plan has 4"):
        check_plan({"A": "1", "B": "4"}, {"A": "2"})


def test_only_published_checkpoints_are_progress(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step-00000020", "step-00000100", ".tmp-step-00000200-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMMIT.json").touch()
    (tmp_path / "checkpoints" / "step-00000300").mkdir()
    assert newest_step(tmp_path) == 100


def test_what_slurm_says_of_a_job_is_read() -> None:
    text = "JobId=3 JobName=a JobState=RUNNING EndTime=2026-11-24T04:14:57 PreemptTime=None Command=/a JobState=X"
    assert outlook(text).state == "RUNNING"
    assert outlook(text).is_preempted is False
    later = outlook(text.replace("04:14:57", "05:14:57").replace("=None", "=2026-11-24T04:14:47"))
    assert later.is_preempted is True
    assert (later.end_time or 0) - (outlook(text).end_time or 0) == 3600
    assert outlook(text.replace("2026-11-24T04:14:57", "Unknown")).end_time is None
    assert outlook("").state == "UNKNOWN"


def test_the_address_of_an_interface() -> None:
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"network_interface: .* no address on nope0 .* has the interfaces lo"):
        address_of("nope0")


def test_a_node_starts_its_ranks_with_the_command_of_a_workstation() -> None:
    environment = {
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "12345",
        "HARNESS_RENDEZVOUS_ID": "40_3-2",
        "HARNESS_LOG_DIRECTORY": "/logs",
        "SLURM_STEP_NUM_NODES": "4",
    }
    command = torchrun_command(node_plan(["harness.train", "a.yaml"], environment, ranks_per_node=8))
    pairs = dict(pairwise(command))
    assert (pairs["--nnodes"], pairs["--nproc-per-node"]) == ("4", "8")
    assert (pairs["--rdzv-endpoint"], pairs["--rdzv-id"]) == ("node7:12345", "40_3-2")
    assert "--local-addr" not in command
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        node_plan(
            ["m"], {name: value for name, value in environment.items() if name != "MASTER_ADDR"}, ranks_per_node=1
        )


def test_a_task_that_is_a_rank_is_placed_by_slurm() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "A": "b"}
    placed = rank_environment(slurm)
    assert {name: placed[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "A")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "A": "b",
    }


def test_the_batch_script_needs_nothing_but_the_standard_library() -> None:
    names = ("pydantic", "yaml", "torch")
    script = (
        "import sys, harness.launch.slurm.job, harness.launch.slurm.node; "
        f"print([m for m in {names} if m in sys.modules])"
    )
    command = [sys.executable, "-S", "-c", script]  # without site-packages
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_signal_that_came_before_the_rank_could_take_it_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)\n"
        "from harness.stopping import StopSignals; s = StopSignals(); s.install(second_interrupt_ends=True)\n"
        "print(s.received and s.received.name)\n"
    )
    node = [sys.executable, "-m", "harness.launch.slurm.node", "--style", "srun", "--ranks-per-node", "2", "--", "rank"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "HARNESS_LOG_DIRECTORY": str(tmp_path),
        **{"SLURM_LOCALID": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    }
    done = subprocess.run(node, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "SIGUSR1"), done.stderr


def test_a_signal_that_came_to_the_agent_before_there_was_a_rank_is_not_lost() -> None:
    rank = "from harness.stopping import StopSignals; s = StopSignals(); s.install(second_interrupt_ends=True)"
    rank += "; print(s.received and s.received.name)"
    agent = f"""
import signal, subprocess, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
rank = {f"import os, signal; os.kill(os.getppid(), signal.SIGUSR1); {rank}"!r}
sys.exit(subprocess.run([sys.executable, "-c", rank]).returncode)
"""
    done = subprocess.run([sys.executable, "-c", agent], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "SIGUSR1"), done.stderr


def test_blocked_signals_of_a_process_are_seen() -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # not to the process: a library's thread may take it
        assert signal.SIGUSR2 in pending_signals(os.getpid())
    finally:
        signal.sigwait([signal.SIGUSR2])
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    assert pending_signals(os.getpid()) == set()

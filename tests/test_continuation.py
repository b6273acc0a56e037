"""What a job does when Slurm is away, refuses or is quicker: what a live cluster cannot be made to do at will.

Slurm's programs are stand-ins here that note how they were called; tests/slurm has the real ones.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.launch.slurm import client as slurm_client
from harness.launch.slurm import job
from harness.launch.slurm.client import NO_ANSWER, ask_patiently, ask_slurm, environment, job_state
from harness.launch.slurm.job import Continuation, attempt, meeting, run_ranks
from harness.launch.slurm.job_facts import Job, Outlook, lost_nodes
from harness.launch.slurm.preflight import PREFLIGHT_FAILED
from harness.launch.slurm.status import status_of
from harness.record.json_lines import read_events

AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
JOB = Job(number=44, name="40_3", restart=2, nodes="n[1-2]", task=3)
Install = Callable[[str, str], None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_client, "SECONDS_BETWEEN_TRIES", 0.0)

    def install(name: str, script: str) -> None:
        """Put a program on the PATH that notes its arguments in calls."""
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n{script}\n')
        (folder / name).chmod(0o755)

    return install


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def continuation(tmp_path: Path, *cancelled: int) -> Continuation:
    return Continuation(JOB, tmp_path, tmp_path / "train.sbatch", list(cancelled))


def test_a_controller_that_is_away_is_asked_again(tmp_path: Path, programs: Install) -> None:
    programs("scontrol", f"[ $(wc -l < {tmp_path}/calls) -ge 3 ] || {{ {AWAY}; }}; echo JobState=RUNNING")
    assert ask_patiently("scontrol", "show", "job", "7").stdout == "JobState=RUNNING\n"
    assert calls(tmp_path) == ["scontrol show job 7"] * 3


def test_a_controller_that_stays_away_is_given_up(
    tmp_path: Path, programs: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs("scontrol", AWAY)
    monkeypatch.setattr(slurm_client, "PATIENCE_SECONDS", 0.2)
    assert ask_patiently("scontrol", "show", "job", "7").returncode == NO_ANSWER
    assert len(calls(tmp_path)) > 1


def test_a_program_that_hangs_or_is_killed_is_no_answer(programs: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_client, "SLURM_TIMEOUT_SECONDS", 0.3)
    programs("scontrol", "exec sleep 5")
    assert ask_slurm("scontrol").returncode == NO_ANSWER
    programs("scontrol", "kill -TERM $$")
    assert ask_slurm("scontrol").returncode == NO_ANSWER


def test_a_job_is_requeued_by_its_name_and_nothing_else_is_done(tmp_path: Path, programs: Install) -> None:
    programs("scontrol", "")
    continuation(tmp_path).requeue()
    assert calls(tmp_path) == ["scontrol requeue 40_3"]


def test_where_a_requeue_is_refused_the_task_of_the_array_is_submitted_once_more(
    tmp_path: Path, programs: Install
) -> None:
    programs("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    programs("sbatch", "echo '50;cluster'")
    continuation(tmp_path).requeue()
    waits = "sbatch --parsable --dependency=afterany:40_3 --array=3"
    assert calls(tmp_path) == ["scontrol requeue 40_3", f"{waits} {tmp_path}/train.sbatch"]
    (event,) = read_events(tmp_path)
    assert (event["event"], event["job"], event["after"]) == ("submitted", "50_3", "40_3")


def test_a_job_that_was_cancelled_meanwhile_is_not_brought_back_to_life(tmp_path: Path, programs: Install) -> None:
    programs("sbatch", "echo 50")
    for script in (AWAY, "kill -TERM $$", "exit 1"):  # scancel ends a scontrol of the job as well
        programs("scontrol", script)
        continuation(tmp_path, 15).requeue()
        continuation(tmp_path, 15).without(["n1"])
    assert not any("sbatch" in call for call in calls(tmp_path))
    assert read_events(tmp_path) == []


def test_bad_nodes_are_left_out_beside_those_that_were_before(tmp_path: Path, programs: Install) -> None:
    programs("scontrol", "echo JobId=44 ExcNodeList=n7,n8 JobState=RUNNING")
    programs("sbatch", "echo 50")
    continuation(tmp_path).without(["n1", "n2"])
    assert "--exclude=n7,n8,n1,n2" in calls(tmp_path)[-1]


@pytest.mark.parametrize(("mode", "program"), [("CANCEL", "sbatch"), ("REQUEUE", "scontrol requeue")])
def test_a_preempted_job_comes_back_by_itself_where_slurm_does_not_do_it(
    tmp_path: Path, programs: Install, mode: str, program: str
) -> None:
    programs("scontrol", f"echo PartitionName=p PreemptMode={mode}")
    programs("sbatch", "echo 50")
    now = Outlook("RUNNING", end_time=1.0, is_preempted=True, partition="p")  # its announced end is long over
    continuation(tmp_path).after_preemption(now)
    assert calls(tmp_path)[0] == "scontrol show partition --oneliner p"
    assert calls(tmp_path)[-1].startswith(program)


def test_the_ranks_meet_at_one_port_and_the_nodes_at_another(programs: Install, tmp_path: Path) -> None:
    programs("scontrol", "echo JobState=RUNNING EndTime=2026-11-24T04:14:57")
    options = Namespace(interface=None, preflight_seconds="60")
    first, second = (meeting(JOB, options, nodes=["n1", "n2"], logs=tmp_path) for _ in range(2))
    assert first["MASTER_ADDR"] == "n1"
    assert first["HARNESS_ROLL_CALL"].partition(":")[2] not in ("", first["MASTER_PORT"])
    assert first["HARNESS_RENDEZVOUS_ID"].startswith("40_3-2-")
    assert first["HARNESS_RENDEZVOUS_ID"] != second["HARNESS_RENDEZVOUS_ID"]
    assert float(first["HARNESS_END_TIME"]) > 1.7e9


@pytest.mark.parametrize(
    ("srun", "code"),
    [
        ("exit 0", 1),  # no rank wrote exit.json: srun could start none
        ("exit 9", 9),
        ("kill -KILL $$", 137),
        ("echo '{\"code\": 75}' > exit.json; exit 1", 75),
        ("echo '{\"code\": 0}' > exit.json; exit 0", 0),
        ("echo '{\"code\": 75}' > exit.json; exit 8", 8),  # of the run that holds the directory
        (f"echo '{{\"code\": 2}}' > exit.json; touch {PREFLIGHT_FAILED}; exit 143", 76),
    ],
)
def test_the_code_of_a_run_is_its_own_word(
    tmp_path: Path, programs: Install, monkeypatch: pytest.MonkeyPatch, srun: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exit.json").write_text(json.dumps({"code": 0}))  # of an earlier attempt
    programs("srun", srun)
    assert run_ranks(["srun"], tmp_path, logs=tmp_path, environment=os.environ) == code
    assert calls(tmp_path) == [f"srun --output={tmp_path}/task-%t.log"]


def test_a_run_that_is_done_is_trained_on_by_a_new_job_and_not_by_one_that_is_queued_again(
    tmp_path: Path, programs: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "leave_signals_to_the_ranks", list)
    programs("scontrol", "case $2 in hostnames) echo n1 ;; job) echo JobState=RUNNING ;; esac")
    programs("srun", f"echo '{{\"code\": 2}}' > {tmp_path}/exit.json")
    options = {"expect": [], "interface": None, "preflight_seconds": "5", "max_crash_requeues": 0, "script": None}
    (tmp_path / "exit.json").write_text(json.dumps({"code": 0}))
    for restart, code in ((1, 0), (0, 2)):
        new = Job(number=44, name="44", restart=restart, nodes="n1")
        assert attempt(new, Namespace(run_directory=tmp_path, **options), ["srun"]) == code
    assert sum(call.startswith("srun") for call in calls(tmp_path)) == 1


def test_nodes_that_are_down_or_do_not_answer_are_lost(programs: Install) -> None:
    programs("sinfo", r"printf 'n1 allocated\nn2 down\nn3 allocated*\nn4 failing\nn5 idle\n'")
    assert lost_nodes(JOB) == ("n2", "n3", "n4")


def test_what_slurm_said_of_this_process_is_not_passed_on() -> None:
    found = {
        **{"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "5", "SLURM_TIME_FORMAT": "relative", "SQUEUE_FORMAT": "%i"},
        **{"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "us", "HOME": "/home/us"},
    }
    kept = {name: found[name] for name in ("SLURM_CONF", "SBATCH_ACCOUNT", "HOME")}
    assert environment(found) == {**kept, "SLURM_TIME_FORMAT": "standard"}


def test_no_answer_is_not_taken_for_no_job(tmp_path: Path, programs: Install) -> None:
    programs("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_state("7") is None
    programs("squeue", AWAY)
    with pytest.raises(ConfigError, match="does not say how job 7 stands"):
        job_state("7")
    (tmp_path / "events.jsonl").write_text('{"event": "submitted", "job": "7"}\n')
    assert "job 7 in an unknown state (Slurm does not answer here)" in status_of(tmp_path).line()

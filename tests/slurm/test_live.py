"""Runs on a live Slurm cluster: interrupted, killed, requeued, and the same in the end."""

from __future__ import annotations

import json
import random
import shlex
import signal
import socket
import time

import pytest

from harness.errors import ConfigError
from launch import cli
from launch.network import FIRST_PORT
from launch.status import cancel, newest_log, status_of
from tests.slurm.jobs import Run, Site, interrupt

LONG = "run.max_steps=10000000"


def test_a_finished_job_that_is_requeued_by_hand_ends_at_once(site: Site) -> None:
    run = site.submit("done")
    run.ends_as("COMPLETED")
    assert run.exit_code == 0
    ledger = run.ledger()
    run.requeue()
    run.wait_for(lambda: run.restarts == 1 and run.shown("JobState") == "COMPLETED", "a second end")
    assert run.ledger() == ledger
    assert len(run.events("started")) == 1
    assert not (run.directory / "logs" / run.job / "r1").exists()


def test_an_interrupted_job_comes_back_and_ends_with_the_ledger_of_an_undisturbed_one(site: Site) -> None:
    run = site.submit("disturbed", LONG, "tracking.wandb={mode: offline}", style="torchrun", ranks_per_node=2)
    interrupt(run, random.Random(1), times=3)
    run.finish_soon()
    run.ends_as("COMPLETED")
    assert run.causes() == [(75, "requeue")] * 3 + [(0, "end")]
    assert run.restarts == 3
    undisturbed = site.submit("undisturbed", f"run.max_steps={run.step()}", ranks_per_node=2)
    undisturbed.ends_as("COMPLETED")
    assert run.ledger() == undisturbed.ledger()
    identity = json.loads((run.directory / "run.json").read_text())["id"]
    segments = [path.name for path in (run.directory / "wandb").glob("offline-run-*")]
    assert len(segments) == 4
    assert all(name.endswith(f"-{identity}") for name in segments), "one run in wandb, in four parts"
    for restart in range(4):
        assert f"host node1, rank 1 of 2, local rank 1, device cpu, restart {restart}," in run.log(restart, 1)


def test_a_job_whose_training_diverges_is_not_requeued(site: Site) -> None:
    run = site.submit("diverging", "optim.peak_lr=1e30")
    run.ends_as("FAILED")
    assert run.shown("ExitCode") == "6:0"
    assert run.causes() == [(6, "end")]
    assert run.restarts == 0


def test_a_cancelled_job_stays_cancelled(site: Site) -> None:
    run = site.submit("cancelled", LONG)
    run.wait_for_step(50)
    assert "running, 0 restarts" in status_of(run.directory).line()
    assert newest_log(run.directory).name == "rank-0.log"
    assert "is cancelled" in cancel([run.directory])[0]
    run.ends_as("CANCELLED")
    assert "cancelled, 0 restarts" in status_of(run.directory).line()
    assert run.causes() == [(75, "leave")]
    with pytest.raises(ConfigError, match="no job that waits or runs"):
        cancel([run.directory])
    time.sleep(8)  # longer than Slurm waits before it starts a requeued job
    assert run.shown("JobState") == "CANCELLED"
    assert run.restarts == 0


def test_a_job_that_crashes_comes_back_so_often_and_only_with_a_new_step(site: Site) -> None:
    run = site.submit("crashing", LONG, max_crash_requeues=1)
    for restart in range(2):
        saved = len(run.events("saved"))
        run.wait_for(lambda saved=saved: len(run.events("saved")) > saved, "a save")
        run.kill_rank()
        run.wait_for(lambda restart=restart: len(run.events("job ended")) == restart + 1, "the end of an attempt")
    run.ends_as("FAILED")
    assert run.causes() == [(137, "requeue"), (137, "end")]
    assert "after 1 requeues" in run.events("job ended")[-1]["cause"]

    fruitless = site.submit("fruitless", LONG, "checkpoint.every_steps=null", "evaluation.every_steps=1000000")
    fruitless.wait_for_step(50)
    fruitless.kill_rank()
    fruitless.ends_as("FAILED")
    assert fruitless.causes() == [(137, "end")]


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_two_nodes_with_two_ranks_each_train_the_same_under_both_styles(site: Site, strategy: str) -> None:
    runs = []
    for style in ("torchrun", "srun"):
        run = site.submit(f"{strategy}-{style}", f"strategy.kind={strategy}", style=style, nodes=2, ranks_per_node=2)
        run.ends_as("COMPLETED")
        assert run.causes() == [(0, "end")]
        hosts = {run.log(0, rank).split("host ")[1].split(",")[0] for rank in range(4)}
        assert hosts == {"node1", "node2"}
        runs.append(run)
    assert runs[0].ledger() == runs[1].ledger()
    assert len(runs[0].ledger()) == 402


def test_a_preempted_job_is_requeued_once_and_goes_on(site: Site) -> None:
    run = site.submit("preempted", LONG, partition="preempt")
    run.wait_for_step(50)
    site.cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    run.wait_for(lambda: run.events("job ended"), "the end of the first attempt")
    run.finish_soon()
    run.ends_as("COMPLETED")
    assert run.causes() == [(75, "leave"), (0, "end")]
    assert run.events("job ended")[0]["cause"] == "preempted"
    assert run.restarts == 1
    assert run.events("started")[1]["step"] == run.events("job ended")[0]["step"] > 0


def test_a_preempted_job_comes_back_where_slurm_only_ends_such_jobs(site: Site) -> None:
    run = site.submit("ended", LONG, partition="ended")
    run.wait_for_step(50)
    first = run.job
    site.cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    run.wait_for(lambda: len(run.events("submitted")) == 2, "another job")
    run.finish_soon()
    run.job = run.events("submitted")[1]["job"]
    assert run.events("submitted")[1]["after"] == first
    run.ends_as("COMPLETED")
    assert run.causes() == [(75, "leave"), (0, "end")]


def test_a_job_comes_back_though_the_controller_was_away_when_its_attempt_ended(site: Site) -> None:
    run = site.submit("alone", LONG)
    run.wait_for_step(50)
    site.cluster.pause_controller()
    try:
        run.kill_rank(signal.SIGUSR1)
        run.wait_for(lambda: run.exit_file.exists() and run.exit_code == 75, "the end of the ranks")
        time.sleep(5)
        assert not run.events("job ended"), "nothing is decided before Slurm has said how the job stands"
    finally:
        site.cluster.resume_controller()
    run.wait_for(lambda: run.events("job ended"), "a decision", seconds=150)
    run.finish_soon()
    run.ends_as("COMPLETED")
    assert run.causes() == [(75, "requeue"), (0, "end")]


def test_a_check_writes_nothing_and_a_finished_run_that_is_to_go_on_is_not_taken_for_done(site: Site) -> None:
    run = site.submit("more", "run.max_steps=100")
    run.ends_as("COMPLETED")
    site.submit("more", "run.max_steps=7", options=("--check",))
    assert "max_steps: 100" in (run.directory / "slurm" / "config.yaml").read_text()
    site.submit("more", "run.max_steps=300")
    run = Run(site.cluster, run.directory)
    run.requeue()  # before a rank has begun
    run.ends_as("COMPLETED")
    assert run.step() == 300


def test_a_job_that_lost_a_node_goes_on_from_the_last_periodic_save(site: Site) -> None:
    run = site.submit("lost", LONG, nodes=2)
    run.wait_for(lambda: len(run.events("saved")) > 1, "two saves")
    site.cluster.kill_node("node2")
    try:
        run.wait_for(lambda: run.restarts == 1, "a requeue")
        run.finish_soon()
        run.ends_as("COMPLETED")
    finally:
        site.cluster.start_node("node2")
    assert run.events("job started")[1]["nodes"] == ["node1", "node3"]
    assert not run.events("job ended")[:-1] or run.events("job ended")[0]["cause"].startswith(("lost node2", "Slurm"))
    step = run.events("started")[1]["step"]
    assert step == max(line["step"] for line in run.events("saved") if line["time"] < run.events("started")[1]["time"])
    assert step % 200 == 0
    assert run.exit_code == 0


def test_a_job_that_reaches_its_time_limit_saves_before_it_and_comes_back(site: Site) -> None:
    run = site.submit("limited", LONG, time_limit_minutes=1, signal_lead_seconds=15)
    run.wait_for(lambda: run.events("job ended"), "the end of the first attempt", seconds=150)
    run.finish_soon()
    run.ends_as("COMPLETED")
    *interrupted, last = run.causes()  # where the machine is so busy that a start takes half a minute, more than one
    assert set(interrupted) == {(75, "requeue")}
    assert run.events("ended")[0]["signal"] == "SIGUSR1"
    assert last == (0, "end")
    assert run.restarts == len(interrupted)
    starts = [line["step"] for line in run.events("started")]
    assert starts == sorted(set(starts)), "every attempt goes on from a later update"


def test_jobs_on_one_node_do_not_meet_at_one_port_nor_at_a_port_that_is_taken(site: Site) -> None:
    last = int(site.cluster.ask("sbatch", "--parsable", "--output=/dev/null", "--wrap=true"))
    taken = FIRST_PORT + last + 1
    with socket.create_server(("", taken)):
        runs = [site.submit(f"beside-{index}", style="torchrun", ranks_per_node=2) for index in range(2)]
        for run in runs:
            run.ends_as("COMPLETED")
    assert [int(run.job) for run in runs] == [last + 1, last + 2]
    ports = [int(run.events("job started")[0]["rendezvous"].partition(":")[2]) for run in runs]
    assert len({taken, *ports}) == 3


def test_where_a_requeue_is_refused_a_new_job_goes_on_in_the_same_directory(site: Site) -> None:
    run = site.submit("refused", LONG)
    first = run.job
    site.cluster.ask("scontrol", "update", f"JobId={first}", "Requeue=0")
    run.wait_for_step(50)
    run.signal("USR1")
    run.wait_for(lambda: len(run.events("submitted")) == 2, "another job")
    run.finish_soon()
    run.job = run.events("submitted")[1]["job"]
    assert run.job != first
    assert run.events("submitted")[1]["after"] == first
    run.ends_as("COMPLETED")
    assert run.causes() == [(75, "requeue"), (0, "end")]
    assert run.exit_code == 0


def test_a_job_that_is_not_the_one_of_its_plan_says_so_and_does_not_start(site: Site) -> None:
    run = site.submit("changed")
    site.cluster.ask("scancel", run.job)
    site.cluster.ask("sbatch", "--nodes=2", str(run.directory / "slurm" / "train.sbatch"))
    run.job = str(int(run.job) + 1)
    run.ends_as("FAILED")
    assert run.shown("ExitCode") == "2:0"
    log = (run.directory / "logs" / f"slurm-{run.job}.log").read_text()
    assert "SLURM_JOB_NUM_NODES is 2, the plan has 1" in log
    assert log.count("\n") == 1


def test_a_run_is_not_submitted_twice(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    run = site.submit("once", LONG)
    with pytest.raises(AssertionError, match="ended with 2"):
        site.submit("once")
    assert f"is trained by job {run.job} (" in capsys.readouterr().err


def test_what_slurm_refuses_is_told_in_its_words(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ((), ("--check",)):
        with pytest.raises(AssertionError, match="ended with 2"):
            site.submit("nowhere", partition="nowhere", options=option)
        assert "invalid partition specified: nowhere" in capsys.readouterr().err


def test_a_sweep_is_an_array_of_runs_of_which_only_those_that_failed_are_submitted_again(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.folder / "grid.yaml").write_text("optim.peak_lr: [0.01, 1e30]\noptim.momentum: [0.5, 0.9]\n")
    options = ("--sweep", "grid.yaml", "--at-once", "2")
    array = site.submit_sweep("sweep", options=options)
    most = 0
    while states := site.cluster.ask("squeue", "--noheader", "--array", "--format", "%T").split():
        most = max(most, states.count("RUNNING"))
        time.sleep(0.3)
    assert most == 2
    runs = [Run(site.cluster, site.folder / "runs/sweep" / f"{index:03d}") for index in range(4)]
    assert [run.job for run in runs] == [f"{array}_{index}" for index in range(4)]
    assert [run.exit_code for run in runs] == [0, 0, 6, 6]
    assert [run.ledger()[0]["learning_rate"] for run in runs] == [0.01, 0.01, 1e30, 1e30]
    capsys.readouterr()
    assert cli.main(["status", "runs/sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("exit code ")[1][0] for line in lines] == ["0", "0", "6", "6"]
    assert lines[3].endswith("optim.peak_lr=1e+30  optim.momentum=0.9")
    again = site.submit_sweep("sweep", options=options)
    assert [run.events("submitted")[-1]["job"] for run in runs[2:]] == [f"{again}_2", f"{again}_3"]
    assert len(runs[0].events("submitted")) == 1


def test_a_node_whose_disk_hangs_is_named_and_left_out(site: Site) -> None:
    folder = site.folder / "hanging"  # on node2 no python gets to the sum that the nodes begin with
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "while os.uname().nodename == 'node2' and 'harness.strategy.roll_call' in sys.orig_argv:\n"
        "    time.sleep(1)\n"
    )
    setup = [f"export PYTHONPATH={shlex.quote(str(folder))}:$PYTHONPATH"]
    run = site.submit("hanging", nodes=2, preflight_seconds=20, setup=setup)
    run.ends_as("FAILED")
    run.job = run.events("submitted")[1]["job"]
    run.ends_as("COMPLETED")
    assert run.causes() == [(76, "exclude"), (0, "end")]
    assert [line["nodes"] for line in run.events("job started")] == [["node1", "node2"], ["node1", "node3"]]
    assert "bad nodes node2" in run.events("job ended")[0]["cause"]
    log = (run.directory / "logs" / f"slurm-{run.events('submitted')[0]['job']}.log").read_text()
    assert "node node2 cannot train: did not answer node1 in 20 s" in log


def test_a_bad_node_is_named_and_the_job_goes_on_without_it(site: Site) -> None:
    program = site.folder / "bin" / "nvidia-smi"  # node1 has lost its GPU
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n[ \"$(hostname)\" = node1 ] || echo 'GPU 0: pretended (UUID: GPU-a)'\n")
    program.chmod(0o755)
    setup = [f"export PATH={shlex.quote(str(program.parent))}:$PATH"]
    run = site.submit("bad", gpus_per_node=1, ranks_per_node=None, setup=setup)
    run.ends_as("FAILED")
    first = run.job
    run.job = run.events("submitted")[1]["job"]
    run.ends_as("COMPLETED")
    assert run.causes() == [(76, "exclude"), (0, "end")]
    assert [line["nodes"] for line in run.events("job started")] == [["node1"], ["node2"]]
    log = (run.directory / "logs" / f"slurm-{first}.log").read_text()
    assert "node node1 cannot train: nvidia-smi shows 0 GPUs, Slurm gave this node 1" in log

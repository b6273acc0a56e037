"""What comes after an attempt at a job on a live Slurm cluster: the run goes on where it should, and ends where not."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest

from harness.errors import ConfigError
from harness.launch.slurm.status import cancel, newest_log, status_of
from tests.slurm.jobs import LONG, Site, interrupt


def test_an_interrupted_job_comes_back_and_ends_with_the_ledger_of_an_undisturbed_run(site: Site) -> None:
    run = site.submit("disturbed", LONG, "tracking.wandb={mode: offline}", style="torchrun", ranks_per_node=2)
    interrupt(run, random.Random(1), times=2)
    run.finish_soon()
    run.ends_as("COMPLETED")
    assert run.causes() == [(75, "requeue")] * 2 + [(0, "end")]
    assert run.restarts == 2
    assert run.ledger() == site.undisturbed("undisturbed", f"run.max_steps={run.step()}", ranks=2)
    identity = json.loads((run.directory / "run.json").read_text())["id"]
    segments = [path.name for path in (run.directory / "wandb").glob("offline-run-*")]
    assert len(segments) == 3
    assert all(name.endswith(f"-{identity}") for name in segments), "one run in wandb, in three parts"
    for restart in range(3):
        assert f"host node1, rank 1 of 2, local rank 1, device cpu, restart {restart}," in run.log(restart, 1)


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
    fruitless = site.submit("fruitless", LONG, "checkpoint.every_steps=null", "evaluation.every_steps=1000000")
    fruitless.wait_for_step(50)
    fruitless.kill_rank()
    for restart in range(2):
        saved = len(run.events("saved"))
        run.wait_for(lambda saved=saved: len(run.events("saved")) > saved, "a save")
        run.kill_rank()
        run.wait_for(lambda restart=restart: len(run.events("job ended")) == restart + 1, "the end of an attempt")
    run.ends_as("FAILED")
    assert run.causes() == [(137, "requeue"), (137, "end")]
    assert "after 1 requeues" in run.events("job ended")[-1]["cause"]
    fruitless.ends_as("FAILED")
    assert fruitless.causes() == [(137, "end")]


def test_a_preempted_job_comes_back_once_whether_slurm_requeues_or_only_ends_such_jobs(site: Site) -> None:
    run, ended = (site.submit(name, LONG, partition=name) for name in ("preempt", "ended"))
    first = ended.job
    for job in (run, ended):
        job.wait_for_step(50)
    site.cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    run.wait_for(lambda: run.events("job ended"), "the end of the first attempt")
    run.finish_soon()
    ended.wait_for(lambda: len(ended.events("submitted")) == 2, "another job")
    ended.finish_soon()
    run.ends_as("COMPLETED")
    assert run.causes() == [(75, "leave"), (0, "end")]
    assert run.events("job ended")[0]["cause"] == "preempted"
    assert (run.restarts, len(run.events("submitted"))) == (1, 1)
    assert run.events("started")[1]["step"] == run.events("job ended")[0]["step"] > 0
    assert ended.events("submitted")[1]["after"] == first
    ended.job = ended.events("submitted")[1]["job"]
    ended.ends_as("COMPLETED")
    assert ended.causes() == [(75, "leave"), (0, "end")]


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

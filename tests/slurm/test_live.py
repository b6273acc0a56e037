"""Runs on a live Slurm cluster: interrupted, killed, requeued, and the same in the end."""

from __future__ import annotations

import random
import time

import pytest

from tests.slurm.jobs import Run, Site

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
    undisturbed = site.submit("undisturbed", "run.max_steps=3000")
    undisturbed.ends_as("COMPLETED")
    run = site.submit("disturbed", "run.max_steps=3000")
    interrupt(run, random.Random(1), times=3)
    run.ends_as("COMPLETED")
    assert run.causes() == [(75, "requeue")] * 3 + [(0, "end")]
    assert run.restarts == 3
    assert run.ledger() == undisturbed.ledger()
    for restart in range(4):
        assert f"host node1, rank 0 of 1, local rank 0, device cpu, restart {restart}," in run.log(restart, 0)


def interrupt(run: Run, numbers: random.Random, *, times: int) -> None:
    """Send the ranks of a run the signal that comes before the time limit, in so many attempts, at any moment."""
    for restart in range(times):
        run.wait_for_attempt(restart)
        time.sleep(numbers.uniform(0.5, 5))
        run.signal("USR1")
        run.wait_for(lambda: len(run.events("job ended")) == restart + 1, f"the end of attempt {restart}")  # noqa: B023


def test_a_job_whose_training_diverges_is_not_requeued(site: Site) -> None:
    run = site.submit("diverging", "optim.peak_lr=1e30")
    run.ends_as("FAILED")
    assert run.shown("ExitCode") == "6:0"
    assert run.causes() == [(6, "end")]
    assert run.restarts == 0


def test_a_cancelled_job_stays_cancelled(site: Site) -> None:
    run = site.submit("cancelled", LONG)
    run.wait_for_step(50)
    site.cluster.ask("scancel", run.job)
    run.ends_as("CANCELLED")
    time.sleep(8)  # longer than Slurm waits before it starts a requeued job
    assert run.shown("JobState") == "CANCELLED"
    assert run.restarts == 0


def test_a_job_that_crashes_comes_back_so_often_and_only_with_a_new_step(site: Site) -> None:
    run = site.submit("crashing", LONG, max_crash_requeues=1)
    for restart in range(2):
        saved = len(run.events("saved"))
        run.wait_for(lambda saved=saved: len(run.events("saved")) > saved, "a save")
        run.signal("KILL")
        run.wait_for(lambda restart=restart: len(run.events("job ended")) == restart + 1, "the end of an attempt")
    run.ends_as("FAILED")
    assert run.causes() == [(137, "requeue"), (137, "end")]
    assert "after 1 requeues" in run.events("job ended")[-1]["cause"]

    fruitless = site.submit("fruitless", LONG, "checkpoint.every_steps=null", "evaluation.every_steps=1000000")
    fruitless.wait_for_step(50)
    fruitless.signal("KILL")
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

"""Jobs on a live Slurm cluster: what is submitted, on which nodes it runs, and that it trains as on one machine."""

from __future__ import annotations

import re
import shlex
import socket
import time
from itertools import product

import pytest

from harness.launch import cli
from harness.launch.slurm.network import FIRST_PORT
from tests.slurm.jobs import LONG, Run, Site


@pytest.mark.parametrize(
    ("by_torchrun", "by_srun"), [("ddp", "zero1"), pytest.param("zero1", "ddp", marks=pytest.mark.long)]
)
def test_two_jobs_on_the_same_two_nodes_each_train_as_four_ranks_of_one_machine_and_do_not_meet_at_one_port(
    site: Site, by_torchrun: str, by_srun: str
) -> None:
    last = int(site.cluster.ask("sbatch", "--parsable", "--output=/dev/null", "--wrap=true"))
    taken = FIRST_PORT + last + 1  # the first choice of the first job
    runs, brief = {}, ("run.max_steps=40", "evaluation.every_steps=20", "checkpoint.every_steps=20")
    with socket.create_server(("", taken)):
        for style, strategy in (("torchrun", by_torchrun), ("srun", by_srun)):
            overrides = (f"strategy.kind={strategy}", *brief)
            runs[strategy] = site.submit(style, *overrides, style=style, nodes=2, ranks_per_node=2)
        for run in runs.values():
            run.ends_as("COMPLETED")
    for strategy, run in runs.items():
        assert run.causes() == [(0, "end")]
        places = [re.search(rf"host (\S+), rank {rank} of 4, local rank (\d),", run.log(0, rank)) for rank in range(4)]
        assert {place and place.groups() for place in places} == set(product(("node1", "node2"), ("0", "1")))
        assert run.ledger() == site.undisturbed(strategy, f"strategy.kind={strategy}", *brief, ranks=4)
        assert len(run.ledger()) == 42
    assert [int(run.job) for run in runs.values()] == [last + 1, last + 2]
    ports = [int(run.events("job started")[0]["rendezvous"].partition(":")[2]) for run in runs.values()]
    assert len({taken, *ports}) == 3


def test_a_finished_job_that_is_requeued_by_hand_ends_at_once_unless_its_run_is_to_go_on(site: Site) -> None:
    run = site.submit("done", "run.max_steps=100", "tracking.report=true")
    run.ends_as("COMPLETED")
    assert run.exit_code == 0
    ledger = run.ledger()
    run.requeue()
    run.wait_for(lambda: run.restarts == 1 and run.shown("JobState") == "COMPLETED", "a second end")
    assert run.ledger() == ledger
    assert len(run.events("started")) == 1
    assert not (run.directory / "logs" / run.job / "r1").exists()

    site.submit("done", "run.max_steps=7", options=("--check",))
    assert "max_steps: 100" in (run.directory / "slurm" / "config.yaml").read_text(), "a check writes nothing"
    again = site.submit("done", "run.max_steps=300", setup=['[ -n "$SLURM_RESTART_COUNT" ] || sleep 100'])
    again.wait_for(lambda: again.shown("JobState") == "RUNNING", "a start")
    again.requeue()  # before a rank has begun
    again.ends_as("COMPLETED")
    assert (again.restarts, again.step()) == (1, 300)


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
    run = site.submit("once", LONG, setup=["sleep 300"])  # no rank needs to begin
    with pytest.raises(AssertionError, match="ended with 2"):
        site.submit("once")
    assert f"is trained by job {run.job} (" in capsys.readouterr().err


def test_what_slurm_refuses_is_told_in_its_words(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ((), ("--check",)):
        with pytest.raises(AssertionError, match="ended with 2"):
            site.submit("nowhere", partition="nowhere", options=option)
        assert "invalid partition specified: nowhere" in capsys.readouterr().err


def test_a_sweep_is_an_array_of_runs_of_which_those_that_diverge_are_not_requeued_and_only_they_submitted_again(
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
    assert [run.causes() for run in runs] == [[(0, "end")]] * 2 + [[(6, "end")]] * 2
    assert [(run.shown("JobState"), run.shown("ExitCode")) for run in runs[2:]] == [("FAILED", "6:0")] * 2
    assert [run.restarts for run in runs] == [0] * 4
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
        "while os.uname().nodename == 'node2' and 'harness.ranks.roll_call' in sys.orig_argv:\n"
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
    # To ranks it shows none: they would refuse to train on CPUs beside a GPU that torch cannot use.
    shown = '[ "$(hostname)" = node1 ] || [ -n "$RANK" ] || echo \'GPU 0: pretended (UUID: GPU-a)\''
    program.write_text(f"#!/bin/sh\n{shown}\n")
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

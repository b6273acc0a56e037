"""Whole runs whose rows are read by workers: what ends them, what is said of it, and how they go on."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.rows.order import BatchPlan
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main
from tests.distributed.starts import train_on_standing_ranks
from tests.distributed.worker_runs import files, lines, without_leftovers
from tests.helpers import plain_ledger, wait_until, write_config

ROOT = Path(__file__).parents[2]
PARTS = Path(__file__).parent / "fault_rows.py"
NUM_ROWS, BATCH, UPDATES, SEED = 200, 8, 12, 3
SECONDS = 60
"""For a run to end by itself."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with without_leftovers():
        yield


def config(folder: Path, name: str = "a", *, data: dict[str, Any] | None = None, **parts: Any) -> str:
    """Write a run that saves after every update, and its parts.

    Args:
        parts: the constants of `fault_rows`.
    """
    text = PARTS.read_text()
    before = re.search(r"^NUM_ROWS, .*$", text, re.MULTILINE)
    assert before, "the constants of fault_rows"
    constants = {"NUM_ROWS": NUM_ROWS, "AT": 0, "MARKER": "", "FAULT": "", "CHANGE": 0.0, "SAID": "", **parts}
    line = f"{', '.join(constants)} = {', '.join(map(repr, constants.values()))}"
    (folder / PARTS.name).write_text(text.replace(before[0], line))
    values = {
        "use": [PARTS.name],
        "run": {"name": name, "max_steps": UPDATES, "output_root": str(folder / "runs"), "seed": SEED},
        "model": {"kind": "fault_line"},
        "data": {"source": "fault_rows", "global_batch": BATCH, "workers": 2, **(data or {})},
        "task": {"kind": "fault_fit"},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
        "strategy": {"kind": "ddp", "micro_batch": 2},
        "checkpoint": {"every_steps": 1, "keep_last": 2},
        "tracking": {"report": False},
    }
    return str(write_config(folder / f"{name}.yaml", values))


def train(world_size: int, *arguments: str) -> list[tuple[int, str]]:
    return train_on_standing_ranks(world_size, *arguments)


def trained(world_size: int, folder: Path, name: str, *overrides: str, **parts: Any) -> Path:
    """Train a run to its end."""
    answers = train(world_size, config(folder, name, **parts), *overrides)
    assert [code for code, _ in answers] == [0] * world_size, answers
    return folder / "runs" / name


def refused(world_size: int, *arguments: str, code: int = 3) -> str:
    """Return what rank zero says of a run that no rank can begin."""
    answers = train(world_size, *arguments)
    assert [found for found, _ in answers] == [code] * world_size, answers
    assert "Traceback" not in "".join(said for _, said in answers)
    return answers[0][1]


def ending(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "exit.json").read_bytes())
    return found


def assert_same(found: Path, wanted: Path) -> None:
    assert plain_ledger(found / "ledger.jsonl") == plain_ledger(wanted / "ledger.jsonl")
    assert files(found, UPDATES) == files(wanted, UPDATES)


def row_of(position: int, rank: int, world_size: int) -> int:
    """Return a row of the training split that this rank reads there for the first time."""
    plan = BatchPlan(num_rows=NUM_ROWS, global_batch=BATCH, world_size=world_size, micro_batch=2, seed=SEED)
    return int(plan.sample_ids(position, rank)[0])


@dataclass
class Ended:
    """How a rank has ended that trained in a process of its own."""

    code: int
    seconds: float
    said: str
    """On both streams, also by its workers."""
    workers_left: int


def listened(world_size: int, folder: Path, *overrides: str, **parts: Any) -> list[Ended]:
    """Train a run in processes of its own, and return how each rank has ended."""
    found: list[Ended] = run_ranks(world_size, train_and_listen, str(folder), config(folder, **parts), *overrides)
    return found


def train_and_listen(folder: str, *arguments: str) -> Ended:
    """Train on this rank, and listen to the descriptors that its workers have inherited."""
    path, began = Path(folder) / f"said-{os.environ['RANK']}.txt", time.monotonic()
    with path.open("w") as said:
        for descriptor in (1, 2):
            os.dup2(said.fileno(), descriptor)
    code = train_main(*arguments)
    sys.stdout.flush(), sys.stderr.flush()
    return Ended(code, time.monotonic() - began, path.read_text(), len(own_workers()))


def own_workers() -> list[int]:
    """Return the workers that this process has."""
    children = [
        child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "pt_data_worker\n"]


def processes_of(folder: Path) -> list[int]:
    """Return the processes that were started with this temporary folder, and have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_one = f"TMPDIR={folder}\0".encode() in (path / "environ").read_bytes()
            if is_one and (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(path.name))
    return found


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `harness` in a session of its own, as a shell does in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness.launch.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def num_updates(run: Path) -> int:
    path = run / "ledger.jsonl"
    return path.read_bytes().count(b'"update"') if path.exists() else 0


# ---------------------------------------------------------------- what ends a run


def test_a_row_that_raises_in_a_worker_ends_all_ranks_and_is_told_by_rank_row_and_line(tmp_path: Path) -> None:
    row = row_of(7, rank=1, world_size=2)
    of_ranks = listened(2, tmp_path, FAULT="raises", AT=row)
    assert [(ended.code, ended.workers_left) for ended in of_ranks] == [(3, 0), (3, 0)]
    assert max(ended.seconds for ended in of_ranks) < SECONDS
    ended = ending(tmp_path / "runs/a")
    for text in (ended["reason"], of_ranks[0].said):
        assert f"row {row} of Rows raised KeyError: 'pixels' ({tmp_path / PARTS.name}, line " in text
        assert 'raise KeyError("pixels")) (on rank 1)' in text
    assert ended["code"] == 3
    assert "Traceback" not in "".join(rank.said for rank in of_ranks)
    assert 2 <= ended["step"] <= 7
    assert_same(trained(2, tmp_path, "a"), trained(2, tmp_path, "b"))


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_3_and_the_same_command_goes_on(tmp_path: Path) -> None:
    row = row_of(7, rank=1, world_size=2)
    given = config(tmp_path, FAULT="kills itself", MARKER=str(tmp_path / "killed"), AT=row)
    with command(tmp_path, "launch", given, "--gpus", "2") as launch:
        wait_until((tmp_path / "killed").exists, "the worker to die", seconds=SECONDS)
        began = time.monotonic()
        out, err = launch.communicate(timeout=SECONDS)
    assert launch.returncode == 3, err
    assert time.monotonic() - began < 20
    assert not processes_of(tmp_path)
    said = re.compile(
        rf"a worker that reads rows ahead for rank 1 \(process \d+\) was ended by SIGKILL, while it read rows .*{row}"
        r".* \(2 rows\)\. .*memory.*start the same command again"
    )
    ended = ending(tmp_path / "runs/a")
    assert ended["code"] == 3
    assert said.search(ended["reason"])
    assert said.search(err)
    assert "Traceback" not in out + err
    assert num_updates(tmp_path / "runs/a") <= 7
    assert_same(trained(2, tmp_path, "a"), trained(2, tmp_path, "b"))


# ---------------------------------------------------------------- how a run stops


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_the_run_and_leaves_none(number: signal.Signals, tmp_path: Path) -> None:
    run = tmp_path / "runs/a"
    given = config(tmp_path)
    with command(tmp_path, "train", given, "run.max_steps=100000") as process:
        wait_until(lambda: num_updates(run) > 20, "updates", seconds=SECONDS)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, err
    assert not processes_of(tmp_path)
    assert "interrupted after update" in out
    assert err == ""
    step = ending(run)["step"]
    assert ending(run)["code"] == 75
    assert num_updates(run) == step > 20
    (ranks,) = train(1, given, f"run.max_steps={step + 3}")
    assert ranks[0] == 0, ranks
    trained(1, tmp_path, "b", f"run.max_steps={step + 3}", "data.workers=0")
    assert lines(run) == lines(tmp_path / "runs/b")
    assert files(run, step + 3) == files(tmp_path / "runs/b", step + 3)


@pytest.mark.parametrize(
    ("parts", "overrides", "code", "reason"),
    [
        ({}, (), 0, "the budget is spent"),
        ({}, ("early_stopping={patience_evaluations: 1, min_delta: 1000}", "evaluation.every_steps=2"), 0, "patience"),
        ({"FAULT": "validation: stops the run", "AT": 70}, ("evaluation.every_steps=2",), 75, "interrupted"),
        ({"FAULT": "stops the run", "AT": "of 5"}, (), 75, "interrupted"),
    ],
    ids=["budget", "patience", "in an evaluation", "in training"],
)
def test_however_a_run_ends_no_worker_is_left_or_heard_of(
    parts: dict[str, Any], overrides: tuple[str, ...], code: int, reason: str, tmp_path: Path
) -> None:
    if parts.get("AT") == "of 5":
        parts = {**parts, "AT": row_of(5, rank=1, world_size=2)}
    of_ranks = listened(2, tmp_path, *overrides, **parts)
    assert [(ended.code, ended.workers_left) for ended in of_ranks] == [(code, 0)] * 2, of_ranks
    assert reason in of_ranks[0].said
    assert of_ranks[1].said == ""
    lines = of_ranks[0].said.splitlines()
    said = [line for line in lines if not line.startswith("data.workers: ")]  # how many they are
    assert not re.search("worker|Traceback|Warning|Error|Exception", "\n".join(said))


def test_a_validation_row_that_raises_in_a_worker_ends_the_run_with_3_in_its_evaluation(tmp_path: Path) -> None:
    of_ranks = listened(2, tmp_path, "evaluation.every_steps=4", FAULT="validation: raises", AT=177)
    assert [(ended.code, ended.workers_left) for ended in of_ranks] == [(3, 0)] * 2, of_ranks
    assert "row 177 of Rows raised KeyError: 'pixels'" in ending(tmp_path / "runs/a")["reason"]
    assert "(on rank 1)" in ending(tmp_path / "runs/a")["reason"]
    assert "Traceback" not in of_ranks[0].said + of_ranks[1].said
    again = trained(2, tmp_path, "a", "evaluation.every_steps=4")
    assert_same(again, trained(2, tmp_path, "b", "evaluation.every_steps=4"))


# ---------------------------------------------------------------- what is promised


def promises(run: Path) -> dict[str, tuple[str, str]]:
    told = json.loads((run / "run.json").read_bytes())["promises"]
    return {promise["name"]: (promise["verdict"], promise["reason"]) for promise in told}


@pytest.mark.parametrize("split", ["", "validation: "])
def test_a_generator_of_the_rows_own_is_named_in_the_promises_and_the_run_can_be_resumed(
    split: str, tmp_path: Path
) -> None:
    fault = f"{split}own generator"
    of_ranks = listened(1, tmp_path, "run.max_steps=4", FAULT=fault)
    assert of_ranks[0].code == 0, of_ranks
    verdict, reason = promises(tmp_path / "runs/a")["resume exact"]
    assert verdict == "not"
    assert "with the same seed, is not the same: it draws from a generator of its own" in reason
    assert reason.startswith(f"{'validation' if split else 'training'} row 0, 25, 50, 75, ... of Rows, asked for twice")
    assert "a generator of its own" in " ".join(of_ranks[0].said.split())
    trained(2, tmp_path, "a", FAULT=fault)
    assert [line["step"] for line in lines(tmp_path / "runs/a")] == list(range(1, UPDATES + 1))


def test_a_generator_that_is_seeded_from_torch_keeps_the_promise(tmp_path: Path) -> None:
    whole = trained(1, tmp_path, "whole", FAULT="seeded generator")
    assert {verdict for verdict, _ in promises(whole).values()} == {"held"}
    for steps, workers in ((5, 1), (UPDATES, 3)):
        parts = trained(
            1, tmp_path, "parts", f"run.max_steps={steps}", f"data.workers={workers}", FAULT="seeded generator"
        )
    assert lines(parts) == lines(whole)
    assert files(parts, UPDATES) == files(whole, UPDATES)


# ---------------------------------------------------------------- what is compared


def test_rows_that_are_others_when_a_run_goes_on_are_told_by_number(tmp_path: Path) -> None:
    trained(1, tmp_path, "a", "run.max_steps=3")
    for parts, said in (
        ({"AT": 100, "CHANGE": 1.0}, "row 100 is another now than then (1 of 64 that were compared)"),
        ({"NUM_ROWS": 199}, "200 rows then, 199 now"),
        ({"SAID": "second edition"}, "their digest() is missing then, second edition now"),
    ):
        found = refused(1, config(tmp_path, **parts))  # type: ignore[arg-type]
        assert (
            f"the training rows are not those that {tmp_path}/runs/a/checkpoints/step-00000003 was trained on: {said}"
            in found
        )
        assert "Put the old ones back, or train on the new ones under another run.name" in found
    trained(2, tmp_path, "a")


@pytest.mark.parametrize("fault", ["of its process", "of its rank"])
def test_rows_that_are_others_on_each_rank_are_refused_with_rank_and_row(fault: str, tmp_path: Path) -> None:
    found = refused(2, config(tmp_path, FAULT=fault, AT=100))
    assert "row 100 is another on rank 1 than on rank 0 (1 of 64 that were compared)" in found
    assert "Is something of the machine, the process or the time in them?" in found
    trained(1, tmp_path, "b", "run.max_steps=2", FAULT=fault, AT=100)


# ---------------------------------------------------------------- what rows may be


def stored(folder: Path, kind: str) -> Path:
    path = folder / f"numbers.{kind}"
    numbers = np.arange(120, dtype=np.float64) / 60
    if kind == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file["x"] = numbers
        return path
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("create table numbers (i integer primary key, x real)")
        database.executemany("insert into numbers values (?, ?)", list(enumerate(numbers.tolist())))
    return path


@pytest.mark.parametrize("kind", ["h5", "db"])
def test_a_file_that_rows_hold_open_gives_workers_the_same_run(kind: str, tmp_path: Path) -> None:
    path = stored(tmp_path, kind)
    told = []
    for name, workers, lazily in (("alone", 0, False), ("eager", 2, False), ("lazy", 2, True)):
        data = {"source": "fault_stored", "path": str(path), "lazily": lazily, "workers": workers}
        told.append(plain_ledger(trained(2, tmp_path, name, data=data) / "ledger.jsonl"))
    assert told[0] == told[1] == told[2]
    assert len(told[0]) > UPDATES


def test_rows_without_a_number_are_refused_with_how_to_give_them_one(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x,y\n1,2\n")
    for name, data in (
        ("Stream", {"source": "fault_stream"}),
        ("IterableDataset", {"source": "fault_streamed", "path": str(tmp_path / "rows.csv")}),
    ):
        found = refused(1, config(tmp_path, data=data))
        assert f"{name} has no length, so no row has a number that the run could ask for" in found
        assert "give a Dataset with __len__ and __getitem__" in found
        assert "load_dataset(...) without streaming" in found


def test_a_row_that_is_not_on_the_cpu_is_refused(tmp_path: Path) -> None:
    found = refused(2, config(tmp_path, FAULT="on meta"))
    assert "row 0 has a tensor on meta at x; leave rows on the CPU" in found


def test_more_workers_than_rows_or_cores_train_the_same_run(tmp_path: Path) -> None:
    few = {"NUM_ROWS": 6}
    many = trained(2, tmp_path, "many", "data.workers=9", "data.global_batch=4", "run.max_steps=6", **few)  # type: ignore[arg-type]
    none = trained(2, tmp_path, "none", "data.workers=0", "data.global_batch=4", "run.max_steps=6", **few)  # type: ignore[arg-type]
    assert lines(many) == lines(none)
    assert lines(many, "evaluation") == lines(none, "evaluation")


def test_zero2_reads_the_rows_that_ddp_does(tmp_path: Path) -> None:
    ddp = trained(2, tmp_path, "ddp")
    zero2 = trained(2, tmp_path, "zero2", "strategy={kind: zero2, micro_batch: 2}")
    found, wanted = ([line["loss"] for line in lines(run)] for run in (zero2, ddp))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert len(found) == UPDATES

"""Runs that are interrupted and picked up again, against runs that were left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from harness.observers.ledger import MEASURED, read_lines
from tests.distributed.ranks import collect, free_port, run_ranks, start_rank
from tests.distributed.scenarios import train_main, train_main_and_listen
from tests.distributed.test_checkpoints import seal_trainer

pytestmark = pytest.mark.slow

UPDATES = 600


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a resume could forget: dropout, momentum, an average, a plateau, early stopping, a best."""
    folder = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((203, 6)).astype(np.float32)
    frame = pandas.DataFrame(inputs, columns=list("abcdef")).assign(label=rng.integers(0, 3, 203))
    frame.to_parquet(folder / "rows.parquet")
    values = {
        "run": {"name": "placeholder", "output_root": str(folder), "max_steps": UPDATES, "seed": 5},
        "model": {"kind": "mlp", "hidden": [16], "dropout": 0.3},
        "data": {
            "source": "parquet",
            "path": str(folder / "rows.parquet"),
            "targets": ["label"],
            "global_batch": 16,
        },
        "task": {"kind": "classification", "num_classes": 3},
        "optim": {"kind": "adamw", "peak_lr": 0.003},
        "schedule": {"kind": "plateau", "warmup_steps": 20, "patience_evaluations": 2, "factor": 0.7},
        "clip": {"kind": "norm", "max_norm": 0.5},
        "ema": {"decay": 0.95},
        "early_stopping": {"patience_evaluations": 1000},
        "evaluation": {"every_steps": 25},
        "checkpoint": {"every_steps": 40},
        "tracking": {"log_every_steps": 7},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(values))
    return path


def history(directory: Path) -> list[dict[str, Any]]:
    """The ledger without what no two runs share."""
    lines = read_lines(directory / "ledger.jsonl")
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def weights(directory: Path) -> bytes:
    return (directory / f"checkpoints/step-{UPDATES:08d}/model-00000.safetensors").read_bytes()


def start(world_size: int, *arguments: str) -> list[Any]:
    port = free_port()
    return [start_rank(rank, world_size, port, train_main, arguments) for rank in range(world_size)]


def wait_for_updates(directory: Path, count: int, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    ledger = directory / "ledger.jsonl"
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.002)


def assert_same_run(found: Path, wanted: Path) -> None:
    assert history(found) == history(wanted)
    assert weights(found) == weights(wanted)
    steps = [line["step"] for line in history(found) if line["event"] == "update"]
    assert steps == list(range(1, UPDATES + 1))


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stopped_by_a_signal_comes_back_to_the_same_bits(config: Path, world_size: int) -> None:
    left_alone, stopped = (config.parent / f"{kind}-{world_size}" for kind in ("alone", "stopped"))
    assert run_ranks(world_size, train_main, str(config), f"run.name={left_alone.name}") == [0] * world_size
    chance = random.Random(world_size)
    arguments = (str(config), f"run.name={stopped.name}")
    for number, after in ((signal.SIGTERM, 50), (signal.SIGUSR1, 250), (signal.SIGINT, 400)):
        ranks = start(world_size, *arguments)
        wait_for_updates(stopped, after + chance.randrange(60))
        os.kill(chance.choice(ranks)[0].pid, number)  # one rank hears of it, all stop
        assert collect(ranks, deadline_seconds=60) == [75] * world_size
        ended = json.loads((stopped / "exit.json").read_text())
        assert (ended["code"], ended["reason"]) == (75, "interrupted")
        assert (stopped / f"checkpoints/step-{ended['step']:08d}").is_dir()
        steps = [line["step"] for line in history(stopped) if line["event"] == "update"]
        assert steps == list(range(1, ended["step"] + 1))
    assert run_ranks(world_size, train_main, *arguments) == [0] * world_size
    assert_same_run(stopped, left_alone)
    signals = [line["signal"] for line in read_lines(stopped / "events.jsonl") if line["event"] == "ended"]
    assert signals == ["SIGTERM", "SIGUSR1", "SIGINT", None]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_bits(config: Path) -> None:
    left_alone, killed = config.parent / "alone-k", config.parent / "killed"
    assert run_ranks(2, train_main, str(config), f"run.name={left_alone.name}") == [0, 0]
    chance = random.Random(7)
    for after in (5, 90, 300, 460):
        ranks = start(2, str(config), f"run.name={killed.name}")
        wait_for_updates(killed, after + chance.randrange(60))
        for process, _ in ranks:
            process.kill()
        for process, connection in ranks:
            process.join(10)
            connection.close()
    assert run_ranks(2, train_main, str(config), f"run.name={killed.name}") == [0, 0]
    assert_same_run(killed, left_alone)


def test_a_finished_run_started_again_is_done_at_once_and_changes_nothing(config: Path) -> None:
    directory = config.parent / "finished"
    arguments = (str(config), f"run.name={directory.name}", "run.max_steps=30")
    assert run_ranks(1, train_main, *arguments) == [0]
    before = (directory / "ledger.jsonl").read_bytes()
    assert run_ranks(1, train_main, *arguments) == [0]
    assert (directory / "ledger.jsonl").read_bytes() == before


def test_a_finished_run_goes_on_when_its_budget_is_raised(config: Path) -> None:
    directory = config.parent / "longer"
    for budget in (30, 45):
        arguments = (str(config), f"run.name={directory.name}", f"run.max_steps={budget}")
        assert run_ranks(1, train_main, *arguments) == [0]
    steps = [line["step"] for line in history(directory) if line["event"] == "update"]
    assert steps == list(range(1, 46))


def test_more_ranks_read_the_same_rows_after_a_resume(config: Path) -> None:
    directory = config.parent / "more-ranks"
    for world_size, budget in ((4, 20), (2, 33), (8, 50)):
        arguments = (str(config), f"run.name={directory.name}", f"run.max_steps={budget}", "model.dropout=0.0")
        assert run_ranks(world_size, train_main, *arguments) == [0] * world_size
    alone = config.parent / "one-size"
    assert run_ranks(1, train_main, str(config), f"run.name={alone.name}", "run.max_steps=50", "model.dropout=0.0") == [
        0
    ]
    found, wanted = ([line for line in history(path) if line["event"] == "update"] for path in (directory, alone))
    assert [line["samples_seen"] for line in found] == [line["samples_seen"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)


def test_another_model_is_refused_with_a_diff(config: Path) -> None:
    arguments = (str(config), "run.name=changed", "run.max_steps=30")
    assert run_ranks(1, train_main, *arguments) == [0]
    ((code, message),) = run_ranks(1, train_main_and_listen, *arguments, "model.hidden=[17]")
    assert code == 2
    assert "model.hidden: stored [16], given [17]" in message
    assert "run.name" in message


def test_other_data_are_refused_and_the_old_ones_go_on(config: Path, tmp_path: Path) -> None:
    rows = pandas.read_parquet(config.parent / "rows.parquet")
    path = tmp_path / "rows.parquet"
    arguments = (str(config), f"run.output_root={tmp_path}", "run.name=data", f"data.path={path}")
    rows.to_parquet(path)
    assert run_ranks(2, train_main, *arguments, "run.max_steps=30") == [0, 0]
    rows.head(150).to_parquet(path)
    (_, message), _ = said = run_ranks(2, train_main_and_listen, *arguments, "run.max_steps=40")
    assert [code for code, _ in said] == [3, 3]
    assert "the data are not those" in message
    rows.to_parquet(path)
    assert run_ranks(2, train_main, *arguments, "run.max_steps=40") == [0, 0]


def test_a_run_keeps_its_id_where_run_json_is_lost(config: Path) -> None:
    directory = config.parent / "lost"
    arguments = (str(config), f"run.name={directory.name}")
    assert run_ranks(2, train_main, *arguments, "run.max_steps=30") == [0, 0]
    run_id = json.loads((directory / "run.json").read_bytes())["id"]
    newest = directory / "checkpoints/step-00000030"
    assert json.loads((newest / "trainer.json").read_bytes())["run_id"] == run_id
    for step, budget in ((30, 40), (40, 50)):
        (directory / "run.json").unlink()
        if step == 40:  # the newest is broken, the one before knows it as well
            os.truncate(directory / "checkpoints/step-00000040/trainer.json", 100)
        assert run_ranks(2, train_main, *arguments, f"run.max_steps={budget}") == [0, 0]
        assert json.loads((directory / "run.json").read_bytes())["id"] == run_id


@pytest.mark.parametrize("change", ["run.seed=6", "data.global_batch=32"])
def test_another_order_of_rows_is_refused_even_where_the_stored_config_is_lost(config: Path, change: str) -> None:
    directory = config.parent / f"order-{change.replace('=', '-')}"
    arguments = (str(config), f"run.name={directory.name}")
    assert run_ranks(1, train_main, *arguments, "run.max_steps=30") == [0]
    (directory / "config.yaml").unlink()
    (code, said), (other_code, _) = run_ranks(2, train_main_and_listen, *arguments, "run.max_steps=40", change)
    assert code == other_code == 2
    assert "stands in the order of rows of {'seed': 5, 'global_batch': 16}" in said


@pytest.fixture(scope="module")
def saved_once(config: Path) -> Path:
    """A run with one checkpoint, of step 30; not to be written to."""
    directory = config.parent / "saved-once"
    assert run_ranks(1, train_main, str(config), f"run.name={directory.name}", "run.max_steps=30") == [0]
    return directory


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"position": -1}, "trainer.json is not what this harness writes"),
        ({"step": 5, "evaluated_step": 5}, "step: 5 is not 30, that of the checkpoint"),
        ({"position": 10**30, "samples_seen": 10**30}, "position: 100000"),
        ({"position": 2**53}, "samples_seen 4"),
        ({"ledger_bytes": 10**30}, "ledger_bytes: 100000"),
        ({"order": None, "ledger_bytes": "0"}, "order: null is not an object"),
        ({"judge": {}}, "judge.score: missing"),
        ({"optimizer": [1]}, "optimizer.0: 1 is not a section with parameters"),
    ],
)
def test_what_no_run_of_ours_would_save_is_refused_however_well_sealed(
    saved_once: Path, config: Path, tmp_path: Path, *, change: dict[str, Any], sentence: str
) -> None:
    arguments = (str(config), f"run.name={saved_once.name}", f"run.output_root={tmp_path}", "run.max_steps=40")
    checkpoint = shutil.copytree(saved_once, tmp_path / saved_once.name) / "checkpoints/step-00000030"
    trainer = json.loads((checkpoint / "trainer.json").read_bytes())
    seal_trainer(checkpoint, json.dumps({**trainer, **change}))
    (code, said), (other_code, _) = run_ranks(2, train_main_and_listen, *arguments)
    assert code == other_code == 4
    assert f"{checkpoint}/trainer.json" in said
    assert sentence in said
    assert "Traceback" not in said


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_sealed_trainer_of_nonsense_is_refused_under_every_strategy(
    saved_once: Path, config: Path, tmp_path: Path, strategy: str
) -> None:
    arguments = (str(config), f"run.name={saved_once.name}", f"run.output_root={tmp_path}", "run.max_steps=40")
    checkpoint = shutil.copytree(saved_once, tmp_path / saved_once.name) / "checkpoints/step-00000030"
    trainer = json.loads((checkpoint / "trainer.json").read_bytes())
    judge = {**trainer["judge"], "score": {**trainer["judge"]["score"], "best": "x"}}
    seal_trainer(checkpoint, json.dumps({**trainer, "judge": judge}))
    (code, said), (other_code, _) = run_ranks(2, train_main_and_listen, *arguments, f"strategy.kind={strategy}")
    assert code == other_code == 4
    assert "judge.score.best: 'x' is not a finite number, or null" in said


# ---------------------------------------------------------------- the ledger that a checkpoint refers to


EVERY_FORTY = ("evaluation.every_steps=40", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def saved_thrice(config: Path) -> Path:
    """A run with checkpoints of steps 40, 80 and 120, left alone until its end; not to be written to."""
    directory = config.parent / "saved-thrice"
    arguments = (str(config), f"run.name={directory.name}", *EVERY_FORTY)
    assert run_ranks(2, train_main, *arguments, "run.max_steps=120") == [0, 0]
    return directory


@pytest.fixture
def copied(saved_thrice: Path, config: Path, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A copy of that run of one's own, and what goes on with it."""
    copy = shutil.copytree(saved_thrice, tmp_path / saved_thrice.name)
    return copy, (str(config), f"run.output_root={tmp_path}", *EVERY_FORTY, f"run.name={copy.name}")


def checkpoint(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:08d}"


def trainer_of(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint(run, step) / "trainer.json").read_bytes())
    return found


def assert_same_end(found: Path, wanted: Path) -> None:
    for kind in ("model", "optim", "ema", "rng"):
        name = f"{kind}-00000.safetensors"
        assert (checkpoint(found, 120) / name).read_bytes() == (checkpoint(wanted, 120) / name).read_bytes(), name


@pytest.mark.parametrize("length", ["of the checkpoint before", "within a line", "one byte less"])
def test_where_the_ledger_was_cut_the_run_goes_on_from_the_newest_checkpoint_whose_lines_are_there(
    copied: tuple[Path, tuple[str, ...]], saved_thrice: Path, length: str
) -> None:
    run, arguments = copied
    before, last = (trainer_of(run, step)["ledger_bytes"] for step in (80, 120))
    num_bytes = {"of the checkpoint before": before, "within a line": before + 50, "one byte less": last - 1}[length]
    os.truncate(run / "ledger.jsonl", num_bytes)
    (code, said), (other_code, _) = run_ranks(2, train_main_and_listen, *arguments, "run.max_steps=120")
    assert code == other_code == 0
    sentence = f"step-00000120: ledger.jsonl has {num_bytes:,} bytes, it had {last:,} when this was saved"
    assert f"checkpoint not used, goes to quarantine/: {sentence}" in said
    events = read_lines(run / "events.jsonl")
    assert sum(sentence in line.get("text", "") for line in events) == 1
    assert [line["step"] for line in events if line["event"] == "started"] == [0, 80]
    assert history(run) == history(saved_thrice)
    assert_same_end(run, saved_thrice)
    assert [path.name[:13] for path in (run / "checkpoints/quarantine").iterdir()] == ["step-00000120"]


def cut(run: Path) -> None:
    os.truncate(run / "ledger.jsonl", 100)


def exchange_lines(run: Path) -> None:
    """Another ledger that is long enough."""
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(reversed(lines)) * 2)


def say_that_nothing_is_needed(run: Path) -> None:
    for step in (40, 80, 120):
        trainer = trainer_of(run, step)
        seal_trainer(checkpoint(run, step), json.dumps({**trainer, "ledger_bytes": 0}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / "ledger.jsonl").unlink(), "step-00000120: ledger.jsonl has 0 bytes, it had "),
        (cut, "step-00000040: ledger.jsonl has 100 bytes, it had "),
        (exchange_lines, "step-00000080: ledger.jsonl is another than when this was saved: update 80 is not where it"),
        (say_that_nothing_is_needed, "step-00000120: ledger.jsonl is another than when this was saved: update 120 is"),
    ],
)
def test_where_no_checkpoint_has_its_lines_nothing_is_moved_and_the_ledger_can_be_put_back(
    copied: tuple[Path, tuple[str, ...]], saved_thrice: Path, *, damage: Any, reason: str
) -> None:
    run, arguments = copied
    damage(run)
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file() and path.suffix != ".json"}
    for _ in range(2):
        (code, said), (other_code, _) = run_ranks(2, train_main_and_listen, *arguments)
        assert code == other_code == 4
        assert "none of the 3 checkpoints" in said
        assert reason in said
        assert "Put the whole ledger.jsonl back; or go on from update 120 as a new run" in said
    assert not (run / "checkpoints/quarantine").exists()
    assert {path for path in before if path.name != "config.yaml" and path.read_bytes() != before[path]} <= {
        run / "events.jsonl"
    }
    if damage is not say_that_nothing_is_needed:
        shutil.copy(saved_thrice / "ledger.jsonl", run)
        assert run_ranks(2, train_main, *arguments, "run.max_steps=120") == [0, 0]
        assert history(run) == history(saved_thrice)


def test_what_a_run_without_its_ledger_advises_goes_on_from_the_same_weights_to_the_same_bits(
    copied: tuple[Path, tuple[str, ...]], saved_thrice: Path
) -> None:
    run, arguments = copied
    shutil.rmtree(checkpoint(run, 120))
    (run / "ledger.jsonl").unlink()
    _, said = run_ranks(1, train_main_and_listen, *arguments)[0]
    command = said.partition("whose ledger begins there: ")[2].partition(" and then the same command with ")[0]
    subprocess.run(command, shell=True, check=True)
    new = run.with_name(f"{run.name}-from-80")
    assert f"run.name={new.name}\n" in said
    arguments = (*arguments[:-1], f"run.name={new.name}")
    for budget in (100, 110):
        assert run_ranks(2, train_main, *arguments, f"run.max_steps={budget}") == [0, 0]
    for step in (100, 110):  # the checkpoint that it began with still goes with its ledger
        (checkpoint(new, step) / "COMMIT.json").unlink()
    assert run_ranks(2, train_main, *arguments, "run.max_steps=120") == [0, 0]
    of_the_rest = [line for line in history(saved_thrice) if line["step"] > 80]
    assert history(new) == of_the_rest
    assert_same_end(new, saved_thrice)
    old_id, new_id = (json.loads((path / "run.json").read_bytes())["id"] for path in (run, new))
    assert trainer_of(new, 80)["run_id"] == old_id != new_id == trainer_of(new, 120)["run_id"]
    texts = [line.get("text", "") for line in read_lines(new / "events.jsonl")]
    assert texts.count(f"this run begins with a checkpoint of run {old_id}: its ledger begins after update 80") == 2


def test_a_checkpoint_of_another_run_does_not_go_with_a_ledger_that_begins_elsewhere(
    copied: tuple[Path, tuple[str, ...]], config: Path
) -> None:
    run, arguments = copied
    another = config.parent / "another"
    assert run_ranks(1, train_main, str(config), f"run.name={another.name}", "run.max_steps=130") == [0]
    shutil.copytree(checkpoint(another, 130), checkpoint(run, 130))
    before = history(run)
    ((code, said),) = run_ranks(1, train_main_and_listen, *arguments, "run.max_steps=120")
    assert code == 0
    assert "ledger.jsonl does not begin after it" in said
    assert history(run) == before


def test_a_run_may_go_on_in_another_precision(config: Path) -> None:
    directory = config.parent / "precision"
    for budget, precision in ((30, "fp32"), (40, "fp64"), (50, "bf16")):
        overrides = (f"run.max_steps={budget}", f"strategy.precision={precision}")
        assert run_ranks(1, train_main, str(config), f"run.name={directory.name}", *overrides) == [0]
    assert [line["step"] for line in history(directory) if line["event"] == "update"] == list(range(1, 51))

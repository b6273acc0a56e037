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
from safetensors.torch import load_file

from harness.config.io import load_config
from harness.observers.ledger import read_lines
from harness.record.run_status import run_status
from tests.distributed.ranks import collect, free_port, run_ranks, start_rank
from tests.distributed.scenarios import train_main
from tests.distributed.starts import train_on_standing_ranks
from tests.distributed.test_checkpoints import seal_trainer
from tests.helpers import plain_ledger, write_config

pytestmark = pytest.mark.slow

UPDATES = 280


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
        "optim": {"kind": "adamw", "peak_lr": 0.02},
        "schedule": {"kind": "plateau", "warmup_steps": 10, "patience_evaluations": 1, "factor": 0.7},
        "clip": {"kind": "norm", "max_norm": 0.5},
        "ema": {"decay": 0.95},
        "early_stopping": {"patience_evaluations": 1000},
        "evaluation": {"every_steps": 15},
        "checkpoint": {"every_steps": 40},
        "tracking": {"log_every_steps": 7},
    }
    return write_config(folder / "run.yaml", values)


def history(directory: Path) -> list[dict[str, Any]]:
    return plain_ledger(directory / "ledger.jsonl")


def checkpoint(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:08d}"


def trainer_of(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint(run, step) / "trainer.json").read_bytes())
    return found


def weights(directory: Path) -> bytes:
    return (checkpoint(directory, UPDATES) / "model-00000.safetensors").read_bytes()


def train(world_size: int, *arguments: str) -> None:
    """Train to the end."""
    assert [code for code, _ in train_on_standing_ranks(world_size, *arguments)] == [0] * world_size


def start(world_size: int, *arguments: str) -> list[Any]:
    port = free_port()
    return [start_rank(rank, world_size, port, train_main, arguments) for rank in range(world_size)]


def wait_for_updates(directory: Path, count: int, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    ledger = directory / "ledger.jsonl"
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def left_alone(config: Path) -> dict[int, Path]:
    """By number of ranks, a run that nothing happened to."""
    runs = {world_size: config.parent / f"alone-{world_size}" for world_size in (1, 2)}
    for world_size, run in runs.items():
        assert run_ranks(world_size, train_main, str(config), f"run.name={run.name}") == [0] * world_size
    return runs


def assert_same_run(found: Path, wanted: Path) -> None:
    assert history(found) == history(wanted)
    assert weights(found) == weights(wanted)
    updates = [line for line in history(found) if line["event"] == "update"]
    assert [line["step"] for line in updates] == list(range(1, UPDATES + 1))
    assert updates[100]["learning_rate"] < 0.02, "the plateau is to lower the rate before the last interruption"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_stopped_by_a_signal_comes_back_to_the_same_bits(
    config: Path, left_alone: dict[int, Path], world_size: int
) -> None:
    stopped = config.parent / f"stopped-{world_size}"
    chance = random.Random(world_size)
    arguments = (str(config), f"run.name={stopped.name}")
    for index, (number, after) in enumerate(((signal.SIGTERM, 20), (signal.SIGUSR1, 70), (signal.SIGINT, 110))):
        ranks = start(world_size, *arguments)
        wait_for_updates(stopped, after + chance.randrange(30))
        os.kill(ranks[(index + 1) % world_size][0].pid, number)  # one rank hears of it, not always the first: all stop
        assert collect(ranks, deadline_seconds=60) == [75] * world_size
        ended = json.loads((stopped / "exit.json").read_text())
        assert (ended["code"], ended["reason"]) == (75, "interrupted")
        assert (stopped / f"checkpoints/step-{ended['step']:08d}").is_dir()
        steps = [line["step"] for line in history(stopped) if line["event"] == "update"]
        assert steps == list(range(1, ended["step"] + 1))
    assert run_ranks(world_size, train_main, *arguments) == [0] * world_size
    assert_same_run(stopped, left_alone[world_size])
    signals = [line["signal"] for line in read_lines(stopped / "events.jsonl") if line["event"] == "ended"]
    assert signals == ["SIGTERM", "SIGUSR1", "SIGINT", None]
    random_states = [checkpoint(stopped, UPDATES) / f"rng-{rank:05d}.safetensors" for rank in range(world_size)]
    drawn = {tuple(load_file(path)["torch"].tolist()) for path in random_states}
    assert len(drawn) == world_size, "every rank is to draw a dropout of its own"


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_bits(
    config: Path, left_alone: dict[int, Path]
) -> None:
    killed = config.parent / "killed"
    chance = random.Random(7)
    for after in (5, 50, 110):
        ranks = start(2, str(config), f"run.name={killed.name}")
        wait_for_updates(killed, after + chance.randrange(30))
        for process, _ in ranks:
            process.kill()
        for process, connection in ranks:
            process.join(10)
            connection.close()
    assert run_ranks(2, train_main, str(config), f"run.name={killed.name}") == [0, 0]
    assert_same_run(killed, left_alone[2])


@pytest.mark.parametrize("sizes", [(2, 1, 4), pytest.param((4, 2, 8), marks=pytest.mark.long)])
def test_more_ranks_read_the_same_rows_after_a_resume(sizes: tuple[int, int, int], config: Path) -> None:
    directory, alone = (config.parent / f"{name}-{sizes[2]}" for name in ("more-ranks", "one-size"))
    smooth = ("model.dropout=0.0", "optim.peak_lr=0.003")  # or a difference in the last bit soon becomes a large one
    launches = [(directory, size, budget) for size, budget in zip(sizes, (20, 33, 50), strict=True)]
    for run, world_size, budget in (*launches, (alone, 1, 50)):
        train(world_size, str(config), f"run.name={run.name}", f"run.max_steps={budget}", *smooth)
    found, wanted = ([line for line in history(path) if line["event"] == "update"] for path in (directory, alone))
    assert [line["samples_seen"] for line in found] == [line["samples_seen"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)


def test_other_data_are_refused_and_the_old_ones_go_on(config: Path, tmp_path: Path) -> None:
    rows = pandas.read_parquet(config.parent / "rows.parquet")
    path = tmp_path / "rows.parquet"
    arguments = (str(config), f"run.output_root={tmp_path}", "run.name=data", f"data.path={path}")
    rows.to_parquet(path)
    train(2, *arguments, "run.max_steps=30")
    rows.head(150).to_parquet(path)
    (code, message), (other_code, _) = train_on_standing_ranks(2, *arguments, "run.max_steps=40")
    assert code == other_code == 3
    assert "the data are not those" in message
    rows.to_parquet(path)
    train(2, *arguments, "run.max_steps=40")


# ---------------------------------------------------------------- a start after the end


@pytest.fixture(scope="module")
def saved_once(config: Path) -> Path:
    """A run that has ended, with one checkpoint, of step 30; not to be written to."""
    directory = config.parent / "saved-once"
    train(1, str(config), f"run.name={directory.name}", "run.max_steps=30")
    return directory


Copy = tuple[Path, tuple[str, ...]]
"""A run of one's own, and the command that goes on with it but for `run.max_steps`."""


def copy_into(folder: Path, run: Path, config: Path, *overrides: str) -> Copy:
    copy = shutil.copytree(run, folder / run.name)
    return copy, (str(config), f"run.output_root={folder}", *overrides, f"run.name={copy.name}")


@pytest.fixture
def finished(saved_once: Path, config: Path, tmp_path: Path) -> Copy:
    """A copy of that run."""
    return copy_into(tmp_path, saved_once, config)


def test_a_finished_run_started_again_is_done_at_once_and_changes_nothing(finished: Copy) -> None:
    run, arguments = finished
    before = (run / "ledger.jsonl").read_bytes()
    train(1, *arguments, "run.max_steps=30")
    assert (run / "ledger.jsonl").read_bytes() == before


def test_a_finished_run_goes_on_when_its_budget_is_raised(finished: Copy) -> None:
    run, arguments = finished
    train(1, *arguments, "run.max_steps=45")
    steps = [line["step"] for line in history(run) if line["event"] == "update"]
    assert steps == list(range(1, 46))


def notices(run: Path) -> list[str]:
    return [event["text"] for event in read_lines(run / "events.jsonl") if event["event"] == "notice"]


def best_step(run: Path) -> int:
    found: int = json.loads((run / "checkpoints/BEST").read_bytes())["step"]
    return found


def evaluations(run: Path, metric: str) -> dict[int, float]:
    return {line["step"]: line["metrics"][metric] for line in history(run) if line["event"] == "evaluation"}


@pytest.fixture(scope="module")
def saved_often(config: Path) -> Path:
    """A run whose six evaluations all have a checkpoint, judged by its loss; not to be written to."""
    directory = config.parent / "saved-often"
    often = ("evaluation.every_steps=5", "checkpoint.every_steps=5", "checkpoint.keep_last=9")
    train(1, str(config), f"run.name={directory.name}", "run.max_steps=30", *often, "schedule={kind: cosine}")
    return directory


@pytest.fixture
def often(saved_often: Path, config: Path, tmp_path: Path) -> Copy:
    """A copy of that run."""
    same = ("evaluation.every_steps=30", "checkpoint.every_steps=30", "checkpoint.keep_last=9")
    return copy_into(tmp_path, saved_often, config, *same)


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_judge_looks_at_all_evaluations_of_the_ledger_and_says_so(often: Copy, world_size: int) -> None:
    run, arguments = often
    losses, accuracies = evaluations(run, "val/loss"), evaluations(run, "val/accuracy")
    assert best_step(run) == min(losses, key=losses.__getitem__)
    judge = "checkpoint.best={metric: val/accuracy, mode: min}"
    refused, allowed = (judge, judge.replace("mode: min", "mode: max"))
    assert (
        "checkpoint.best.mode: val/accuracy is better the higher it is"
        in train_on_standing_ranks(1, *arguments, "run.max_steps=30", refused)[0][1]
    )
    best = max(accuracies, key=accuracies.__getitem__)
    train(world_size, *arguments, "run.max_steps=30", allowed)
    assert best_step(run) == best
    (told,) = [text for text in notices(run) if text.startswith("BEST")]
    assert told.startswith("BEST is judged by val/accuracy (max) now, by val/loss (min) before")
    assert f"it is step {best} with val/accuracy {accuracies[best]:.4f}" in told
    status = run_status(run)
    assert (status.metric, status.best, status.best_step) == ("val/accuracy", accuracies[best], best)
    train(world_size, *arguments, "run.max_steps=30", "early_stopping=null")  # and back, by another way
    assert best_step(run) == min(losses, key=losses.__getitem__)


def test_where_the_best_is_gone_the_best_of_what_is_left_is_best_and_both_are_told(often: Copy) -> None:
    run, arguments = often
    losses = evaluations(run, "val/loss")
    first, second = sorted(losses, key=losses.__getitem__)[:2]
    if first == 30:  # without its newest checkpoint it would be another run
        first, second = second, sorted(losses, key=losses.__getitem__)[2]
    shutil.rmtree(checkpoint(run, first))
    train(1, *arguments, "run.max_steps=30")
    left = {step: loss for step, loss in losses.items() if step != first}
    assert best_step(run) == min(left, key=left.__getitem__)
    missed = f"val/loss {losses[first]:.4f} at {first} is better, but its checkpoint is not there"
    assert (missed in notices(run)) == (losses[first] < min(left.values()))


@pytest.mark.parametrize("asks_for", [0.0, 9.0])
def test_best_is_the_best_evaluation_of_the_ledger_whatever_patience_asks_for(
    asks_for: float, config: Path, tmp_path: Path
) -> None:
    patience = f"early_stopping={{patience_evaluations: 99, min_delta: {asks_for}}}"
    budget = ("run.max_steps=30", "evaluation.every_steps=5")
    train(1, str(config), f"run.output_root={tmp_path}", "run.name=a", patience, *budget)
    losses = evaluations(tmp_path / "a", "val/loss")
    assert best_step(tmp_path / "a") == min(losses, key=losses.__getitem__)


def test_training_longer_tells_from_which_rate_to_which_it_goes_on_and_may_leave_it(often: Copy) -> None:
    run, arguments = often
    before = [line["learning_rate"] for line in history(run) if line["event"] == "update"][-1]
    train(1, *arguments, "run.max_steps=60", "schedule={kind: cosine, total_steps: 30}")
    (told,) = [text for text in notices(run) if "learning rate" in text]
    assert told.startswith("the learning rate is 0 from here on, since schedule.total_steps=30 is over")
    left = [line["learning_rate"] for line in history(run) if line["event"] == "update"][30:]
    assert left == [0.0] * 30
    train(1, *arguments, "run.max_steps=90", "schedule={kind: cosine}")
    after = [line["learning_rate"] for line in history(run) if line["event"] == "update"][60]
    *_, told = [text for text in notices(run) if "learning rate" in text]
    assert told.startswith(f"the learning rate goes on at {after:.3g}, the last update had 0: cosine falls over 90")
    assert told.endswith("updates now, over 30 before; schedule.total_steps fixes over how many")
    assert 0.0 < before < after


def test_another_model_is_refused_with_a_diff(finished: Copy) -> None:
    _, arguments = finished
    ((code, message),) = train_on_standing_ranks(1, *arguments, "run.max_steps=30", "model.hidden=[17]")
    assert code == 2
    assert "model.hidden: stored [16], given [17]" in message
    assert "run.name" in message


def test_a_run_keeps_its_id_where_run_json_is_lost(finished: Copy) -> None:
    run, arguments = finished
    run_id = json.loads((run / "run.json").read_bytes())["id"]
    assert trainer_of(run, 30)["run_id"] == run_id
    for step, budget in ((30, 40), (40, 50)):
        (run / "run.json").unlink()
        if step == 40:  # the newest is broken, the one before knows it as well
            os.truncate(checkpoint(run, 40) / "trainer.json", 100)
        train(2, *arguments, f"run.max_steps={budget}")
        assert json.loads((run / "run.json").read_bytes())["id"] == run_id


@pytest.mark.parametrize("change", ["run.seed=6", "data.global_batch=32"])
def test_another_order_of_rows_is_refused_even_where_the_stored_config_is_lost(finished: Copy, change: str) -> None:
    run, arguments = finished
    (run / "config.yaml").unlink()
    (code, said), (other_code, _) = train_on_standing_ranks(2, *arguments, "run.max_steps=40", change)
    assert code == other_code == 2
    assert "stands in the order of rows of {'seed': 5, 'global_batch': 16}" in said
    train(2, *arguments, "run.max_steps=40")  # what was refused is not what the run is compared with from now on
    kept = load_config(run / "config.yaml").config
    assert (kept.run.seed, kept.data.global_batch) == (5, 16)


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
    finished: Copy, *, change: dict[str, Any], sentence: str
) -> None:
    run, arguments = finished
    seal_trainer(checkpoint(run, 30), json.dumps({**trainer_of(run, 30), **change}))
    (code, said), (other_code, _) = train_on_standing_ranks(2, *arguments, "run.max_steps=40")
    assert code == other_code == 4
    assert f"{checkpoint(run, 30)}/trainer.json" in said
    assert sentence in said
    assert "Traceback" not in said


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_sealed_trainer_of_nonsense_is_refused_under_every_strategy(finished: Copy, strategy: str) -> None:
    run, arguments = finished
    trainer = trainer_of(run, 30)
    judge = {**trainer["judge"], "score": {**trainer["judge"]["score"], "best": "x"}}
    seal_trainer(checkpoint(run, 30), json.dumps({**trainer, "judge": judge}))
    overrides = ("run.max_steps=40", f"strategy.kind={strategy}")
    (code, said), (other_code, _) = train_on_standing_ranks(2, *arguments, *overrides)
    assert code == other_code == 4
    assert "judge.score.best: 'x' is not a finite number, or null" in said


# ---------------------------------------------------------------- the ledger that a checkpoint refers to


EVERY_FORTY = ("evaluation.every_steps=40", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def saved_thrice(config: Path) -> Path:
    """A run with checkpoints of steps 40, 80 and 120, left alone until its end; not to be written to."""
    directory = config.parent / "saved-thrice"
    arguments = (str(config), f"run.name={directory.name}", *EVERY_FORTY)
    train(2, *arguments, "run.max_steps=120")
    return directory


@pytest.fixture
def copied(saved_thrice: Path, config: Path, tmp_path: Path) -> Copy:
    """A copy of that run."""
    return copy_into(tmp_path, saved_thrice, config, *EVERY_FORTY)


def assert_same_end(found: Path, wanted: Path) -> None:
    for kind in ("model", "optim", "ema", "rng"):
        name = f"{kind}-00000.safetensors"
        assert (checkpoint(found, 120) / name).read_bytes() == (checkpoint(wanted, 120) / name).read_bytes(), name


@pytest.mark.parametrize("length", ["of the checkpoint before", "within a line", "one byte less"])
def test_where_the_ledger_was_cut_the_run_goes_on_from_the_newest_checkpoint_whose_lines_are_there(
    copied: Copy, saved_thrice: Path, length: str
) -> None:
    run, arguments = copied
    before, last = (trainer_of(run, step)["ledger_bytes"] for step in (80, 120))
    num_bytes = {"of the checkpoint before": before, "within a line": before + 50, "one byte less": last - 1}[length]
    os.truncate(run / "ledger.jsonl", num_bytes)
    (code, said), (other_code, _) = train_on_standing_ranks(2, *arguments, "run.max_steps=120")
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
    copied: Copy, saved_thrice: Path, *, damage: Any, reason: str
) -> None:
    run, arguments = copied
    damage(run)
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file() and path.suffix != ".json"}
    for _ in range(2):
        (code, said), (other_code, _) = train_on_standing_ranks(2, *arguments)
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
        train(2, *arguments, "run.max_steps=120")
        assert history(run) == history(saved_thrice)


def test_what_a_run_without_its_ledger_advises_goes_on_from_the_same_weights_to_the_same_bits(
    copied: Copy, saved_thrice: Path
) -> None:
    run, arguments = copied
    shutil.rmtree(checkpoint(run, 120))
    (run / "ledger.jsonl").unlink()
    _, said = train_on_standing_ranks(1, *arguments)[0]
    command = said.partition("whose ledger begins there: ")[2].partition(" and then the same command with ")[0]
    subprocess.run(command, shell=True, check=True)
    new = run.with_name(f"{run.name}-from-80")
    assert f"run.name={new.name}\n" in said
    arguments = (*arguments[:-1], f"run.name={new.name}")
    for budget in (100, 110):
        train(2, *arguments, f"run.max_steps={budget}")
    for step in (100, 110):  # the checkpoint that it began with still goes with its ledger
        (checkpoint(new, step) / "COMMIT.json").unlink()
    train(2, *arguments, "run.max_steps=120")
    of_the_rest = [line for line in history(saved_thrice) if line["step"] > 80]
    assert history(new) == of_the_rest
    assert_same_end(new, saved_thrice)
    old_id, new_id = (json.loads((path / "run.json").read_bytes())["id"] for path in (run, new))
    assert trainer_of(new, 80)["run_id"] == old_id != new_id == trainer_of(new, 120)["run_id"]
    texts = [line.get("text", "") for line in read_lines(new / "events.jsonl")]
    assert texts.count(f"this run begins with a checkpoint of run {old_id}: its ledger begins after update 80") == 2


def test_a_checkpoint_of_another_run_does_not_go_with_a_ledger_that_begins_elsewhere(
    copied: Copy, config: Path
) -> None:
    run, arguments = copied
    another = config.parent / "another"
    train(1, str(config), f"run.name={another.name}", "run.max_steps=130")
    shutil.copytree(checkpoint(another, 130), checkpoint(run, 130))
    before = history(run)
    ((code, said),) = train_on_standing_ranks(1, *arguments, "run.max_steps=120")
    assert code == 0
    assert "ledger.jsonl does not begin after it" in said
    assert history(run) == before


def test_a_run_may_go_on_in_another_precision(config: Path) -> None:
    directory = config.parent / "precision"
    for budget, precision in ((30, "fp32"), (40, "fp64"), (50, "bf16")):
        overrides = (f"run.max_steps={budget}", f"strategy.precision={precision}")
        train(1, str(config), f"run.name={directory.name}", *overrides)
    assert [line["step"] for line in history(directory) if line["event"] == "update"] == list(range(1, 51))

"""The whole thing, as a user starts it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.json_lines import read_events
from harness.observers.ledger import read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main, train_main_and_listen

REPOSITORY = Path(__file__).parent.parent
MNIST = str(REPOSITORY / "configs/mnist_cnn.yaml")


@pytest.mark.slow
def test_torchrun_with_eight_ranks_reads_965_of_1000_digits(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    subprocess.run(
        [*torchrun, "-m", "harness.train", MNIST, f"run.output_root={tmp_path}"],
        check=True,
        timeout=400,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    directory = tmp_path / "mnist-cnn"
    assert json.loads((directory / "exit.json").read_text())["code"] == 0
    best = json.loads((directory / "checkpoints/BEST").read_text())["step"]
    lines = read_lines(directory / "ledger.jsonl")
    accuracy = {line["step"]: line["metrics"]["val/accuracy"] for line in lines if line["event"] == "evaluation"}
    assert accuracy[best] >= 0.965
    assert final_accuracy(directory) >= 0.96


@pytest.mark.slow
def test_eight_ranks_of_zero3_learn_from_the_digits_what_ddp_learns(tmp_path: Path) -> None:
    losses, accuracies = [], []
    for kind in ("ddp", "zero3"):
        arguments = (MNIST, f"run.output_root={tmp_path / kind}", f"strategy.kind={kind}", "run.max_epochs=1")
        assert run_ranks(8, train_main, *arguments, deadline_seconds=200) == [0] * 8
        lines = read_lines(tmp_path / kind / "mnist-cnn/ledger.jsonl")
        losses.append([line["loss"] for line in lines if line["event"] == "update"])
        accuracies.append(final_accuracy(tmp_path / kind / "mnist-cnn"))
    assert len(losses[0]) == 63
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.003)


@pytest.mark.slow
def test_no_rank_outlives_its_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    agent = subprocess.Popen(
        [*torchrun, "-m", "harness.train", table(tmp_path, GOOD), "run.max_steps=10000000"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    ledger = tmp_path / "runs/bad/ledger.jsonl"
    wait_until(lambda: ledger.exists() and ledger.stat().st_size > 0, seconds=60)
    ranks = ranks_of(tmp_path)
    assert len(ranks) == 2
    agent.kill()
    agent.wait()
    wait_until(lambda: not ranks_of(tmp_path), seconds=10)


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def ranks_of(folder: Path) -> list[str]:
    """The processes of `harness.train` with a config in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if (
            b"harness.train" in words
            and b"torch.distributed.run" not in words
            and f"{folder}/bad.yaml".encode() in words
        ):
            found.append(path.parent.name)
    return found


def final_accuracy(directory: Path) -> float:
    lines = read_lines(directory / "ledger.jsonl")
    return float([line for line in lines if line["event"] == "evaluation"][-1]["metrics"]["val/accuracy"])


@pytest.mark.slow
def test_two_ranks_learn_from_the_digits_what_one_rank_learns(tmp_path: Path) -> None:
    losses = []
    for world_size in (1, 2):
        arguments = (MNIST, f"run.output_root={tmp_path / str(world_size)}", "run.max_steps=50", "model.dropout=0.0")
        assert run_ranks(world_size, train_main, *arguments, "schedule.warmup_steps=10") == [0] * world_size
        lines = read_lines(tmp_path / str(world_size) / "mnist-cnn/ledger.jsonl")
        losses.append([line["loss"] for line in lines if line["event"] == "update"])
    assert len(losses[0]) == 50
    assert losses[0][-1] < losses[0][0] / 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---------------------------------------------------------------- what a user gets wrong


def table(folder: Path, text: str) -> str:
    """A config over a csv file of this content."""
    (folder / "rows.csv").write_text(text)
    config = {
        "run": {"name": "bad", "output_root": str(folder / "runs"), "max_steps": 2},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "csv", "path": str(folder / "rows.csv"), "targets": ["y"], "global_batch": 4},
        "task": {"kind": "classification", "num_classes": 3},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
    }
    (folder / "bad.yaml").write_text(json.dumps(config))
    return str(folder / "bad.yaml")


GOOD = "x,y\n" + "\n".join(f"{i},{i % 3}" for i in range(20)) + "\n"


JUDGED_BY_CLASS_3 = ["task.positive_class=3", "early_stopping={metric: val/auc, mode: max}"]


def blocked(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [f"run.output_root={folder / 'file'}"]


@pytest.mark.parametrize(
    ("text", "overrides", "code", "words"),
    [
        (GOOD, lambda _: [], 0, []),
        (GOOD, lambda _: ["optim.peak_lr=-1"], 2, ["optim.peak_lr", "above 0"]),
        (GOOD, lambda _: ["data.global_batch=5"], 2, ["data.global_batch: 5 does not divide", "use 4 or 6"]),
        (GOOD, lambda _: ["strategy.micro_batch=3"], 2, ["strategy.micro_batch: 3 is more than"]),
        (GOOD, lambda _: ["schedule.warmup_steps=3"], 2, ["schedule: warmup_steps 3", "2 updates of the run"]),
        (GOOD, lambda _: ["early_stopping.metric=val/acc"], 2, ["val/acc", "val/accuracy"]),
        (GOOD, lambda _: ["model={kind: cnn, channels: [2]}"], 2, ["model.kind", "mlp"]),
        (GOOD, lambda _: ["model.norm=batch", "data.global_batch=2"], 2, ["BatchNorm", "one row"]),
        (GOOD, lambda _: ["task.num_classes=2"], 3, ["label", "2"]),
        (GOOD, lambda _: [*JUDGED_BY_CLASS_3, "task.num_classes=4"], 3, ["val/auc is about class 3", "none is of it"]),
        ("x,y\n" + "1,2\n" * 20, lambda _: [], 3, ["all 20 rows are of class 2"]),
        (GOOD.replace("x,y", "y,y"), lambda _: [], 3, ["2 columns are called 'y'"]),
        (GOOD, lambda folder: [f"data.path={folder / 'no.csv'}"], 3, ["no.csv"]),
        (GOOD, lambda _: ["data.validation_fraction=0.001"], 3, ["validation"]),
        (GOOD.replace("7,1", "7,1,9,9"), lambda _: [], 3, ["rows.csv"]),
        (GOOD, blocked, 5, ["run.output_root"]),
    ],
)
def test_bad_input_is_one_clear_error_on_two_ranks(
    tmp_path: Path, text: str, overrides: Callable[[Path], list[str]], code: int, words: list[str]
) -> None:
    said = run_ranks(2, train_main_and_listen, table(tmp_path, text), *overrides(tmp_path))
    assert [found for found, _ in said] == [code, code]
    assert said[1][1] == ""  # rank zero speaks for all
    for word in words:
        assert word in said[0][1]
    assert "Traceback" not in said[0][1]
    exit_file = tmp_path / "runs/bad/exit.json"
    if exit_file.exists():
        assert json.loads(exit_file.read_text())["code"] == code


@pytest.mark.parametrize("global_batch", [16, 18])
def test_a_batch_of_more_rows_than_there_are_is_told(tmp_path: Path, global_batch: int) -> None:
    assert run_ranks(1, train_main, table(tmp_path, GOOD), f"data.global_batch={global_batch}") == [0]
    told = [line["text"] for line in read_events(tmp_path / "runs/bad") if "global_batch" in line.get("text", "")]
    text = "data.global_batch: 18 are more than the 16 training rows; every update takes them all"
    assert told == ([text] if global_batch == 18 else [])


def test_a_bad_config_is_answered_in_under_three_seconds_without_torch(tmp_path: Path) -> None:
    config = table(tmp_path, GOOD)
    script = (
        "import sys, harness.train as t; code = t.main(sys.argv[1:]); sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, config, "model.hiden=[3]"],
        timeout=3,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "model.hiden: unknown key (nearest: hidden" in done.stderr

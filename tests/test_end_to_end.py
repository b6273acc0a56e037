"""The whole thing, as a user starts it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.observers.ledger import read_lines
from harness.record.json_lines import read_events
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main, train_main_and_listen
from tests.helpers import wait_until, write_config

REPOSITORY = Path(__file__).parent.parent
MNIST = str(REPOSITORY / "configs/mnist_cnn.yaml")
UPDATES_PER_EPOCH = 63
"""Of 4,000 rows, 64 an update."""


def torchrun(num_ranks: int, output_root: Path, *overrides: str) -> dict[str, Any]:
    """What subprocess is to start: a training on the digits, and nothing left in the folder of temporary files."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return {
        "args": [*agent, "-m", "harness.train", MNIST, f"run.output_root={output_root}", *overrides],
        "cwd": REPOSITORY,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(output_root)},
    }


@pytest.mark.slow
@pytest.mark.long
def test_torchrun_with_eight_ranks_reads_965_of_1000_digits(tmp_path: Path) -> None:
    subprocess.run(**torchrun(8, tmp_path), check=True, timeout=400)
    directory = tmp_path / "mnist-cnn"
    assert json.loads((directory / "exit.json").read_text())["code"] == 0
    best = json.loads((directory / "checkpoints/BEST").read_text())["step"]
    assert accuracies(directory)[best] >= 0.965
    assert final_accuracy(directory) >= 0.96


@dataclass(frozen=True)
class Killed:
    """A training of two ranks whose torchrun was killed after three epochs."""

    output_root: Path
    num_ranks: int
    """Just before."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    output_root = tmp_path_factory.mktemp("torchrun")
    agent = subprocess.Popen(**torchrun(2, output_root, "run.max_epochs=1000"), stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(accuracies(output_root / "mnist-cnn")) >= 3, "three evaluations", seconds=180)
        return Killed(output_root, num_ranks=len(ranks_of(output_root)))
    finally:
        agent.kill()
        agent.wait()


@pytest.mark.slow
def test_two_ranks_of_torchrun_read_930_of_1000_digits_in_three_epochs(killed: Killed) -> None:
    found = accuracies(killed.output_root / "mnist-cnn")
    assert found[3 * UPDATES_PER_EPOCH] >= 0.93


@pytest.mark.slow
def test_no_rank_outlives_its_torchrun(killed: Killed) -> None:
    assert killed.num_ranks == 2
    wait_until(lambda: not ranks_of(killed.output_root), "the ranks end", seconds=10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "updates", [12, pytest.param(UPDATES_PER_EPOCH, marks=pytest.mark.long)], ids=["twelve updates", "an epoch"]
)
def test_eight_ranks_of_zero3_learn_from_the_digits_what_ddp_learns(tmp_path: Path, updates: int) -> None:
    losses, final_accuracies = [], []
    for kind in ("ddp", "zero3"):
        arguments = (MNIST, f"run.output_root={tmp_path / kind}", f"strategy.kind={kind}", f"run.max_steps={updates}")
        warmup = f"schedule.warmup_steps={min(50, updates // 2)}"
        assert run_ranks(8, train_main, *arguments, warmup, deadline_seconds=200) == [0] * 8
        lines = read_lines(tmp_path / kind / "mnist-cnn/ledger.jsonl")
        losses.append([line["loss"] for line in lines if line["event"] == "update"])
        final_accuracies.append(final_accuracy(tmp_path / kind / "mnist-cnn"))
    assert len(losses[0]) == updates
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert final_accuracies[1] == pytest.approx(final_accuracies[0], abs=0.003)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_by_torchrun_where_its_store_outlives_the_attempt(tmp_path: Path) -> None:
    """torchrun --standalone gives every attempt the store of the first, where the dead have left their addresses."""
    often = ("checkpoint.every_steps=15", "evaluation={every_steps: 150}")
    start = torchrun(2, tmp_path, "run.max_steps=150", "tracking.report=false", *often)
    start["args"][4:4] = ["--max-restarts", "1", "--monitor-interval", "0.1"]
    run = tmp_path / "mnist-cnn"

    def has_saved() -> bool:
        return run.exists() and "saved" in [event["event"] for event in read_events(run)]

    with subprocess.Popen(**start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as agent:
        wait_until(lambda: agent.poll() is not None or has_saved(), "a save", seconds=60)
        (pid,) = (pid for pid in ranks_of(tmp_path) if b"RANK=1" in environment_of(pid))
        os.kill(int(pid), signal.SIGKILL)
        _, said = agent.communicate(timeout=60)
    assert agent.returncode == 0, said[-2000:]
    starts = [event["step"] for event in read_events(run) if event["event"] == "started"]
    (failed,) = (event for event in read_events(run) if event["event"] == "failed")
    assert failed["code"] == 7, "as exit.json had it, and not a bug of ours"
    assert "another rank died" in failed["reason"]
    assert len(starts) == 2
    assert starts[1] >= 15
    steps = [line["step"] for line in read_lines(run / "ledger.jsonl") if line["event"] == "update"]
    assert steps == list(range(1, 151))


def environment_of(pid: str) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def ranks_of(output_root: Path) -> list[str]:
    """The processes of `harness.train` that write into this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if f"run.output_root={output_root}".encode() in words and b"torch.distributed.run" not in words:
            found.append(path.parent.name)
    return found


def accuracies(directory: Path) -> dict[int, float]:
    """Of each evaluation so far, by its step."""
    path = directory / "ledger.jsonl"
    lines = read_lines(path) if path.exists() else []
    return {line["step"]: line["metrics"]["val/accuracy"] for line in lines if line["event"] == "evaluation"}


def final_accuracy(directory: Path) -> float:
    return accuracies(directory)[max(accuracies(directory))]


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
    config: dict[str, Any] = {
        "run": {"name": "bad", "output_root": str(folder / "runs"), "max_steps": 2},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "csv", "path": str(folder / "rows.csv"), "targets": ["y"], "global_batch": 4},
        "task": {"kind": "classification", "num_classes": 3},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
    }
    return str(write_config(folder / "bad.yaml", config))


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

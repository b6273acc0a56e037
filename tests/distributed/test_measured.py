"""What a run measures of itself, and where it says it comes from."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from harness.data.batches import TrainingBatches
from harness.observers.ledger import MEASURED, read_lines
from harness.provenance import git_state, slurm_job, versions
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import Spec, fit_spec

DAWDLE_SECONDS = 0.02


def fit_with_a_slow_reader(spec: Spec, directory: str) -> dict[str, Any]:
    """Fit a spec whose last rank waits for its rows, and holds 200 MB more than the others."""
    import os

    at = TrainingBatches._at
    is_last = os.environ["RANK"] == "1"

    def slow(self: TrainingBatches, position: int) -> Any:
        time.sleep(DAWDLE_SECONDS if is_last else 0.0)
        return at(self, position)

    TrainingBatches._at = slow  # type: ignore[method-assign]
    ballast = bytearray(os.urandom(2**20)) * (200 if is_last else 1)
    return {**fit_spec(spec, directory), "ballast": len(ballast)}


def test_the_slowest_reader_and_the_fullest_memory_of_any_rank_are_told(tmp_path: Path) -> None:
    spec = Spec(updates=30)
    began = time.perf_counter()
    run_ranks(2, fit_with_a_slow_reader, spec, str(tmp_path))
    took = time.perf_counter() - began
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if line["event"] == "update"]
    measured = [line for line in lines if "samples_per_second" in line]
    assert 1 <= len(measured) < len(lines)  # once an interval, not once an update
    for line in measured:
        assert MEASURED & line.keys() == MEASURED
        assert line["data_wait_fraction"] > 0.25  # of the second rank, while the first one only waited for it
        assert line["memory_bytes"] > 200 * 2**20
        assert 16 / took < line["samples_per_second"] < 16 / DAWDLE_SECONDS


def test_the_commit_and_whether_it_is_what_runs(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    (tmp_path / "new").write_text("a file that git does not know is no change")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "is_dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "is_dirty": True}


def test_slurm_ids_and_versions_are_what_is_there() -> None:
    assert slurm_job({"PATH": "/bin"}) is None
    assert slurm_job({"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}) == {"job_id": "7", "array_task_id": "3"}
    assert versions(["torch", "no-such-package"]).keys() == {"torch"}


def test_a_start_says_where_it_comes_from(tmp_path: Path) -> None:
    from tests.distributed.scenarios import train_main

    config = {
        "run": {"name": "a", "output_root": str(tmp_path), "max_steps": 2},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "mnist_5k", "global_batch": 8},
        "task": {"kind": "classification", "num_classes": 10},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
    }
    (tmp_path / "a.yaml").write_text(json.dumps(config))
    assert run_ranks(2, train_main, str(tmp_path / "a.yaml")) == [0, 0]
    (started,) = [line for line in read_lines(tmp_path / "a/events.jsonl") if line["event"] == "started"]
    assert started["git"] == git_state(Path(__file__).parent)
    assert started["hosts"] == [started["host"]]
    assert {"harness", "torch", "accelerate"} <= started["versions"].keys()

"""What a run measures of itself, and where it says it comes from."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.observers.ledger import MEASURED, read_lines
from harness.record.provenance import git_state, slurm_job, versions
from harness.rows.batches import TrainingBatches
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import BLOCK, Spec, fit_spec

DAWDLE_SECONDS = 0.02
PARTS = ("data_wait", "compute", "reduction", "rest")


def fit_with_a_slow_reader(spec: Spec, directory: str) -> dict[str, Any]:
    """Fit a spec whose last rank waits for its rows, and holds 200 MB more than the others."""
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
        assert MEASURED & line.keys() == MEASURED - {"tokens_per_second", "mfu"}  # no text, no GPU
        assert line["data_wait_fraction"] > 0.25  # of the second rank, while the first one only waited for it
        assert sum(line[f"{part}_fraction"] for part in PARTS) == pytest.approx(1)
        assert line["memory_bytes"] > 200 * 2**20
        assert 16 / took < line["samples_per_second"] < 16 / DAWDLE_SECONDS


def fit_with_a_slow_part(spec: Spec, directory: str, part: str) -> dict[str, Any]:
    """Fit a spec of which one part of every update takes long; of the reduction, because the other rank is late."""
    from harness.strategy.ddp import DdpStrategy

    rank = os.environ["RANK"]
    is_late = part == "reduction" and rank == "1"
    at, backward, update = TrainingBatches._at, DdpStrategy.backward, DdpStrategy.update

    def slow_at(self: TrainingBatches, position: int) -> Any:
        time.sleep(DAWDLE_SECONDS / 4 if rank == "0" else 0.0)  # so it is the first rank that is told of
        return at(self, position)

    def slow_backward(self: DdpStrategy, loss: Any) -> None:
        time.sleep(DAWDLE_SECONDS if part == "compute" or is_late else 0.0)
        backward(self, loss)

    def slow_update(self: DdpStrategy, learning_rate: Any, *, position: int) -> Any:
        time.sleep(DAWDLE_SECONDS if part == "rest" else 0.0)
        return update(self, learning_rate, position=position)

    TrainingBatches._at = slow_at  # type: ignore[method-assign]
    DdpStrategy.backward, DdpStrategy.update = slow_backward, slow_update  # type: ignore[method-assign]
    return fit_spec(spec, directory)


@pytest.mark.parametrize("part", ["compute", "reduction", "rest"])
def test_the_part_of_an_update_that_takes_long_is_told(tmp_path: Path, part: str) -> None:
    run_ranks(2, fit_with_a_slow_part, Spec(updates=20), str(tmp_path), part)
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if "compute_fraction" in line]
    shares = {name: sum(line[f"{name}_fraction"] for line in lines) for name in PARTS}
    assert max(shares, key=lambda name: shares[name]) == part, shares


def test_under_zero_the_reduction_is_a_part_of_the_computing(tmp_path: Path) -> None:
    run_ranks(2, fit_spec, Spec(updates=6, strategy="zero2"), str(tmp_path))
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if "compute_fraction" in line]
    assert lines
    for line in lines:
        assert "reduction_fraction" not in line
        assert line["data_wait_fraction"] + line["compute_fraction"] + line["rest_fraction"] == pytest.approx(1)


def fit_on_a_known_device(spec: Spec, directory: str) -> dict[str, Any]:
    """Fit a spec on a device of which one row a second is a millionth of the peak."""
    import harness.assemble

    harness.assemble._share_of_peak_per_row = lambda *_: 1e-6
    return fit_spec(spec, directory)


def test_a_language_model_counts_tokens_and_a_known_device_its_share_of_the_peak(tmp_path: Path) -> None:
    run_ranks(1, fit_on_a_known_device, Spec(network="gpt", updates=4), str(tmp_path))
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if "samples_per_second" in line]
    assert lines
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(BLOCK * line["samples_per_second"])
        assert line["mfu"] == pytest.approx(1e-6 * line["samples_per_second"])


def test_the_commit_and_whether_it_is_what_runs(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    assert git_state(None) is None, "installed, in whatever repository that is"

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


def test_slurm_ids_and_versions_are_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_job({"PATH": "/bin"}) is None
    assert slurm_job({"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}) == {"job_id": "7", "array_task_id": "3"}
    assert versions()["harness"] == harness.__version__
    monkeypatch.setattr("harness.record.provenance.PACKAGES", ("torch", "no-such-package"))
    assert versions().keys() == {"harness", "torch"}


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

"""Runs whose rows are chosen or changed by chance: the same at any number of ranks and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from harness.observers.ledger import read_lines
from tests import helpers
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main


def rare_rows(folder: Path) -> Path:
    """100 rows, 10 of them of class 1."""
    path = folder / "rows.csv"
    path.write_text("x,y\n" + "\n".join(f"{i / 100},{int(i % 10 == 0)}" for i in range(100)))
    return path


def write_config(folder: Path, **data: Any) -> str:
    config = {
        "run": {"name": "run", "output_root": str(folder), "max_steps": 12},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"global_batch": 16, **data},
        "task": {"kind": "classification", "num_classes": 2},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
    }
    return str(helpers.write_config(folder / "run.json", config))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "run/ledger.jsonl") if line["event"] == "update"]


def check_ranks_and_resume(folder: Path, **data: Any) -> None:
    folder.mkdir()
    config = write_config(folder, **data)
    runs = {name: folder / name for name in ("one", "two", "resumed")}
    assert run_ranks(1, train_main, config, f"run.output_root={runs['one']}") == [0]
    assert run_ranks(2, train_main, config, f"run.output_root={runs['two']}", "strategy.micro_batch=4") == [0, 0]
    for steps in (5, 12):
        assert run_ranks(1, train_main, config, f"run.output_root={runs['resumed']}", f"run.max_steps={steps}") == [0]
    assert len(losses(runs["one"])) == 12
    assert losses(runs["resumed"]) == losses(runs["one"])
    assert losses(runs["two"]) == pytest.approx(losses(runs["one"]), rel=1e-5)


def test_a_balanced_run_is_the_same_on_two_ranks_and_after_a_resume(tmp_path: Path) -> None:
    rows = {"source": "csv", "path": str(rare_rows(tmp_path)), "targets": ["y"]}
    check_ranks_and_resume(tmp_path / "a", **rows, sampling="balanced")
    config = write_config(tmp_path / "a", **rows)
    assert run_ranks(1, train_main, config, f"run.output_root={tmp_path / 'uniform'}") == [0]
    assert losses(tmp_path / "uniform") != losses(tmp_path / "a/one")


def test_augmented_images_are_the_same_on_two_ranks_and_after_a_resume_and_validation_is_left_alone(
    tmp_path: Path,
) -> None:
    for number in range(48):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 5), np.uint8)).save(path)
    images = {"source": "imagefolder", "path": str(tmp_path / "images"), "validation_fraction": 0.25}
    augmented = {"augment_shift_pixels": 2, "augment_horizontal_flip": True}
    check_ranks_and_resume(tmp_path / "a", **images, **augmented)
    config = write_config(tmp_path / "a", **images)
    still = ["optim.peak_lr=1e-30", "run.max_steps=3"]  # nothing is learned, so that only the rows can differ
    scores = {}
    for name, overrides in (
        ("plain", []),
        ("augmented", [f"data.{key}={str(value).lower()}" for key, value in augmented.items()]),
    ):
        assert run_ranks(1, train_main, config, f"run.output_root={tmp_path / name}", *still, *overrides) == [0]
        lines = read_lines(tmp_path / name / "run/ledger.jsonl")
        scores[name] = [line["metrics"]["val/loss"] for line in lines if line["event"] == "evaluation"]
    assert scores["plain"] == scores["augmented"]
    assert losses(tmp_path / "plain") != losses(tmp_path / "augmented")


def test_a_run_on_mapped_columns_is_the_run_in_memory_on_any_ranks_and_after_a_resume(tmp_path: Path) -> None:
    rows = {"source": "csv", "path": str(rare_rows(tmp_path)), "targets": ["y"], "standardize": True}
    check_ranks_and_resume(tmp_path / "mapped", **rows, in_memory=False)
    config = write_config(tmp_path / "mapped", **rows)
    assert run_ranks(1, train_main, config, f"run.output_root={tmp_path / 'memory'}") == [0]
    assert losses(tmp_path / "memory") == losses(tmp_path / "mapped/one")


def test_a_run_on_shards_is_the_same_on_two_ranks_and_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number, size in enumerate((30, 17, 40)):
        numbers = np.arange(size) + 100 * number
        table = pyarrow.table({"x": np.sin(numbers), "y": numbers % 2})
        pyarrow.parquet.write_table(table, tmp_path / f"rows/{number}.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "validation.parquet")
    shards = {"path": str(tmp_path / "rows/*.parquet"), "validation_path": str(tmp_path / "validation.parquet")}
    check_ranks_and_resume(tmp_path / "a", source="parquet_shards", targets=["y"], **shards)

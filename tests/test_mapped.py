"""Tables in mapped files: the same rows as in memory, built once, and never all of them in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.regression.section import RegressionTask
from harness.catalogue.table import open as sources
from harness.catalogue.table.section import TableData
from harness.errors import DataError
from tests.distributed.ranks import run_ranks
from tests.sections import load

NUM_ROWS = 100
TASK = ClassificationTask(kind="classification", num_classes=2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache/harness-columns"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.parquet", seed=0)


def write_rows(path: Path, *, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    columns = {
        "a": [None if i % 9 == 4 else float(value) for i, value in enumerate(generator.normal(5, 2, NUM_ROWS))],
        "c": [["red", "blue", "green"][value] for value in generator.integers(0, 3, NUM_ROWS)],
        "n": list(range(NUM_ROWS)),
        "y": [["no", "yes"][value] for value in generator.integers(0, 2, NUM_ROWS)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def table(path: Path, **options: Any) -> TableData:
    settings: dict[str, Any] = {"targets": ("y",), "categorical": ("c",), "impute": "mean", "standardize": True}
    return TableData(source="parquet", path=str(path), global_batch=8, **{**settings, **options})


@pytest.mark.parametrize("block_rows", [7, 50, 1000])
@pytest.mark.parametrize("own_validation", [False, True])
def test_mapped_rows_are_those_in_memory_to_the_bit(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int, *, own_validation: bool
) -> None:
    monkeypatch.setattr(sources, "BLOCK_ROWS", block_rows)
    other = str(write_rows(tmp_path / "other.parquet", seed=1)) if own_validation else None
    expected = load(table(path, validation_path=other), TASK, seed=3)
    found = load(table(path, validation_path=other, in_memory=False), TASK, seed=3)
    for ours, theirs in ((found.train, expected.train), (found.validation, expected.validation)):
        assert ours.inputs.dtype == torch.float32
        assert torch.equal(ours.inputs, theirs.inputs.float())
        assert torch.equal(ours.targets, theirs.targets)
    assert (found.input_shape, found.num_outputs) == (expected.input_shape, expected.num_outputs)
    assert (found.preprocessing, found.notices) == (expected.preprocessing, expected.notices)


def test_numbers_to_predict_are_mapped_too(path: Path) -> None:
    regression = RegressionTask(kind="regression")
    options: dict[str, Any] = {"targets": ("n", "a"), "categorical": ("c", "y"), "impute": "none"}
    complete = pyarrow.parquet.read_table(path).drop_null()
    pyarrow.parquet.write_table(complete, path)
    expected = load(table(path, **options), regression, seed=0)
    found = load(table(path, in_memory=False, **options), regression, seed=0)
    assert torch.equal(found.train.targets, expected.train.targets.float())
    assert found.num_outputs == 2


def test_columns_are_pages_of_a_file_and_not_memory_of_this_process(path: Path, cache: Path) -> None:
    splits = load(table(path, in_memory=False), TASK, seed=0)
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (folder,) = [entry for entry in cache.iterdir() if entry.is_dir()]
    assert str(folder / "train-inputs.bin") in files
    size = (folder / "train-inputs.bin").stat().st_size
    assert size == 4 * splits.train.inputs.numel()


def test_the_files_are_built_once_and_opened_without_reading_the_table(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(table(path, in_memory=False), TASK, seed=0)
    monkeypatch.setattr(sources, "load_table", None)
    second = load(table(path, in_memory=False), TASK, seed=0)
    assert torch.equal(first.train.inputs, second.train.inputs)


def test_other_rows_another_seed_or_other_columns_are_other_files(path: Path, cache: Path) -> None:
    load(table(path, in_memory=False), TASK, seed=0)
    load(table(path, in_memory=False), TASK, seed=1)
    load(table(path, in_memory=False, standardize=False), TASK, seed=0)
    times = os.stat(path)
    write_rows(path, seed=5)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    load(table(path, in_memory=False), TASK, seed=0)
    assert sum(entry.is_dir() for entry in cache.iterdir()) == 4


def test_a_build_that_failed_leaves_nothing_that_is_taken_for_whole(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sources, "apply_features", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(table(path, in_memory=False), TASK, seed=0)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []
    assert len(load(table(path, in_memory=False), TASK, seed=0).train) == 80


def test_a_number_too_large_for_the_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1.0, 2.0, 1e300, 3.0], "y": [0, 1, 0, 1]}), path)
    data = table(path, categorical=(), impute="none", standardize=False, in_memory=False, validation_fraction=0.25)
    with pytest.raises(DataError, match=r"1 numbers are too large for torch\.float32"):
        load(data, TASK, seed=0)


def load_and_look(path: str, cache: str) -> tuple[int, int]:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    splits = load(table(Path(path), in_memory=False), TASK, seed=0)
    (folder,) = [entry for entry in (Path(cache) / "harness-columns").iterdir() if entry.is_dir()]
    return len(splits.train), (folder / "train-inputs.bin").stat().st_ino


def test_ranks_that_come_together_map_one_and_the_same_file(path: Path, cache: Path) -> None:
    found = run_ranks(4, load_and_look, str(path), str(cache.parent))
    assert len(set(found)) == 1
    assert found[0][0] == 80
    assert not [entry for entry in cache.iterdir() if entry.name.startswith(".")]

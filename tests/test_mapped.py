"""Tables in mapped files: the same rows as in memory, built once, and never all of them in memory."""

from __future__ import annotations

import errno
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
from harness.config.slots import TaskSection
from harness.errors import DataError, StorageError
from harness.rows.cache import Facts, Write, cache_folder, fill_once, read_facts
from harness.rows.splits import DataSplits
from tests.distributed.ranks import run_ranks
from tests.sections import load, prepare

NUM_ROWS = 100
TASK = ClassificationTask(kind="classification", num_classes=2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / ".harness-cache"


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


def mapped(data: TableData, task: TaskSection, *, seed: int) -> DataSplits:
    prepare(data, task, seed=seed)
    return load(data, task, seed=seed)


@pytest.mark.parametrize("block_rows", [7, 50, 1000])
@pytest.mark.parametrize("own_validation", [False, True])
def test_mapped_rows_are_those_in_memory_to_the_bit(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int, *, own_validation: bool
) -> None:
    monkeypatch.setattr(sources, "BLOCK_ROWS", block_rows)
    other = str(write_rows(tmp_path / "other.parquet", seed=1)) if own_validation else None
    expected = load(table(path, validation_path=other), TASK, seed=3)
    found = mapped(table(path, validation_path=other, in_memory=False), TASK, seed=3)
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
    found = mapped(table(path, in_memory=False, **options), regression, seed=0)
    assert torch.equal(found.train.targets, expected.train.targets.float())
    assert found.num_outputs == 2


def test_columns_are_pages_of_a_file_and_not_memory_of_this_process(path: Path, cache: Path) -> None:
    splits = mapped(table(path, in_memory=False), TASK, seed=0)
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (folder,) = [entry for entry in cache.iterdir() if entry.is_dir()]
    assert str(folder / "train-inputs.bin") in files
    size = (folder / "train-inputs.bin").stat().st_size
    assert size == 4 * splits.train.inputs.numel()


def test_the_files_are_built_once_and_opened_without_reading_the_table(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mapped(table(path, in_memory=False), TASK, seed=0)
    monkeypatch.setattr(sources, "load_table", None)
    second = mapped(table(path, in_memory=False), TASK, seed=0)
    assert torch.equal(first.train.inputs, second.train.inputs)


def test_other_rows_another_seed_or_other_columns_are_other_files(path: Path, cache: Path) -> None:
    mapped(table(path, in_memory=False), TASK, seed=0)
    mapped(table(path, in_memory=False), TASK, seed=1)
    mapped(table(path, in_memory=False, standardize=False), TASK, seed=0)
    times = os.stat(path)
    write_rows(path, seed=5)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    mapped(table(path, in_memory=False), TASK, seed=0)
    assert sum(entry.is_dir() for entry in cache.iterdir()) == 4


def test_a_build_that_failed_leaves_nothing_that_is_taken_for_whole(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sources, "apply_features", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mapped(table(path, in_memory=False), TASK, seed=0)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []
    assert len(mapped(table(path, in_memory=False), TASK, seed=0).train) == 80


def test_a_number_too_large_for_the_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1.0, 2.0, 1e300, 3.0], "y": [0, 1, 0, 1]}), path)
    data = table(path, categorical=(), impute="none", standardize=False, in_memory=False, validation_fraction=0.25)
    with pytest.raises(DataError, match=r"1 numbers are too large for torch\.float32"):
        mapped(data, TASK, seed=0)


@pytest.mark.parametrize("all_of_it", [False, True])
def test_columns_that_are_not_what_was_written_are_refused_with_what_to_remove(
    path: Path, cache: Path, *, all_of_it: bool
) -> None:
    data = table(path, in_memory=False)
    mapped(data, TASK, seed=0)
    (folder,) = cache.iterdir()
    content = bytearray((folder / "train-inputs.bin").read_bytes())
    content[7] ^= 1
    (folder / "train-inputs.bin").write_bytes(content if all_of_it else content[:-4])
    look = prepare if all_of_it else load
    with pytest.raises(DataError, match=rf"train-inputs\.bin .*Remove the folder \(rm -r {folder}\)"):
        look(data, TASK, seed=0)


def test_columns_that_are_not_there_are_asked_of_a_folder_that_all_nodes_share(path: Path) -> None:
    with pytest.raises(DataError, match="Set HARNESS_CACHE to a folder that all nodes share"):
        load(table(path, in_memory=False), TASK, seed=0)


def map_and_look(path: str) -> tuple[int, int]:
    splits = mapped(table(Path(path), in_memory=False), TASK, seed=0)
    (folder,) = [entry for entry in (Path(path).parent / ".harness-cache").iterdir() if entry.name[0] != "."]
    return len(splits.train), (folder / "train-inputs.bin").stat().st_ino


def test_runs_that_start_together_map_one_and_the_same_file(path: Path, cache: Path) -> None:
    found = run_ranks(4, map_and_look, str(path))
    assert len(set(found)) == 1
    assert found[0][0] == 80
    assert [entry.name for entry in cache.iterdir() if entry.name[0] == "."] == []


def test_where_another_run_was_quicker_its_folder_is_taken_and_any_other_error_is_told(tmp_path: Path) -> None:
    folder = cache_folder("columns", 1, beside=tmp_path / "rows.csv", environment={})

    def late(write: Write) -> Facts:
        fill_once(folder, lambda write: {"size": write("a.bin", [b"quicker"])})
        return {"size": write("a.bin", [b"late"])}

    fill_once(folder, late)
    assert read_facts(folder, read_all=True) == {"size": 7}
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]

    def broken(write: Write) -> Facts:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with pytest.raises(StorageError, match="Directory not empty"):
        fill_once(cache_folder("columns", 2, beside=tmp_path / "rows.csv", environment={}), broken)

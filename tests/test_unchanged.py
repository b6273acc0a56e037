"""A file that is written while it is read is told, wherever rows come from, and nothing is kept of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.images import read as images
from harness.catalogue.table import open as sources
from harness.catalogue.table import read as tabular
from harness.catalogue.table.shards import ShardedColumns
from harness.errors import DataError
from harness.rows.splits import DataSplits
from tests.sections import load, parsed, prepare

TASK = ClassificationTask(kind="classification", num_classes=2)
CHANGED = r"changed (while it was read|since the run looked at it)"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return


def rows_of(path: str, source: str, **options: Any) -> DataSplits:
    values = {"source": source, "path": path, "targets": ["y"], "global_batch": 2, **options}
    data = parsed("data", values)
    prepare(data, TASK, seed=0)
    return load(data, TASK, seed=0)


def write_rows(path: Path) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"x": range(8), "y": [0, 1] * 4}), path)
    return str(path)


def touched_in(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, path: Path) -> None:
    """Have a file written when a function of a module, which reads it, has returned."""
    original: Callable[..., Any] = getattr(module, name)

    def read(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(module, name, read)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_table_that_changes_is_told_and_leaves_no_columns_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    path = write_rows(tmp_path / "t.parquet")
    where = (tabular, "load_file") if in_memory else (sources, "load_table")  # later than its own look
    with monkeypatch.context() as patch:
        touched_in(patch, *where, Path(path))
        with pytest.raises(DataError, match=CHANGED):
            rows_of(path, "parquet", in_memory=in_memory)
    assert not list((tmp_path / ".harness-cache").glob("**/facts.json"))
    assert len(rows_of(path, "parquet", in_memory=in_memory).train)


def test_an_image_that_changes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (3, 3)).save(tmp_path / "images" / name / "x.png")
    touched_in(monkeypatch, images, "_decode", tmp_path / "images/a/x.png")
    data = {"source": "imagefolder", "path": str(tmp_path / "images"), "global_batch": 2, "validation_fraction": 0.5}
    with pytest.raises(DataError, match=CHANGED):
        load(parsed("data", data), TASK, seed=0)


@pytest.mark.parametrize("other", [True, False])
def test_a_shard_that_is_not_what_it_was_at_the_start_is_told_when_its_rows_are_due(
    tmp_path: Path, other: bool
) -> None:
    (tmp_path / "rows").mkdir()
    paths = [write_rows(tmp_path / f"rows/{part}.parquet") for part in range(2)]
    splits = rows_of(
        str(tmp_path / "rows/*.parquet"), "parquet_shards", validation_path=write_rows(tmp_path / "v.parquet")
    )
    assert isinstance(splits.train, ShardedColumns)
    splits.train.take(np.arange(4))
    if other:
        write_rows(Path(paths[1]))
        with pytest.raises(DataError, match=rf"1\.parquet: {CHANGED}"):
            splits.train.take(np.arange(8, 12))
    else:
        assert len(splits.train.take(np.arange(8, 12))["inputs"]) == 4

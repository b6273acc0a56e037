"""A table in many files: every row once an epoch, from the file it lies in, at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from pydantic import ValidationError

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.table.section import ShardedTableData
from harness.catalogue.table.shards import ShardedColumns
from harness.errors import DataError
from harness.rows.batches import TrainingBatches
from harness.rows.order import BatchPlan, ShardedRows
from harness.rows.splits import DataSplits
from tests.sections import load, parsed

SIZES = (7, 1, 12, 5, 20)
CPU = torch.device("cpu")
TASK = ClassificationTask(kind="classification", num_classes=2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return


def rows(first: int, count: int) -> pyarrow.Table:
    numbers = list(range(first, first + count))
    return pyarrow.table({"x": [n / 2 for n in numbers], "n": numbers, "y": [["no", "yes"][n % 2] for n in numbers]})


@pytest.fixture
def data(tmp_path: Path) -> ShardedTableData:
    """45 numbered rows in five files, and four that validate."""
    (tmp_path / "rows").mkdir()
    for number, size in enumerate(SIZES):
        pyarrow.parquet.write_table(rows(sum(SIZES[:number]), size), tmp_path / f"rows/{number}.parquet")
    pyarrow.parquet.write_table(rows(100, 4), tmp_path / "validation.parquet")
    return sharded(tmp_path)


def sharded(folder: Path, **options: Any) -> ShardedTableData:
    path, validation_path = str(folder / "rows/*.parquet"), str(folder / "validation.parquet")
    values = {"source": "parquet_shards", "path": path, "validation_path": validation_path, "targets": ["y"]}
    return parsed("data", {**values, "global_batch": 8, **options})


def plan_of(splits: DataSplits, *, world_size: int = 1, micro_batch: int | None = None) -> BatchPlan:
    assert isinstance(splits.train, ShardedColumns)
    return BatchPlan(
        num_rows=len(splits.train),
        global_batch=8,
        world_size=world_size,
        micro_batch=micro_batch,
        seed=3,
        order=ShardedRows(splits.train.rows_per_shard, seed=3),
    )


def seen(data: ShardedTableData, position: int, **plan_options: Any) -> list[int]:
    """The numbers of the rows of a global batch, one rank after another, each rank with its own files open."""
    found = []
    splits = [load(data, TASK, seed=0) for _ in range(plan_options.get("world_size", 1))]
    for rank, split in enumerate(splits):
        batches = TrainingBatches(
            split.train, plan_of(split, **plan_options), rank=rank, device=CPU, dtype=torch.float32
        )
        for batch in batches.at(position):
            if not batch.is_padding:
                assert torch.equal(batch.data["inputs"][:, 0] * 2, batch.data["inputs"][:, 1])
                assert torch.equal(batch.data["inputs"][:, 1] % 2, batch.data["targets"].float())  # no 0, yes 1
                found += batch.data["inputs"][:, 1].int().tolist()
    return found


def test_an_epoch_has_every_row_of_every_file_once_in_another_order_each_time(data: ShardedTableData) -> None:
    epochs = [[row for position in range(6 * epoch, 6 * epoch + 6) for row in seen(data, position)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(45))
    assert epochs[0] != epochs[1] != list(range(45))


def test_rows_come_a_file_after_another_and_no_file_is_opened_twice_in_an_epoch(
    data: ShardedTableData, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load(data, TASK, seed=0)
    read: list[str] = []
    original = ShardedColumns._read
    monkeypatch.setattr(ShardedColumns, "_read", lambda self, name: (read.append(name), original(self, name))[1])
    batches = TrainingBatches(splits.train, plan_of(splits), rank=0, device=CPU, dtype=torch.float32)
    order = [int(row) for position in range(6) for batch in batches.at(position) for row in batch.data["inputs"][:, 1]]
    assert len(read) == len(set(read)) == len(SIZES)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)[order]
    assert np.count_nonzero(np.diff(shard_of)) == len(SIZES) - 1


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, None), (4, 1), (8, None)])
def test_the_rows_of_a_position_are_the_same_at_any_number_of_ranks_and_from_a_standing_start(
    data: ShardedTableData, world_size: int, micro_batch: int | None
) -> None:
    for position in (11, 0, 5, 7):  # in no order: the position alone is the cursor
        assert seen(data, position, world_size=world_size, micro_batch=micro_batch) == seen(data, position)


def test_files_of_another_file_system_are_read_by_their_url(tmp_path: Path, data: ShardedTableData) -> None:
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "rows").iterdir():
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    remote = data.model_copy(update={"path": "memory://shards/*.parquet"})
    assert seen(remote, 2) == seen(data, 2)
    memory.rm("/shards", recursive=True)


def test_no_file_is_kept_in_memory_that_the_next_rows_are_not_of(data: ShardedTableData) -> None:
    columns = load(data, TASK, seed=0).train
    assert isinstance(columns, ShardedColumns)
    for first, held in ((0, {0}), (7, {1, 2}), (25, {4})):  # the files have 7, 1, 12, 5 and 20 rows
        columns.take(np.arange(first, first + 5))
        assert set(columns._shards) == held


def test_numbers_come_as_they_stand_in_a_file_and_one_too_large_for_the_precision_of_the_run_is_refused(
    tmp_path: Path, data: ShardedTableData
) -> None:
    table = pyarrow.table({"x": [1e39, 0.1], "n": [0, 1], "y": ["no", "yes"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows/0.parquet")
    splits = load(data.model_copy(update={"path": str(tmp_path / "rows/0.parquet")}), TASK, seed=0)
    for dtype in (torch.float64, torch.float32):
        batches = TrainingBatches(splits.train, plan_of(splits), rank=0, device=CPU, dtype=dtype)
        if dtype == torch.float64:
            assert sorted(batches.at(0)[0].data["inputs"][:, 0].tolist()) == [0.1, 1e39]
        else:
            with pytest.raises(DataError, match=r"1 numbers are too large for torch\.float32, the first 1e\+39"):
                batches.at(0)


def test_the_digest_follows_the_files(tmp_path: Path, data: ShardedTableData) -> None:
    digests = [load(data, TASK, seed=0).train.digest() for _ in range(2)]
    pyarrow.parquet.write_table(rows(1000, 12), tmp_path / "rows/2.parquet")
    digests.append(load(data, TASK, seed=0).train.digest())
    (tmp_path / "rows/1.parquet").unlink()
    digests.append(load(data, TASK, seed=0).train.digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_what_cannot_be_read_is_named(tmp_path: Path, data: ShardedTableData) -> None:
    with pytest.raises(DataError, match=r"none/\*\.parquet: no file matches"):
        load(data.model_copy(update={"path": str(tmp_path / "none/*.parquet")}), TASK, seed=0)
    (tmp_path / "rows/3.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"rows/3\.parquet: cannot be read as parquet"):
        load(data, TASK, seed=0)
    pyarrow.parquet.write_table(rows(0, 5).drop_columns(["x"]), tmp_path / "rows/3.parquet")
    with pytest.raises(DataError, match=r"rows/3\.parquet: has no column 'x', but .*rows/0\.parquet, whose rows train"):
        load(data, TASK, seed=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("standardize", True), ("impute", "mean"), ("categorical", ["x"]), ("sampling", "balanced"), ("in_memory", False)],
)
def test_what_would_have_to_be_learned_from_all_rows_is_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"{key}: parquet_shards are read as they are"):
        sharded(tmp_path, **{key: value})

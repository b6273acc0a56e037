"""A table in many parquet files that are read where they lie, one at a time: for rows that fit on no local disk.

Only the footers are read at the start, for columns and numbers of rows, and labels that are texts. Which row stands at
a place of an epoch follows from them, the seed and the epoch (order.py), so the cursor of a run is its position: a
resumed run, on any number of ranks, goes on with the very row that was next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.table.columns import TEXTS, index_columns, plain
from harness.catalogue.table.read import (
    Table,
    check_names,
    check_same_columns,
    feature_names,
    label_name,
    matrix,
    table_targets,
)
from harness.catalogue.table.section import ShardedTableData
from harness.config.slots import TaskSection
from harness.errors import DataError
from harness.rows.rows import Columns

CHANGES_WITH_CONTENT = ("size", "mtime", "ino", "etag", "ETag", "LastModified", "md5Hash", "generation")
"""What the file systems of fsspec call it."""


class ShardedColumns:
    """All training rows, of which the shards of the last batch are in memory.

    The columns of the first file are those of all; where labels are texts, those of every file are read at the start.

    Args:
        data: its path is a pattern, local or a URL of any file system that fsspec knows; the files are in the order of
            their names.
    Raises:
        DataError: no file matches, one is unreadable, or one has not the columns of the first.
    """

    def __init__(self, data: ShardedTableData, task: TaskSection) -> None:
        self._filesystem, path = fsspec.core.url_to_fs(data.path)
        self._names = sorted(self._filesystem.glob(path))
        if not self._names:
            raise DataError(f"{data.path}: no file matches. data.path wants parquet files, such as rows/*.parquet")
        self._targets, self._task = data.targets, task
        self._digest = hashlib.blake2b(digest_size=8)
        self._states = {name: self._state(name) for name in self._names}
        tables, counts = zip(*map(self._footer, self._names), strict=True)
        self.rows_per_shard = np.array(counts)
        self._firsts = np.cumsum(self.rows_per_shard) - self.rows_per_shard
        self._shards: dict[int, Columns] = {}
        self.first: Table = tables[0]
        self.features, self.notices = feature_names(self.first, data)
        check_names(self.first, self.features, data.targets, ())
        for table in tables[1:]:
            self._check_like_the_first(table, data)
        self.classes: list[str] | None = None
        """Names whose places are the labels, where labels are texts."""
        if isinstance(task, ClassificationTask) and self.first.kind(label := label_name(data.targets)) == TEXTS:
            found = {text for name in self._names for text in self._content(name, [label])[label].unique().to_pylist()}
            self.classes = sorted(found - {None})  # a row without a label is refused when it is read

    def __len__(self) -> int:
        return int(self.rows_per_shard.sum())

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with the name, size or footer of a file; rows are not read."""
        return self._digest.hexdigest()

    def also_validates(self, path: str) -> list[str]:
        """Return a sentence if the file whose rows validate is one of those that train."""
        if str(Path(path).absolute()) not in self._names:
            return []
        return [f"{path}: its rows validate, and it is one of the files that train; keep it out of data.path"]

    def take(self, ids: NDArray[np.int64], *, epoch: int = 0) -> dict[str, Tensor]:
        """Return the inputs and targets of rows, in their order; reads the shards that are not in memory."""
        shards = np.searchsorted(self._firsts, ids, side="right") - 1
        wanted = list(dict.fromkeys(shards.tolist()))
        self._shards = {shard: columns for shard, columns in self._shards.items() if shard in wanted}
        pieces = []
        for shard in wanted:
            if shard not in self._shards:
                self._shards[shard] = self._read(self._names[shard])
            columns, places = self._shards[shard], np.flatnonzero(shards == shard)
            rows = torch.from_numpy(ids[places] - self._firsts[shard])
            pieces.append((torch.from_numpy(places), columns.inputs[rows], columns.targets[rows]))
        order = torch.argsort(torch.cat([places for places, _, _ in pieces]))
        inputs, targets = (torch.cat([piece[part] for piece in pieces])[order] for part in (1, 2))
        return {"inputs": inputs, "targets": targets}

    def _footer(self, name: str) -> tuple[Table, int]:
        """Return a table without rows that has the columns of a file, and how many rows the file has."""
        with self._opened(name) as file:
            content = _parquet(file, name)
            footer, schema = content.metadata, content.schema_arrow
            self._digest.update(f"{name} {file.seek(0, 2)} {footer.num_rows} {footer.to_dict()['row_groups']}".encode())
        if footer.num_rows == 0:
            raise DataError(f"{name}: there is not one row in it. Remove it.")
        index = tuple(index_columns(schema.metadata))
        return Table(Path(name), plain(schema.empty_table()), index=index), int(footer.num_rows)

    def _check_like_the_first(self, table: Table, data: ShardedTableData) -> None:
        check_same_columns(table, [*self.features, *data.targets], as_in=self.first)
        more = set(table.arrow.column_names) - set(self.first.arrow.column_names)
        if data.features is None and more:
            raise DataError(
                f"{table.path}: has a column {min(more)!r} that {self.first.path}, the first of the files, has not. "
                "Name the columns that the model is to see in data.features, or write all files alike"
            )

    def _read(self, name: str) -> Columns:
        table = Table(Path(name), self._content(name, [*self.features, *self._targets]))
        targets, _ = table_targets(table, self._targets, self._task, self.classes)
        return Columns(torch.from_numpy(matrix(table, self.features)), torch.from_numpy(targets))

    def _content(self, name: str, columns: Sequence[str]) -> Any:
        """Return columns of a shard that is as it was at the start."""
        with self._opened(name) as file:
            content = _parquet(file, name)
            if self._state(name) == self._states[name]:
                table = content.read(list(dict.fromkeys(columns)))
        if self._state(name) != self._states[name]:
            raise DataError(f"{name}: changed since the run looked at it. Start again when nothing writes it")
        return plain(table)

    def _state(self, name: str) -> dict[str, Any]:
        """Return what a file system tells of a file that changes when it is written again."""
        return {key: value for key, value in self._filesystem.info(name).items() if key in CHANGES_WITH_CONTENT}

    def _opened(self, name: str) -> Any:
        try:
            return self._filesystem.open(name, "rb")
        except OSError as error:
            raise DataError(f"{name}: cannot be opened: {error}. Put it back, or mend data.path") from error


def _parquet(file: Any, name: str) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read as parquet: {error}. Write it again.") from error

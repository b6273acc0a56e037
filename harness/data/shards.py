"""A table in many parquet files that are read where they lie, one at a time: for rows that fit on no local disk.

Only the footers are read at the start, for the numbers of rows. Which row stands at a place of an epoch follows from
them, the seed and the epoch (order.py), so the cursor of a run is its position: a resumed run, on any number of ranks,
goes on with the very row that was next.
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

from harness.config.tasks import Task
from harness.data.batches import Columns
from harness.data.tabular import Table, check_names, matrix, table_targets
from harness.errors import DataError


class ShardedColumns:
    """All training rows, of which the shards of the last batch are in memory.

    Args:
        pattern: local, or a URL of any file system that fsspec knows, with `*`; the files in the order of their names.
        features, targets: columns of numbers (or of labels, see `classes`), in every file.
        classes: names whose places are the labels, where labels are texts.
    Raises:
        DataError: no file matches, or one is unreadable or has not these columns.
    """

    def __init__(
        self, pattern: str, *, features: Sequence[str], targets: Sequence[str], task: Task, classes: list[str] | None
    ) -> None:
        self._filesystem, path = fsspec.core.url_to_fs(pattern)
        self._names = sorted(self._filesystem.glob(path))
        if not self._names:
            raise DataError(f"{pattern}: no file matches. data.path wants parquet files, such as rows/*.parquet")
        self._features, self._targets, self._task, self._classes = features, targets, task, classes
        self._digest = hashlib.blake2b(digest_size=8)
        self.rows_per_shard = np.array([self._num_rows(name) for name in self._names])
        self._firsts = np.cumsum(self.rows_per_shard) - self.rows_per_shard
        self._shards: dict[int, Columns] = {}

    def __len__(self) -> int:
        return int(self.rows_per_shard.sum())

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with the name, size or footer of a file; rows are not read."""
        return self._digest.hexdigest()

    def take(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
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
        return inputs, targets

    def _num_rows(self, name: str) -> int:
        with self._opened(name) as file:
            footer = _parquet(file, name).metadata
            self._digest.update(f"{name} {file.seek(0, 2)} {footer.num_rows} {footer.to_dict()['row_groups']}".encode())
            if footer.num_rows == 0:
                raise DataError(f"{name}: there is not one row in it. Remove it.")
            return int(footer.num_rows)

    def _read(self, name: str) -> Columns:
        with self._opened(name) as file:
            content = _parquet(file, name)
            columns = [*self._features, *self._targets]
            table = Table(Path(name), content.read([name for name in columns if name in content.schema_arrow.names]))
        check_names(table, self._features, self._targets, ())
        targets, _ = table_targets(table, self._targets, self._task, self._classes)
        return Columns(torch.from_numpy(matrix(table, self._features)), targets)

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

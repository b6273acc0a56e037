"""A local folder of images, one sub-folder a class, turned into columns of numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from harness.errors import DataError
from harness.rows.unchanged import check_unchanged, file_states

SUFFIXES = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
ONCE_LEFT_OUT = (".avif", ".avifs", ".mpo", ".qoi", ".pfm", ".palm")
"""Suffixes of images that were no rows before READING was 2."""
CHANNELS = {"L": 1, "RGB": 3}  # of the image modes that are numbers from 0 to 255 as they stand


def class_folders(root: Path, num_classes: int | None) -> list[str]:
    """Return the names of the sub-folders in alphabetical order: label 0 is the first.

    Args:
        num_classes: how many there must be; None is any number.
    Raises:
        DataError: there is no such folder, or another number of sub-folders in it.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root.absolute()}: {what}, but an image folder is wanted, with one sub-folder a class")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if "__MACOSX" in names:
        raise DataError(f"{root / '__MACOSX'}: macOS puts this folder into zip files, and it is no class; remove it")
    if not names:
        raise DataError(f"{root}: has no sub-folder, but one a class is wanted, with the images of the class in it")
    if num_classes is not None and len(names) != num_classes:
        raise DataError(
            f"{root}: has {len(names)} class folders, {names[0]} to {names[-1]}, but task.num_classes is "
            f"{num_classes}. Set it to {len(names)}, or mend the folder."
        )
    return names


def check_same_classes(root: Path, classes: list[str], *, as_in: Path) -> None:
    """Refuse a folder whose class folders are not those of the one whose images train.

    Raises:
        DataError: they are not.
    """
    difference = sorted(set(classes) ^ set(class_folders(root, None)))
    if difference:
        raise DataError(
            f"{root}: its class folders are not those of {as_in}, so labels would mean different things; only one of "
            f"them has {', '.join(difference[:5])}"
        )


@dataclass(frozen=True)
class FolderOfImages:
    """The images of the class folders, and what there is to say of the others."""

    inputs: NDArray[np.float32]
    """(N, C, H, W) from 0 to 1."""
    labels: NDArray[np.int64]
    """(N,)"""
    notices: tuple[str, ...]
    read_otherwise: tuple[str, ...]


def read_images(root: Path, classes: list[str]) -> FolderOfImages:
    """Return the images of a folder.

    Raises:
        DataError: a class has no image, an image lies elsewhere or is not called like one, cannot be read, is neither
            grey (L) nor RGB, or has another size or mode than the first.
    """
    paths, left_out = _find_images(root.resolve(), classes)
    before = file_states(paths)
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
    check_unchanged(before)
    inputs /= 255
    labels = np.array([classes.index(path.parent.name) for path in paths], np.int64)
    once_left_out = sorted({suffix for path in paths if (suffix := path.suffix.lower()) in ONCE_LEFT_OUT})
    return FolderOfImages(
        inputs,
        labels,
        left_out,
        tuple(f"reads the {suffix} files of {root}" for suffix in once_left_out),
    )


def _find_images(root: Path, classes: list[str]) -> tuple[list[Path], tuple[str, ...]]:
    """Return the images directly in the class folders, in the order of their paths, and sentences about other files."""
    files = sorted(_files_below(root), key=str)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    here = [path for path in images if path.parent.parent == root and not path.name.startswith(".")]
    here = [path for path in here if path.parent.name in classes]
    without = sorted(set(classes) - {path.parent.name for path in here})
    if without:
        raise DataError(f"{root}: class {without[0]!r} has no image. Add some, or remove the folder.")
    elsewhere = sorted(set(images) - set(here))
    if elsewhere:
        raise DataError(
            f"{root}: {len(elsewhere):,} images are hidden or not directly in a class folder, the first "
            f"{elsewhere[0]}. Move or remove them."
        )
    others = [path for path in files if path.suffix.lower() not in SUFFIXES]
    for path in {path.suffix.lower(): path for path in reversed(others)}.values():  # the first of each suffix
        if _is_image(path):
            raise DataError(
                f"{path}: is an image, but not called like one. Give it a suffix that says so, such as .png."
            )
    if not others:
        return here, ()
    return here, (f"{root}: {len(others):,} files that are no images are left out, the first {others[0]}",)


def _files_below(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root, followlinks=True):
        yield from (Path(folder, name) for name in names)


def _is_image(path: Path) -> bool:
    try:
        with PIL.Image.open(path):
            return True
    except PIL.Image.DecompressionBombError:
        return True
    except (OSError, SyntaxError, ValueError):  # what PIL raises for what is none
        return False


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

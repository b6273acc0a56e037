"""A first look at a folder of images, for `harness check`; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import PIL.Image

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.images.read import CHANNELS, check_same_classes, class_folders
from harness.catalogue.images.section import ImageFolderData
from harness.config.slots import TaskSection
from harness.errors import DataError

FIRST_FILES = 20


def look_at_images(data: ImageFolderData, task: TaskSection) -> Iterator[str]:
    root = Path(data.path)
    classes = class_folders(root, task.num_classes if isinstance(task, ClassificationTask) else None)
    if data.validation_path is not None:
        check_same_classes(Path(data.validation_path), classes, as_in=root)
    seen = 0
    for folder in [root / name for name in classes[:FIRST_FILES]]:
        path = next((path for path in sorted(folder.iterdir()) if path.is_file()), None)
        if path is not None:
            seen += _is_good_image(path)
    yield f"{root}: {len(classes):,} class folders, of which the first file of {seen:,} was looked at"


def _is_good_image(path: Path) -> bool:
    try:
        with PIL.Image.open(path) as image:
            mode = image.mode
    except PIL.Image.DecompressionBombError as error:
        raise DataError(f"{path}: cannot be read as an image: {error} Replace or remove it.") from error
    except (OSError, SyntaxError, ValueError):
        return False  # perhaps a note, which is left out
    if mode not in CHANNELS:
        raise DataError(
            f"{path}: is an image of mode {mode}, but {' or '.join(CHANNELS)} is wanted. Convert all to RGB."
        )
    return True

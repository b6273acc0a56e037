"""The section of a table with a text and its label in each row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, model_validator

from harness.config.data import DataSection
from harness.config.fields import PositiveInt, WrongKey
from harness.config.slots import KnownRows, TaskSection
from harness.parts import data

if TYPE_CHECKING:
    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits

TABLE_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def table_format(path: str) -> str:
    """Return the path of a table, whose suffix says how it is read."""
    if PurePath(path).suffix not in TABLE_SUFFIXES:
        raise ValueError(f"a file name that ends with {', '.join(TABLE_SUFFIXES)} is wanted")
    return path


@data("text_table")
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

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems
        from harness.catalogue.text_table.agree import text_table_problems

        return [*language_problems(config), *text_table_problems(config)]

    def problems_here(self, config: RunConfig, *, must_be_there: bool) -> list[str]:
        from harness.catalogue.pretrained.directory import pretrained_problems

        return pretrained_problems(config, must_be_there=must_be_there)

    def open(self, task: TaskSection, *, seed: int) -> DataSplits:
        from harness.catalogue.text_table.open import open_rows

        return open_rows(self, task, seed=seed)

    def look(self, task: TaskSection) -> Iterator[str]:
        from harness.catalogue.text_table.look import look_at_texts

        return look_at_texts(self, task)

    def known_rows(self, task: TaskSection) -> KnownRows | None:
        from harness.catalogue.table.noted import known_rows_of_table

        own = self.validation_path
        return known_rows_of_table(self, task, path=self.path, validation_path=own, targets=[self.target])

"""The sections of tables of numbers: one file, or many parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from harness.config.data import DataSection
from harness.config.fields import WrongKey
from harness.config.slots import KnownRows, TaskSection
from harness.parts import data

if TYPE_CHECKING:
    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits


@data("csv")
@data("parquet")
@data("json")
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
    """false: the columns are written once and mapped, for tables larger than memory: to the folder that HARNESS_CACHE
    names, or .harness-cache beside the file. The other ranks wait for rank zero to do so as long as
    strategy.collective_timeout_seconds."""
    standardize: bool = False
    """Bring features that are numbers to mean 0 and standard deviation 1."""

    @model_validator(mode="after")
    def _categorical_are_features(self) -> TableData:
        for name in self.categorical:
            if name in self.targets or (self.features is not None and name not in self.features):
                raise WrongKey("categorical", f"{name!r} is not one of the features")
        return self

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems

        problems = language_problems(config)
        if not self.in_memory and config.strategy.precision == "fp64":
            problems.append("data.in_memory: false keeps columns in fp32, strategy.precision is fp64; use fp32")
        return problems

    def prepare(self, task: TaskSection, *, seed: int) -> None:
        if not self.in_memory:
            from harness.catalogue.table.open import write_rows

            write_rows(self, task, seed=seed)

    def open(self, task: TaskSection, *, seed: int) -> DataSplits:
        from harness.catalogue.table.open import open_rows

        return open_rows(self, task, seed=seed)

    def look(self, task: TaskSection) -> Iterator[str]:
        from harness.catalogue.table.look import look_at_table

        return look_at_table(self, task)

    def known_rows(self, task: TaskSection) -> KnownRows | None:
        from harness.catalogue.table.noted import known_rows_of_table

        own = self.validation_path
        return known_rows_of_table(self, task, path=self.path, validation_path=own, targets=[*self.targets])


@data("parquet_shards")
class ShardedTableData(TableData):
    """A table of numbers in many parquet files that are read in place, one at a time, and never copied.

    Every row is seen once an epoch; an update takes its rows from one file, or two, so rows that stand sorted over the
    files are not well mixed. Nothing is learned from the rows before training, so they have to be numbers as they are.
    """

    counts_labels: ClassVar[bool] = False
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

    def look(self, task: TaskSection) -> Iterator[str]:
        from harness.catalogue.table.look import look_at_shards

        return look_at_shards(self, task)

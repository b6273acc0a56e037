"""The section that describes the rows: what every source has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from harness.config.fields import CountInt, Float, NoneOfSeveral, PositiveInt, Section
from harness.config.slots import KnownRows, PartSection, TaskSection, UnknownSection, Verdict

if TYPE_CHECKING:
    from harness.rows.splits import DataSplits


class DataSection(PartSection):
    """What every source has: how much of it validates, and how many rows one update sees over all ranks."""

    if TYPE_CHECKING:
        source: str  # a kind declares it where it belongs among its keys

    counts_labels: ClassVar[bool] = True
    """Whether the labels of all rows can be counted before the first update."""
    has_lengths: ClassVar[bool] = False
    """Whether the rows may be of different lengths, and say them."""
    global_batch: PositiveInt
    validation_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    stratify: bool = True
    """Where rows have labels, each class has the same share of the rows that are set aside for validation."""
    sampling: Literal["uniform", "balanced", "by_length"] = "uniform"
    """balanced takes as many rows of each class in an epoch: a sample of a large one, those of a small one again.
    by_length puts rows of about one length into an update, for rows that say their `lengths`."""

    def prepare(self, task: TaskSection, *, seed: int) -> None:
        """Write what all ranks will read from one place; for one rank, before any of them opens the rows.

        Raises:
            DataError, StorageError: that is not possible.
        """

    def open(self, task: TaskSection, *, seed: int) -> DataSplits:
        """Read the rows of a run from local files; every rank gets the same.

        Args:
            seed: decides which rows validate, where they have no file of their own.
        Raises:
            DataError: the files are missing or unreadable, hold something else than the task needs, or too few rows.
        """
        raise NotImplementedError

    def look(self, task: TaskSection) -> Iterator[str]:
        """Yield what of the rows was looked at before any run, and what was not, a sentence each; without torch.

        Raises:
            DataError: of the first rows or files, what the run would refuse.
        """
        yield f"data.source: no row of {self.source}; it is first asked for rows when the run starts"

    def known_rows(self, task: TaskSection) -> KnownRows | None:
        """Return the counts of the rows if they are known; none is read for them."""
        return None


def _fill(value: Any) -> bool | int | float:
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise NoneOfSeveral("a number is wanted")


Fill = Annotated[bool | int | float, PlainValidator(_fill), WithJsonSchema({"type": "number"})]
"""What a tensor may hold: a number, or true or false."""
TWO_COLLATES = "data.collate: {name} brings a method collate(rows) of its own; leave out data.collate, or the method"
FillOrEach = Annotated[
    Annotated[Fill, Tag("value")] | Annotated[dict[str, Fill], Field(min_length=1), Tag("keys")],
    Discriminator(lambda given: "keys" if isinstance(given, dict) else "value"),
]


class Pad(Section):
    """How rows that differ in shape become one tensor: each is padded at its ends to the longest of the micro-batch."""

    pad: FillOrEach
    """What stands behind the end of a row: in every tensor whose rows differ, or in those named by their paths."""
    multiple_of: PositiveInt = 1
    """Sizes are rounded up to multiples of it.

    Without names the dimensions in which the rows of a micro-batch differ; of tensors that are named the first, always.
    """

    @property
    def fills(self) -> Mapping[str, bool | int | float] | None:
        """What each tensor is padded with that is named; None where one value is for all."""
        return self.pad if isinstance(self.pad, dict) else None

    def fill_of(self, path: str) -> bool | int | float | None:
        """Return what the tensor at a path is padded with, None if it is not to be padded."""
        return self.pad.get(path) if isinstance(self.pad, dict) else self.pad


class DatasetSection(DataSection):
    """Rows of a map-style Dataset, which are read when a batch wants them."""

    has_lengths: ClassVar[bool] = True
    resume_verdicts: ClassVar[Mapping[str, Verdict]] = {"workers": "allowed"}
    workers: CountInt = 0
    """Processes of each rank that read rows ahead; 0 reads them in the rank itself."""
    collate: Pad | None = None
    """How rows of different shapes are brought to one; null refuses them, but for a part that has a `collate`."""


class UnknownData(UnknownSection, DataSection):
    """Rows of a source that is not known here."""

    model_config = ConfigDict(extra="allow")
    source: str

"""What every part of a run is to the core: a section of its slot, and what a kind may say of itself and of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict

from harness.config.fields import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits
    from harness.tasks.base import TaskLoss

Verdict = Literal["refused", "noticed", "allowed"]
"""What a resumed run makes of a key that has another value than before."""


@dataclass(frozen=True)
class KnownRows:
    """Counts of the rows that a run will see, known before any of them is read."""

    updates_per_epoch: int
    classes: Mapping[str, int]
    """Rows of each class, those set aside for validation included; {} if they are not known."""


class PartSection(Section):
    """A section that one of several kinds describes: ours, or one of a user's file."""

    resume_verdicts: ClassVar[Mapping[str, Verdict]] = {}
    """Of keys that may change when a run is resumed; any other may not."""

    def may_change(self, key: str, judging: Set[str]) -> Verdict:
        """Return what a resumed run makes of another value of a key.

        Args:
            judging: the metrics that decide something about the run.
        """
        return self.resume_verdicts.get(key, "refused")

    def problems(self, config: RunConfig) -> list[str]:
        """Return what contradicts other sections, one `path: problem` a line; two sections may say the same."""
        return []

    def problems_here(self, config: RunConfig, *, must_be_there: bool) -> list[str]:
        """Return what is wrong with files that this section names, one `path: problem` a line.

        Args:
            must_be_there: whether one that is missing is a problem, since the run is to start here.
        """
        return []

    def advice(self, config: RunConfig, *, ranks: int | None, rows: KnownRows | None) -> Iterator[str]:
        """Yield what `harness check` says of this section, `WARNING: ` before what does not fit; without torch.

        Args:
            ranks: how many there will be, if that is known.
            rows: what is known of the data.
        """
        return iter(())

    @property
    def is_known(self) -> bool:
        """Whether its kind is known here; what is not can be read, and not built."""
        return True

    @property
    def is_ours(self) -> bool:
        """Whether it is of the catalogue, and so knows the other kinds of the catalogue."""
        return type(self).__module__.startswith("harness.catalogue.")

    @property
    def keys_without_meaning(self) -> set[str]:
        """Keys about something that this section does not have."""
        return set()

    @property
    def extras(self) -> set[str]:
        """Extras of our distribution whose versions can change what a run computes."""
        return set()


class ModelSection(PartSection):
    """The section of a network."""

    if TYPE_CHECKING:
        kind: str  # a kind declares it where it belongs among its keys

    is_of_transformers: ClassVar[bool] = False
    """Whether an export is as that library wants it, and has our description in a file of its own."""
    starts_from_nothing: ClassVar[bool] = True
    """Whether none of its weights was learned before."""

    @property
    def wants_sync_batch_norm(self) -> bool:
        """Whether BatchNorm takes its statistics over all ranks."""
        return False

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the plain data of all sections after what a network of this kind says of the others."""
        return values

    def build(self, facts: Mapping[str, Any]) -> nn.Module:
        """Return the network; its weights depend on torch's random state.

        Args:
            facts: what the data say of themselves, `input_shape` and `num_outputs` among them.
        """
        raise NotImplementedError

    def with_facts(self, facts: Mapping[str, Any]) -> tuple[ModelSection, list[str]]:
        """Return this section after it has taken what it leaves to the data, and a sentence for what it took.

        Raises:
            ConfigError: the data do not say it, or say otherwise than the section.
        """
        return self, []

    @property
    def facts_wanted(self) -> tuple[str, ...]:
        """Keys that may be left to the data."""
        return ()

    def write_export(self, directory: Path, tensors: Mapping[str, Tensor], described: dict[str, Any]) -> None:
        """Write all files of an export; only where it `is_of_transformers`."""
        raise NotImplementedError

    def as_exported(self, directory: Path) -> ModelSection:
        """Return the section that builds the network of an export."""
        return self


class TaskSection(PartSection):
    """The section of a task."""

    if TYPE_CHECKING:
        kind: str

    has_labels: ClassVar[bool] = False
    """Whether each row is of one class, so that rows of every class can be drawn equally often."""
    higher_is_better: ClassVar[tuple[str, ...]] = ()
    """Of its metrics; of every other the lower is better."""

    @property
    def metric_names(self) -> tuple[str, ...] | None:
        """The numbers of an evaluation; None where they are known with the task alone."""
        return None

    def build(self, splits: DataSplits, *, device: torch.device, dtype: torch.dtype) -> TaskLoss:
        """Return the task for the rows of `splits`.

        Args:
            device: where the network's outputs are.
            dtype: of these outputs.
        Raises:
            DataError: it cannot be told from the rows.
        """
        raise NotImplementedError

    def num_outputs(self, targets: Tensor | None) -> int:
        """Return how many numbers of a network a row of a user's wants; 0 where the task does not say.

        Args:
            targets: (1, ...) of a row, if it has such a column.
        """
        return 0

    def check_judges(self, config: RunConfig, splits: DataSplits) -> None:
        """Refuse to judge a run by a score that its validation rows say nothing of.

        Raises:
            DataError: the score would be NaN, or 0, in every evaluation.
        """

    def why_there_is_none(self, metric: str) -> str:
        """Return why no evaluation has this metric."""
        return f"{self.kind} has no {metric!r}; it has {', '.join(self.metric_names or ())}"


class UnknownSection(Section):
    """What a kind that is not known here was configured with, kept as it is."""

    @property
    def is_known(self) -> bool:
        """Whether its kind is known here."""
        return False


class UnknownModel(UnknownSection, ModelSection):
    """A network of a kind that is not known here."""

    model_config = ConfigDict(extra="allow")
    kind: str


class UnknownTask(UnknownSection, TaskSection):
    """A task of a kind that is not known here."""

    model_config = ConfigDict(extra="allow")
    kind: str

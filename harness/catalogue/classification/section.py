"""The section of classification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from harness.config.fields import Int, NumberOrName, PositiveFloat, Probability, ValueOrList, WrongKey
from harness.config.slots import KnownRows, TaskSection, Verdict
from harness.parts import task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits
    from harness.tasks.base import TaskLoss


@task("classification")
class ClassificationTask(TaskSection):
    """One integer label a row; cross-entropy."""

    has_labels: ClassVar[bool] = True
    resume_verdicts: ClassVar[Mapping[str, Verdict]] = {"positive_class": "noticed", "confusion_matrix": "allowed"}
    metrics_of_one_class: ClassVar = ("val/f1", "val/precision", "val/recall", "val/auc", "val/average_precision")
    higher_is_better: ClassVar[tuple[str, ...]] = ("val/accuracy", "val/macro_f1", *metrics_of_one_class)
    kind: Literal["classification"]
    num_classes: Annotated[Int, Field(ge=2)]
    label_smoothing: Probability = 0.0
    """Share of each row's target that is spread evenly over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""
    class_weights: ValueOrList[Literal["balanced"], PositiveFloat] | None = None
    """How much a row of each class counts; `balanced` is the number of rows by that of its class and of classes."""
    positive_class: NumberOrName | None = None
    """The class of f1, precision, recall, auc and average_precision, by number, or by name where labels are texts; 1 of
    two classes if nothing is said."""
    confusion_matrix: bool = False
    """Write it with each evaluation: rows are true classes, columns predicted ones."""

    @model_validator(mode="after")
    def _classes_are_there(self) -> ClassificationTask:
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != self.num_classes:
            raise WrongKey("class_weights", f"{len(self.class_weights)} entries for {self.num_classes} classes")
        if isinstance(self.positive_class, int) and self.positive_class >= self.num_classes:
            raise WrongKey("positive_class", f"{self.positive_class} is not one of 0 to {self.num_classes - 1}")
        return self

    @property
    def scored_class(self) -> int | str | None:
        """The class that metrics of one class are about, as the configuration has it."""
        return 1 if self.positive_class is None and self.num_classes == 2 else self.positive_class

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The numbers of an evaluation."""
        of_class = self.metrics_of_one_class if self.scored_class is not None else ()
        return ("val/loss", "val/accuracy", "val/macro_f1", *of_class)

    def build(self, splits: DataSplits, *, device: torch.device, dtype: torch.dtype) -> TaskLoss:
        from harness.catalogue.classification.classes import scored_class
        from harness.catalogue.classification.task import Classification, class_weights

        weights = class_weights(self.class_weights, splits.train, num_classes=self.num_classes)
        weights = None if weights is None else weights.to(device=device, dtype=dtype)
        classes = splits.preprocessing.get("classes")
        return Classification(self, class_weights=weights, classes=classes, scored_class=scored_class(self, classes))

    def num_outputs(self, targets: Tensor | None) -> int:
        return self.num_classes

    def check_judges(self, config: RunConfig, splits: DataSplits) -> None:
        from harness.catalogue.classification.classes import check_judges

        check_judges(self, config, splits.validation, splits.preprocessing.get("classes"))

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems

        return [*language_problems(config), *self._imbalance_problems(config)]

    def _imbalance_problems(self, config: RunConfig) -> list[str]:
        if self.class_weights is not None and config.data.sampling == "balanced":
            return [
                "task.class_weights: rare classes count more already by data.sampling: balanced; leave one of them out"
            ]
        if self.class_weights == "balanced" and not config.data.counts_labels:
            return [
                f"task.class_weights: the labels of {config.data.source} are not counted beforehand; list the weights"
            ]
        return []

    def advice(self, config: RunConfig, *, ranks: int | None, rows: KnownRows | None) -> Iterator[str]:
        from harness.catalogue.classification.advice import advice

        return advice(self, config, rows)

    def why_there_is_none(self, metric: str) -> str:
        if metric not in self.metrics_of_one_class:
            return super().why_there_is_none(metric)
        wanted = "; or use val/macro_f1, which is of all" if metric == "val/f1" else ""
        return f"{metric} is a score of one class of {self.num_classes}; say which with task.positive_class{wanted}"

    def may_change(self, key: str, judging: Set[str]) -> Verdict:
        # Scores of one class are no longer those that the ledger has, which an evaluation is compared with.
        is_judged = key == "positive_class" and not judging.isdisjoint(self.metrics_of_one_class)
        return "refused" if is_judged else super().may_change(key, judging)

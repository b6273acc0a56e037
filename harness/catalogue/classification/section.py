"""The section of classification."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from harness.config.fields import Int, NumberOrName, PositiveFloat, Probability, Section, ValueOrList, WrongKey


class ClassificationTask(Section):
    """One integer label a row; cross-entropy."""

    metrics_of_one_class: ClassVar = ("val/f1", "val/precision", "val/recall", "val/auc", "val/average_precision")
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
    def metrics(self) -> tuple[str, ...]:
        """The numbers of an evaluation."""
        of_class = self.metrics_of_one_class if self.scored_class is not None else ()
        return ("val/loss", "val/accuracy", "val/macro_f1", *of_class)

"""What is looked at in the rows of a run, whatever they were read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from harness.catalogue.classification.classes import class_notices, target_notices
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.regression.section import RegressionTask
from harness.config.slots import TaskSection
from harness.errors import DataError
from harness.rows.rows import AnyRows, Columns
from harness.rows.splits import DataSplits


def finished(splits: DataSplits, task: TaskSection, *, targets: Sequence[str] = ()) -> DataSplits:
    """Return rows of a fixed shape with what there is to say of their labels or numbers.

    Args:
        targets: names of the numbers to predict.
    Raises:
        DataError: rows that validate have another shape than those that train.
    """
    assert isinstance(splits.validation, Columns), "what validates is in memory"
    shape, other_shape = splits.input_shape, tuple(splits.validation.inputs.shape[1:])
    if shape != other_shape:
        raise DataError(f"a training row has shape {shape}, a validation row {other_shape}; bring them to one size")
    notices = [*splits.notices, *same_rows(splits.train, splits.validation)]
    if isinstance(task, ClassificationTask):
        notices += class_notices(splits.train, splits.validation, task, splits.preprocessing.get("classes"))
    elif isinstance(task, RegressionTask) and targets:
        notices += target_notices(splits.validation, targets)
    return replace(splits, notices=tuple(notices))


def num_outputs_of(task: TaskSection, *, otherwise: int) -> int:
    """Return how many numbers a network puts out for a row: one a class, or those to predict."""
    return task.num_classes if isinstance(task, ClassificationTask) else otherwise


def named(task: TaskSection, num_outputs: int) -> dict[str, int]:
    """Return the facts that say how many numbers a network puts out."""
    return {"outputs": num_outputs, **({"classes": num_outputs} if isinstance(task, ClassificationTask) else {})}


def same_rows(train: AnyRows, validation: Columns) -> tuple[str, ...]:
    """Return a sentence where what validates is what trains, whatever the files are called."""
    if not isinstance(train, Columns) or train.inputs.shape != validation.inputs.shape:
        return ()
    if not (torch.equal(train.inputs, validation.inputs) and torch.equal(train.targets, validation.targets)):
        return ()
    return (
        "the rows that validate are those that train, so every score says how well they were learned by heart; give "
        "others in data.validation_path, or leave it out, and data.validation_fraction of the rows is set aside",
    )

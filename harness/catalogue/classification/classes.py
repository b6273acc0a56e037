"""Which classes and numbers have rows to learn from, and rows to be judged by."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.catalogue.classification.section import ClassificationTask
from harness.config.checks import judging_metrics
from harness.config.run_config import RunConfig
from harness.errors import DataError
from harness.rows.rows import AnyRows, labels_of, targets_of

NO_TEXTS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "nan")
"""Words that YAML may read as something else."""
NAMED = 5  # classes in a sentence


def class_notices(
    train: AnyRows, validation: AnyRows, task: ClassificationTask, names: Sequence[Any] | None
) -> list[str]:
    """Return sentences for the classes without a training row or a validation row, and for a scored class nobody chose.

    Args:
        train: the labels of shards are not looked at.
        names: of the classes, where labels have some.
    Raises:
        DataError: all rows are of one class.
    """
    notices = []
    scored = scored_class(task, names)
    if names is not None and task.positive_class is None and scored is not None:
        notices.append(
            f"precision, recall, f1, auc and average_precision are of class {_named([scored], names)}, the "
            f"second by the alphabet; task.positive_class={_quoted(names[0])} makes them of {_named([0], names)}"
        )
    labels, of_train = labels_of(validation), labels_of(train)
    if labels is None:
        return notices
    of_validation = _counts(labels, task)
    if of_train is not None:
        of_training = _counts(of_train, task)
        if len(present := (of_training + of_validation).nonzero().flatten().tolist()) == 1:
            raise DataError(
                f"all {len(train) + len(validation):,} rows are of class {_named(present, names)}, so there is nothing "
                "to tell apart. Check data.path and data.targets."
            )
        if missing := _without_rows(of_training):
            notices.append(
                f"no training row is of class {_named(missing, names)}, so nothing is learned of it; lower "
                "task.num_classes if there is no such class"
            )
    if missing := _without_rows(of_validation):
        notices.append(
            f"no validation row is of class {_named(missing, names)}, so the scores say nothing of it; where rows "
            "are set aside, a larger data.validation_fraction or data.stratify=true sees to it"
        )
    return notices


def constant_targets(validation: AnyRows) -> list[int]:
    """Return which of the (N, K) numbers to predict are the same in all rows, so that no variance can be explained."""
    targets = targets_of(validation)
    if targets is None or targets.dim() != 2:
        return []
    varies = (targets != targets[0]).any(dim=0)
    return [target for target, does in enumerate(varies.tolist()) if not does]


def target_notices(validation: AnyRows, names: Sequence[str]) -> list[str]:
    """Return a sentence for the targets that val/r2 says nothing of, if there are some."""
    constant = constant_targets(validation)
    if not constant:
        return []
    rest = "of the other targets" if len(constant) < len(names) else "not defined, and null in the ledger"
    return [f"{_named(constant, names)} is one number in all {len(validation):,} validation rows, so val/r2 is {rest}"]


def check_judges(task: ClassificationTask, config: RunConfig, validation: AnyRows, names: Sequence[Any] | None) -> None:
    """Refuse to judge a run by a score of one class that its validation rows say nothing of.

    Raises:
        DataError: the score would be NaN, or 0, in every evaluation.
    """
    labels, scored = labels_of(validation), scored_class(task, names)
    if labels is None or scored is None:
        return
    num_positive = int(_counts(labels, task)[scored])
    for section, (metric, _) in judging_metrics(config).items():
        wants_others = metric in ("val/auc", "val/average_precision")
        if metric not in task.metrics_of_one_class or 0 < num_positive < len(validation) + (not wants_others):
            continue
        which = "none" if num_positive == 0 else "every one"
        raise DataError(
            f"{section}.metric: {metric} is about class {_named([scored], names)}, but of the "
            f"{len(validation):,} validation rows {which} is of it. Set aside others "
            "(data.validation_fraction, data.stratify, data.validation_path), or use val/loss."
        )


def check_variance(config: RunConfig, validation: AnyRows) -> None:
    """Refuse to judge a run by the share of a variance where there is none.

    Raises:
        DataError: all validation rows have the same target.
    """
    targets = targets_of(validation)
    if targets is None or targets.dim() != 2 or len(constant_targets(validation)) < targets.shape[1]:
        return
    for section, (metric, _) in judging_metrics(config).items():
        if metric == "val/r2":
            raise DataError(
                f"{section}.metric: val/r2 is the share of a variance, but the {len(validation):,} validation rows "
                "all have the same target. Set aside others (data.validation_fraction, data.validation_path), or "
                "use val/loss."
            )


def scored_class(task: ClassificationTask, names: Sequence[Any] | None) -> int | None:
    """Return the number of the class that metrics of one class are about, None where there is none.

    Raises:
        DataError: it is called by a name that no class has.
    """
    chosen = task.scored_class
    if not isinstance(chosen, str):
        return chosen
    if names is None:
        numbers = f"0 to {task.num_classes - 1}"
        raise DataError(f"task.positive_class: {chosen!r} is a name, and the labels are numbers; use one of {numbers}")
    if chosen not in names:
        raise DataError(f"task.positive_class: {chosen!r} is no class; use {_named(range(len(names)), names)}")
    return names.index(chosen)


def _quoted(name: str) -> str:
    """Return the name of a class as it is typed after `key=`: a text to YAML and one word to the shell."""
    is_plain = name.isascii() and name.isalpha() and name.lower() not in NO_TEXTS
    return name if is_plain else shlex.quote(json.dumps(name))


def _counts(targets: Tensor, task: ClassificationTask) -> Tensor:
    return torch.bincount(targets, minlength=task.num_classes)


def _without_rows(counts: Tensor) -> list[int]:
    missing: list[int] = (counts == 0).nonzero().flatten().tolist()
    return missing


def _named(labels: Sequence[int], names: Sequence[Any] | None) -> str:
    shown = [str(label) if names is None else repr(names[label]) for label in labels[:NAMED]]
    more = [f"{len(labels) - NAMED:,} more"] if len(labels) > NAMED else []
    *first, last = [*shown, *more]
    return f"{', '.join(first)} or {last}" if first else last

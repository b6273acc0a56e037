"""One label or some numbers a row."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from harness.catalogue.classification.metrics import F1, Auc, AveragePrecision, ConfusionMatrix, Precision, Recall
from harness.catalogue.classification.section import ClassificationTask
from harness.errors import DataError
from harness.rows.batches import Batch
from harness.rows.rows import AnyRows, labels_of
from harness.tasks.base import PairTask


class Classification(PairTask):
    """Cross-entropy of (B, num_classes) logits against (B,) int64 labels.

    With class weights it is torch's weighted mean: each row counts as much as its class.

    Args:
        class_weights: (num_classes,) where the logits are, or None.
        classes: the names of the labels, where they have some.
        scored_class: which metrics of one class are about; None leaves them out.
    """

    targets_per_row = 1

    def __init__(
        self,
        config: ClassificationTask,
        *,
        class_weights: Tensor | None,
        classes: Sequence[Any] | None = None,
        scored_class: int | None = None,
    ) -> None:
        self._config, self._class_weights, self._classes = config, class_weights, classes
        self._scored_class = scored_class
        self.is_weighted = class_weights is not None

    def loss_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self._loss(outputs, batch, reduction="sum")}

    def row_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._loss(outputs, batch, reduction="none")

    def _loss(self, outputs: Tensor, batch: Batch, *, reduction: str) -> Tensor:
        weight, smoothing = self._class_weights, self._config.label_smoothing
        targets = batch.data["targets"]
        return F.cross_entropy(outputs, targets, weight=weight, label_smoothing=smoothing, reduction=reduction)

    def weight_sum(self, batch: Batch) -> Tensor | int:
        return batch.num_rows if self._class_weights is None else self._class_weights[batch.data["targets"]].sum()

    def examples(self, outputs: Tensor, data: Any, places: Tensor) -> dict[str, list[Any]]:
        outputs, targets = outputs[places], data["targets"][places]
        probabilities, predicted = outputs.float().softmax(dim=1).max(dim=1)
        target, prediction = ([self._name(label) for label in labels.tolist()] for labels in (targets, predicted))
        return {"target": target, "prediction": prediction, "probability": probabilities.tolist()}

    def metrics(self) -> dict[str, Metric]:
        num_classes, positive = self._config.num_classes, self._scored_class
        metrics = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "macro_f1": MulticlassF1Score(num_classes, average="macro", validate_args=False),
        }
        if positive is not None:
            of_class = {"f1": F1, "precision": Precision, "recall": Recall}
            of_class |= {"auc": Auc, "average_precision": AveragePrecision}
            metrics |= {name: metric(positive) for name, metric in of_class.items()}
        if self._config.confusion_matrix:
            metrics["confusion_matrix"] = ConfusionMatrix(num_classes, validate_args=False)
        return metrics

    def only_answer(self, metrics: Mapping[str, Metric]) -> Any | None:
        counts = metrics["macro_f1"]
        answered, true = counts.tp + counts.fp, counts.tp + counts.fn
        if answered.count_nonzero() != 1 or true.count_nonzero() == 1:
            return None
        return self._name(int(answered.argmax()))

    def _name(self, label: int) -> Any:
        return label if self._classes is None else self._classes[label]


def class_weights(
    given: Literal["balanced"] | tuple[float, ...] | None, train: AnyRows, *, num_classes: int
) -> Tensor | None:
    """Return the (num_classes,) weights of the classes in float64; `balanced` is N / (num_classes * N_c).

    Args:
        train: the N training rows, N_c of class c.
    Raises:
        DataError: a class to be balanced has no row.
    """
    if given != "balanced":
        return None if given is None else torch.tensor(given, dtype=torch.float64)
    labels = labels_of(train)
    if labels is None:
        raise DataError(
            "task.class_weights: balanced wants a label of every row, in memory and beforehand; these rows have no "
            "column `targets` of whole numbers in memory, so list the weights, such as [1, 5]"
        )
    counts = torch.bincount(labels, minlength=num_classes)
    if missing := (counts == 0).nonzero().flatten().tolist():
        raise DataError(
            f"task.class_weights: balanced wants training rows of every class, but there is none of {missing[:5]}; "
            "list the weights, such as [1, 5], or lower task.num_classes"
        )
    return len(train) / (num_classes * counts.double())

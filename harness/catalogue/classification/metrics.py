"""Metrics of torchmetrics for classes, as this harness uses them."""

import torch
from torch import Tensor
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
    MulticlassConfusionMatrix,
)
from torchmetrics.utilities import dim_zero_cat


class _OfLabels:
    """Looks at one class: whether it is predicted, whether it is right; (B, C) logits and (B,) labels."""

    def __init__(self, positive_class: int) -> None:
        super().__init__(validate_args=False)  # type: ignore[call-arg]
        self._positive_class = positive_class

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        predicted, wanted = outputs.argmax(dim=1) == self._positive_class, targets == self._positive_class
        super().update(predicted.long(), wanted.long())  # type: ignore[misc]


class F1(_OfLabels, BinaryF1Score):  # type: ignore[misc]
    """F1 of one class."""


class Precision(_OfLabels, BinaryPrecision):  # type: ignore[misc]
    """Precision of one class."""


class Recall(_OfLabels, BinaryRecall):  # type: ignore[misc]
    """Recall of one class."""


class _OfProbabilities:
    """Ranks rows by the probability of one class; every row is kept, since no sum tells a rank.

    NaN where all rows are of this class, or none is.
    """

    def __init__(self, positive_class: int) -> None:
        super().__init__(thresholds=None, validate_args=False)  # type: ignore[call-arg]
        self._positive_class = positive_class

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        # In double precision, so that confident rows are not tied. Never logits: torchmetrics decides by the numbers of
        # each batch whether it takes them for probabilities.
        probabilities = outputs.double().softmax(dim=1)[:, self._positive_class]
        super().update(probabilities, (targets == self._positive_class).long())  # type: ignore[misc]

    def compute(self) -> Tensor:
        is_positive = dim_zero_cat(self.target).bool()  # type: ignore[attr-defined]
        if is_positive.all() or not is_positive.any():
            return torch.tensor(torch.nan)
        score: Tensor = super().compute()  # type: ignore[misc]
        return score


class Auc(_OfProbabilities, BinaryAUROC):  # type: ignore[misc]
    """Area under the ROC curve of one class against the rest."""


class AveragePrecision(_OfProbabilities, BinaryAveragePrecision):  # type: ignore[misc]
    """Average precision of one class against the rest."""


class ConfusionMatrix(MulticlassConfusionMatrix):  # type: ignore[misc]
    """How many rows of each true class were taken for each class: [true][predicted]."""

    def compute(self) -> Tensor:
        counts: Tensor = super().compute().long()
        return counts

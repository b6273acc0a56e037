"""One label or some numbers a row."""

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError


class Classification:
    """Cross-entropy of (B, num_classes) logits against (B,) int64 labels."""

    targets_per_row = 1

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": MulticlassAccuracy(self._num_classes, average="micro")}


class Regression:
    """Squared error of (B, K) predictions against (B, K) targets; each of the K numbers is a target."""

    def __init__(self, num_outputs: int) -> None:
        self.targets_per_row = num_outputs

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction="sum")

    def metrics(self) -> dict[str, Metric]:
        return {"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}

"""Some numbers a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from harness.catalogue.regression.metrics import R2


class Regression:
    """Squared error of (B, K) predictions against (B, K) targets; each of the K numbers is a target."""

    counts_tokens = False
    is_weighted = False

    def __init__(self, num_outputs: int, *, constant: Sequence[int] = ()) -> None:
        self.targets_per_row = num_outputs
        self._constant = constant  # of the K targets, by the rows that validate

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction="sum")

    def weight_sum(self, targets: Tensor) -> int:
        return targets.numel()

    def examples(self, outputs: Tensor, targets: Tensor) -> dict[str, list[Any]]:
        names = [""] if self.targets_per_row == 1 else [f" {k}" for k in range(self.targets_per_row)]
        return {
            f"{kind}{name}": numbers[:, k].tolist()
            for k, name in enumerate(names)
            for kind, numbers in (("target", targets), ("prediction", outputs))
        }

    def metrics(self) -> dict[str, Metric]:
        return {
            "mse": MeanSquaredError(),
            "mae": MeanAbsoluteError(),
            "r2": R2(self.targets_per_row, constant=self._constant),
        }

    def only_answer(self, metrics: Mapping[str, Metric]) -> None:
        return None

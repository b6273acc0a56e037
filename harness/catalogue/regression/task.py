"""Some numbers a row."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from harness.catalogue.regression.metrics import R2
from harness.rows.batches import Batch
from harness.tasks.base import PairTask


class Regression(PairTask):
    """Squared error of (B, K) predictions against (B, K) targets; each of the K numbers is a target."""

    def __init__(self, num_outputs: int, *, constant: Sequence[int] = ()) -> None:
        self.targets_per_row = num_outputs
        self._constant = constant  # of the K targets, by the rows that validate

    def loss_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(outputs, batch.data["targets"], reduction="sum")}

    def row_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(outputs, batch.data["targets"], reduction="none").flatten(1).sum(dim=1)

    def weight_sum(self, batch: Batch) -> int:
        numbers: Tensor = batch.data["targets"]
        return numbers.numel()

    def examples(self, outputs: Tensor, data: Any, places: Tensor) -> dict[str, list[Any]]:
        outputs, targets = outputs[places], data["targets"][places]
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

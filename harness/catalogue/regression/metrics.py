"""Metrics of torchmetrics for numbers, as this harness uses them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.regression import R2Score


class R2(R2Score):  # type: ignore[misc]
    """Share of the targets' variance that is explained, the mean over outputs whose targets vary; NaN if none does.

    torchmetrics calls every residual below 1e-4 perfect, whatever the targets' unit; here it is the definition.
    """

    def __init__(self, num_outputs: int, *, constant: Sequence[int] = ()) -> None:
        super().__init__()
        self._varying = [output for output in range(num_outputs) if output not in constant]
        for sums in ("sum_squared_error", "sum_error", "residual"):
            self.add_state(sums, torch.zeros(num_outputs), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        super().update(outputs.double(), targets.double())

    def compute(self) -> Tensor:
        variation = self.sum_squared_error - self.sum_error.square() / self.total
        score: Tensor = (1 - self.residual / variation)[self._varying].mean()
        return score

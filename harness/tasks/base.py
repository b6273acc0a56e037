"""What a task is to the loop: the loss of a batch, and the scores of the validation split."""

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskLoss(Protocol):
    """One kind of learning problem."""

    targets_per_row: int

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the () sum of the loss over every target of a batch."""
        ...

    def metrics(self) -> dict[str, Metric]:
        """Return fresh metrics by name, each updated with (predictions, targets)."""
        ...


class Scores:
    """The validation scores: exact sums over rows on every rank, so that the number of ranks does not matter."""

    def __init__(self, task: TaskLoss, *, device: torch.device) -> None:
        self._task = task
        # float64, so that adding the ranks' sums in another order changes nothing that is printed.
        self._metrics = {name: metric.set_dtype(torch.float64).to(device) for name, metric in task.metrics().items()}
        self._loss_and_targets = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def names(self) -> list[str]:
        """The keys that `compute` returns."""
        return ["val/loss", *(f"val/{name}" for name in self._metrics)]

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count the rows of one batch; reads nothing to the host."""
        self._loss_and_targets[0] += self._task.loss_sum(outputs, targets)
        self._loss_and_targets[1] += len(targets) * self._task.targets_per_row
        for metric in self._metrics.values():
            metric.update(outputs, targets)

    def compute(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the scores over the rows of all ranks. Collective: every rank must call this."""
        loss, num_targets = sum_over_ranks(self._loss_and_targets).tolist()
        with warnings.catch_warnings():
            # A rank that had no row has updated nothing; that is right, and torchmetrics warns of it.
            warnings.filterwarnings("ignore", message=r"The ``compute`` method of metric", category=UserWarning)
            # torchmetrics adds up its own counts over the ranks here.
            scores = {f"val/{name}": float(metric.compute()) for name, metric in self._metrics.items()}
        return {"val/loss": loss / num_targets, **scores}

"""What a task is to the loop: the loss of a batch, and the scores of the validation split."""

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from harness.tasks.metrics import Gather, combine


class TaskLoss(Protocol):
    """One kind of learning problem."""

    targets_per_row: int
    counts_tokens: bool
    """Whether a target is a token, so that people ask for tokens a second."""
    is_weighted: bool
    """Whether some targets count more than others, so that the rows of a batch do not tell its weight."""

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the () sum of the loss over every target of a batch, each times its weight."""
        ...

    def weight_sum(self, targets: Tensor) -> Tensor | int:
        """Return the () sum of the weights of a batch's targets; without weights, their number."""
        ...

    def examples(self, outputs: Tensor, targets: Tensor) -> dict[str, list[Any]]:
        """Return target and prediction of each row of a batch, to be read by people: columns by name."""
        ...

    def metrics(self) -> dict[str, Metric]:
        """Return fresh metrics by name, each updated with (outputs, targets).

        Their states are sums whose shape no row changes, or lists of one number a row (see `metrics.combine`).
        """
        ...


class Scores:
    """The validation scores: exact sums over rows on every rank, so that the number of ranks does not matter.

    Args:
        num_examples: how many of this rank's first rows are kept to be shown.
    """

    def __init__(self, task: TaskLoss, *, device: torch.device, num_examples: int = 0) -> None:
        self._task, self._num_examples = task, num_examples
        self._examples: list[dict[str, list[Any]]] = []
        # float64, so that adding the ranks' sums in another order changes nothing that is printed.
        self._metrics = {name: metric.set_dtype(torch.float64).to(device) for name, metric in task.metrics().items()}
        for metric in self._metrics.values():
            metric.distributed_available_fn = lambda: False  # `combine` adds up over ranks, for all metrics at once
        self._loss_and_weight = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count the rows of one batch."""
        self._loss_and_weight[0] += self._task.loss_sum(outputs, targets)
        self._loss_and_weight[1] += self._task.weight_sum(targets)
        for metric in self._metrics.values():
            metric.update(outputs, targets)
        if self._num_examples > 0:
            shown = slice(self._num_examples)
            self._examples.append(self._task.examples(outputs[shown], targets[shown]))
            self._num_examples -= len(targets[shown])

    def examples(self) -> dict[str, list[Any]] | None:
        """Return `columns`, names, and `rows`, their values for each row that is shown; None where none is."""
        if not self._examples:
            return None
        columns = list(self._examples[0])
        batches = [zip(*batch.values(), strict=True) for batch in self._examples]
        rows = [values for batch in batches for values in batch]
        return {"columns": ["row", *columns], "rows": [[number, *values] for number, values in enumerate(rows)]}

    def compute(self, gather: Gather) -> dict[str, Any]:
        """Return the scores over the rows of all ranks: numbers, and nested lists of them. Collective."""
        combine(list(self._metrics.values()), gather)
        loss, weight = gather(self._loss_and_weight).sum(dim=0).tolist()
        with warnings.catch_warnings():
            # A rank that had no row has updated nothing; that is right, and torchmetrics warns of it.
            warnings.filterwarnings("ignore", message=r"The ``compute`` method of metric", category=UserWarning)
            scores = {f"val/{name}": metric.compute().tolist() for name, metric in self._metrics.items()}
        return {"val/loss": loss / weight, **scores}

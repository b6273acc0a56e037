"""What a task is to the loop: the loss of a batch, and the scores of the validation split."""

import warnings
from collections.abc import Callable, Mapping, Sequence
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

    def only_answer(self, metrics: Mapping[str, Metric]) -> Any | None:
        """Return the one class that all rows the metrics have seen are taken for, although they are of several."""
        ...


class Scores:
    """The validation scores: exact sums over rows on every rank, so that the number of ranks does not matter.

    Args:
        shown_rows: of the split, kept to be shown; in order.
        first_row: of the split that this rank sees.
    """

    def __init__(
        self, task: TaskLoss, *, device: torch.device, shown_rows: Sequence[int] = (), first_row: int = 0
    ) -> None:
        self._task, self._shown_rows, self._row = task, shown_rows, first_row
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
        here = range(self._row, self._row + len(targets))
        self._row = here.stop
        if shown := [row for row in self._shown_rows if row in here]:
            places = torch.tensor(shown, device=targets.device) - here.start
            self._examples.append({"row": shown, **self._task.examples(outputs[places], targets[places])})

    def examples(self, gather_objects: Callable[[Any], list[Any]]) -> dict[str, list[Any]] | None:
        """Return `columns`, names, and `rows`, their values for each row that is shown; None if none is.

        Collective, if any row is to be shown.
        """
        if not self._shown_rows:
            return None
        batches = [batch for of_rank in gather_objects(self._examples) for batch in of_rank]
        rows = [list(values) for batch in batches for values in zip(*batch.values(), strict=True)]
        return {"columns": list(batches[0]), "rows": rows}

    def compute(self, gather: Gather) -> dict[str, Any]:
        """Return the scores over the rows of all ranks: numbers, and nested lists of them. Collective."""
        combine(list(self._metrics.values()), gather)
        loss, weight = gather(self._loss_and_weight).sum(dim=0).tolist()
        with warnings.catch_warnings():
            # A rank that had no row has updated nothing; that is right, and torchmetrics warns of it.
            warnings.filterwarnings("ignore", message=r"The ``compute`` method of metric", category=UserWarning)
            scores = {f"val/{name}": metric.compute().tolist() for name, metric in self._metrics.items()}
        return {"val/loss": loss / weight, **scores}

    def only_answer(self) -> Any | None:
        """Return the one class that all rows are taken for, although they are of several; after `compute`."""
        return self._task.only_answer(self._metrics)


def evenly_spread(count: int, length: int) -> list[int]:
    """Return `count` of the numbers below `length`, or all, evenly spread from 0 on."""
    count = min(count, length)
    return [index * length // count for index in range(count)]

"""Metrics of torchmetrics as this harness uses them, and how their counts are added up over ranks."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from harness.tasks.base import TaskLoss

Gather = Callable[[Tensor], Tensor]
"""From the (n,) vector of each rank to the (ranks, n) vectors of all."""


def combine(metrics: Sequence[Metric], gather: Gather) -> None:
    """Give each metric what the rows of all ranks have told it, with one collective, or two if rows are kept.

    Collective: every rank must call this. A metric's states are of two sorts: sums, which have the same shape on a rank
    that saw no row, and lists of one number a row.
    """
    states = [(metric, name, value) for metric in metrics for name, value in metric.metric_state.items()]
    sums = [state for state in states if isinstance(state[2], Tensor)]
    vectors = [value.double().flatten() for _, _, value in sums]
    nothing = vectors[0].new_empty(0)
    kept = [(metric, name, torch.cat([nothing, *rows])) for metric, name, rows in states if isinstance(rows, list)]
    sizes = torch.tensor([len(rows) for _, _, rows in kept], dtype=torch.float64, device=vectors[0].device)
    gathered = gather(torch.cat([*vectors, sizes]))  # (ranks, all elements)
    *totals, _ = torch.split(gathered.sum(dim=0), [*map(len, vectors), len(sizes)])
    for (metric, name, value), total in zip(sums, totals, strict=True):
        setattr(metric, name, total.reshape(value.shape).to(value.dtype))
    if not kept:
        return
    counts = gathered[:, -len(kept) :].long().tolist()  # [rank][list]
    longest = max(max(of_rank) for of_rank in counts)
    padded = torch.cat([F.pad(rows, (0, longest - len(rows))) for _, _, rows in kept])
    everywhere = gather(padded).view(len(counts), len(kept), longest)
    for index, (metric, name, _) in enumerate(kept):
        setattr(metric, name, [everywhere[rank, index, : sizes[index]] for rank, sizes in enumerate(counts)])


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

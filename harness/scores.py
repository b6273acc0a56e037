"""The validation scores, and how the counts of metrics are added up over ranks."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_sum

from harness.errors import ConfigError
from harness.rows.batches import Batch
from harness.tasks.base import TaskLoss

Gather = Callable[[Tensor], Tensor]
"""From the (n,) vector of each rank to the (ranks, n) vectors of all."""


def combine(metrics: Sequence[Any], gather: Gather) -> None:
    """Give each metric what the rows of all ranks have told it, with one collective, or two if rows are kept.

    Collective: every rank must call this. For the two sorts of states see `check_metric`.
    """
    states = [(metric, name, value) for metric in metrics for name, value in _states(metric).items()]
    if not states:
        return
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


def check_metric(name: str, metric: Any) -> None:
    """Refuse a metric whose states cannot be added up over ranks.

    They are of two sorts: sums, which have the same shape on a rank that saw no row, and, of torchmetrics, lists of one
    number a row. Of an object that is not one of torchmetrics every tensor among its attributes is such a sum.

    Raises:
        ConfigError: names the state.
    """
    if isinstance(metric, MetricCollection):
        raise ConfigError(f"metric {name}: a MetricCollection is several metrics; return each by a name of its own")
    missing = [method for method in ("update", "compute") if not callable(getattr(metric, method, None))]
    if missing:
        raise ConfigError(f"metric {name}: {type(metric).__name__} has no method {missing[0]}")
    if not isinstance(metric, Metric):
        return
    for state, reduction in metric._reductions.items():
        if reduction is not (dim_zero_cat if isinstance(metric._defaults[state], list) else dim_zero_sum):
            found = getattr(reduction, "__name__", reduction)
            raise ConfigError(
                f"metric {name}: the state {state} of {type(metric).__name__} is reduced over ranks by {found}; only "
                "sums and lists of one number a row come out alike at any number of ranks"
            )


def _states(metric: Any) -> dict[str, Any]:
    if isinstance(metric, Metric):
        return dict(metric.metric_state)
    return {name: value for name, value in vars(metric).items() if isinstance(value, Tensor)}


def prepared(name: str, metric: Any, device: torch.device) -> Any:
    """Return a fresh metric on the device, in float64, so that another order of the ranks' sums changes nothing."""
    check_metric(name, metric)
    if isinstance(metric, Metric):
        metric.distributed_available_fn = lambda: False  # `combine` adds up over ranks, for all metrics at once
        return metric.set_dtype(torch.float64).to(device)
    for state, value in _states(metric).items():
        setattr(metric, state, value.to(device, torch.float64 if value.is_floating_point() else value.dtype))
    return metric


def _plain(name: str, value: Any) -> Any:
    """Return a score as a number or nested lists of them."""
    value = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        raise ConfigError(f"metric {name}: compute returned {type(value).__name__}; a number or a tensor is wanted")
    return value


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
        self._metrics = {name: prepared(name, metric, device) for name, metric in task.metrics().items()}
        self._sums = torch.zeros(len(task.terms) + 1, dtype=torch.float64, device=device)
        """Of each term of the loss, and of the weights."""

    def update(self, outputs: Any, batch: Batch) -> None:
        """Count the rows of one batch."""
        for place, loss in enumerate(self._task.loss_sums(outputs, batch).values()):
            self._sums[place] += loss
        self._sums[-1] += self._task.weight_sum(batch)
        scored = self._task.scored(outputs, batch.data)
        for metric in self._metrics.values():
            metric.update(*scored)
        here = range(self._row, self._row + batch.num_rows)
        self._row = here.stop
        if shown := [row for row in self._shown_rows if row in here]:
            places = torch.tensor(shown, device=self._sums.device) - here.start
            self._examples.append({"row": shown, **self._task.examples(outputs, batch.data, places)})

    def examples(self, gather_objects: Callable[[Any], list[Any]]) -> dict[str, list[Any]] | None:
        """Return `columns`, names, and `rows`, their values for each row that is shown; None if none is.

        Collective, if any row is to be shown.
        """
        if not self._shown_rows:
            return None
        batches = [batch for of_rank in gather_objects(self._examples) for batch in of_rank]
        if len(batches[0]) == 1:  # a task that shows nothing but which row it is
            return None
        rows = [list(values) for batch in batches for values in zip(*batch.values(), strict=True)]
        return {"columns": list(batches[0]), "rows": rows}

    def compute(self, gather: Gather) -> dict[str, Any]:
        """Return the scores over the rows of all ranks: numbers, and nested lists of them. Collective."""
        combine(list(self._metrics.values()), gather)
        *losses, weight = gather(self._sums).sum(dim=0).tolist()
        with warnings.catch_warnings():
            # A rank that had no row has updated nothing; that is right, and torchmetrics warns of it.
            warnings.filterwarnings("ignore", message=r"The ``compute`` method of metric", category=UserWarning)
            scores = {f"val/{name}": _plain(name, metric.compute()) for name, metric in self._metrics.items()}
        means = [loss / weight if weight else math.nan for loss in losses]
        return {**{f"val/{name}": mean for name, mean in zip(self._task.terms, means, strict=True)}, **scores}

    def only_answer(self) -> Any | None:
        """Return the one class that all rows are taken for, although they are of several; after `compute`."""
        return self._task.only_answer(self._metrics)

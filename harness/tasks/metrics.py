"""Metrics of torchmetrics as this harness uses them, and how their counts are added up over ranks."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
    MulticlassConfusionMatrix,
)
from torchmetrics.regression import R2Score
from torchmetrics.utilities import dim_zero_cat

Gather = Callable[[Tensor], Tensor]
"""From the (n,) vector of each rank to the (ranks, n) vectors of all."""


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

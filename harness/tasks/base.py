"""What a task is to the loop: the loss of a batch, and the scores of the validation split."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torchmetrics import Metric


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

"""What a task is to the loop: the network's outputs, the sums of its losses, their weight, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from harness.rows.batches import Batch

LOSS = "loss"
"""The term that is trained on."""


class TaskLoss(Protocol):
    """One kind of learning problem; the only one to look inside a batch or what a network returns."""

    targets_per_row: int
    """Of every row; 0 where rows have different numbers of them, which `weight_sum` tells."""
    counts_tokens: bool
    """Whether a target is a token, so that people ask for tokens a second."""
    is_weighted: bool
    """Whether some targets count more than others, so that the rows of a batch do not tell its weight."""
    mixes_rows: bool
    """Whether the loss of a row depends on the other rows of its micro-batch."""

    @property
    def terms(self) -> Sequence[str]:
        """What `loss_sums` has, in its order; of a user's task known after its first loss."""
        ...

    def forward(self, network: Callable[..., Any], data: Any) -> Any:
        """Return what the network makes of a batch; called once a micro-batch."""
        ...

    def loss_sums(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the () sum of each term over every target of a batch, times its weight; `loss` first, trained on."""
        ...

    def row_losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the (num_rows,) sum of the loss of each row."""
        ...

    def weight_sum(self, batch: Batch) -> Tensor | int:
        """Return the () sum of the weights of a batch's targets; without weights, their number."""
        ...

    def parameter_groups(self, network: nn.Module) -> Mapping[str, Mapping[str, float]]:
        """Return settings of the optimizer by parameter name, `lr_factor` or `weight_decay`, where they differ."""
        ...

    def examples(self, outputs: Any, data: Any, places: Tensor) -> dict[str, list[Any]]:
        """Return target and prediction of some rows of a batch, to be read by people: columns by name."""
        ...

    def metrics(self) -> dict[str, Any]:
        """Return fresh metrics by name, each updated with what `scored` returns (see `scores.check_metric`)."""
        ...

    def scored(self, outputs: Any, data: Any) -> tuple[Any, ...]:
        """Return what the metrics look at."""
        ...

    def only_answer(self, metrics: Mapping[str, Any]) -> Any | None:
        """Return the one class that all rows the metrics have seen are taken for, although they are of several."""
        ...


class PairTask:
    """What tasks of the catalogue have in common: rows are `inputs`, for the network alone, and `targets`."""

    counts_tokens = False
    is_weighted = False
    mixes_rows = False
    terms: Sequence[str] = (LOSS,)

    def forward(self, network: Callable[..., Any], data: Any) -> Any:
        return network(data["inputs"])

    def parameter_groups(self, network: nn.Module) -> Mapping[str, Mapping[str, float]]:
        factors: Mapping[str, float] = getattr(network, "lr_factors", {})
        return {name: {"lr_factor": factor} for name, factor in factors.items()}

    def scored(self, outputs: Any, data: Any) -> tuple[Any, ...]:
        return outputs, data["targets"]

    def only_answer(self, metrics: Mapping[str, Any]) -> Any | None:
        return None

"""Finding what brought a NaN or infinity into an update: the rows, or the rank whose loss was finite."""

import math
from collections.abc import Sequence

import torch

from harness.rows.batches import Batch
from harness.strategy.base import Strategy
from harness.tasks.base import LOSS, TaskLoss


def ranks_with_nonfinite_gradient(strategy: Strategy, task: TaskLoss, micro_batches: Sequence[Batch]) -> list[int]:
    """Compute each rank's own gradient again, unreduced, and return the ranks where it is not finite. Collective.

    The weights are still those of the update in question if none was applied since. Dropout draws other masks, so an
    empty list is possible.
    """
    parameters = [parameter for parameter in strategy.module.parameters() if parameter.requires_grad]
    is_finite = True
    for batch in micro_batches:
        if batch.is_padding:
            continue
        loss = task.loss_sums(task.forward(strategy.predict, batch.data), batch)[LOSS]
        # autograd.grad goes round the hooks that would reduce over ranks.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        is_finite &= all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
    strategy.release()
    verdicts = strategy.gather_objects(is_finite)
    return [rank for rank, finite in enumerate(verdicts) if not finite]


@torch.no_grad()
def rows_with_nonfinite_loss(strategy: Strategy, task: TaskLoss, micro_batches: Sequence[Batch]) -> list[int]:
    """Compute the losses of an update again, row by row, and return the rows whose loss is no number. Collective."""
    found: list[int] = []
    for batch in micro_batches:
        outputs = task.forward(strategy.predict, batch.data)
        if not batch.is_padding:
            is_bad = ~task.row_losses(outputs, batch).isfinite()
            found += batch.ids[is_bad.to(batch.ids.device)].tolist()
    strategy.release()
    return sorted(row for rows in strategy.gather_objects(found) for row in rows)


def weighs_nothing(strategy: Strategy, task: TaskLoss, micro_batches: Sequence[Batch]) -> bool:
    """Return whether the weights of all targets of an update are 0, so that there is no mean. Collective."""
    mine = sum(float(task.weight_sum(batch)) for batch in micro_batches if not batch.is_padding)
    return math.fsum(strategy.gather_objects(mine)) == 0

"""Training steps that are wrong in the ways that are easiest to get wrong; the reference must catch each.

Each takes a run, may change its parts, and returns the step to train with. All work under every strategy, for one
update from the first weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.loop import loss_sums, train_step
from harness.run import Run
from harness.state import GradNorm, UpdateReport

Step = Callable[[Run, int, Tensor], UpdateReport]


def clip_before_the_reduction(run: Run, model: torch.nn.Module) -> Step:
    """Every rank clips its own gradient, and the clipped ones are added up."""
    strategy: Any = run.strategy
    coefficient, backward = _local_coefficient(run, model), strategy.backward
    strategy.backward = lambda loss: backward(loss * coefficient)  # a gradient is linear in its loss
    _never_clip(strategy)
    return train_step


def norm_of_the_local_gradient(run: Run, model: torch.nn.Module) -> Step:
    """The gradient is reduced, but every rank scales what it updates by what its own norm asks for."""
    strategy: Any = run.strategy
    coefficient, update = _local_coefficient(run, model), strategy.update
    _never_clip(strategy)

    def clip_and_update(learning_rate: Tensor, *, position: int) -> GradNorm:
        pieces = strategy._local_gradients() if hasattr(strategy, "_local_gradients") else strategy._gradients()
        for piece in pieces:
            if piece is not None:
                piece.mul_(coefficient)
        found: GradNorm = update(learning_rate, position=position)
        return found

    strategy.update = clip_and_update
    return train_step


def loss_averaged_per_rank(run: Run, model: torch.nn.Module) -> Step:
    """Every rank divides by its own number of targets, and the ranks' gradients are averaged."""

    def step(run: Run, position: int, learning_rate: Tensor) -> UpdateReport:
        strategy = run.strategy
        batches = run.batches.at(position)
        rows = sum(len(batch.data["inputs"]) for batch in batches if not batch.is_padding)
        losses = []
        for index, batch in enumerate(batches, start=1):
            with strategy.accumulate(is_last=index == len(batches)):
                loss = loss_sums(run, batch)["loss"] / (max(1, rows) * run.task.targets_per_row * strategy.world_size)
                strategy.backward(loss)
            losses.append(loss.detach())
        return UpdateReport({"loss": torch.stack(losses).sum()}, strategy.update(learning_rate, position=position))

    return step


def _local_coefficient(run: Run, model: torch.nn.Module) -> float:
    """What clipping to the largest norm would do to this rank's own gradient of the first update."""
    scale = run.plan.rows_at(0) * run.task.targets_per_row / run.strategy.world_size
    sums = [run.task.loss_sums(run.task.forward(model, batch.data), batch)["loss"] for batch in run.batches.at(0)]
    loss = sum(sums) / scale
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    norm = torch.nn.utils.get_total_norm(gradients).item()
    return min(1.0, run.config.clip.max_norm / (norm + 1e-6))  # type: ignore[union-attr]


def _never_clip(strategy: Any) -> None:
    strategy._clip = None
    if hasattr(strategy, "_engine"):
        strategy._engine.optimizer.clip_grad = 0.0


MUTANTS: dict[str, Callable[[Run, torch.nn.Module], Step]] = {
    "clip_before_the_reduction": clip_before_the_reduction,
    "norm_of_the_local_gradient": norm_of_the_local_gradient,
    "loss_averaged_per_rank": loss_averaged_per_rank,
}

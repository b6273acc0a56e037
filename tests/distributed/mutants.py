"""Training steps that are wrong in the ways that are easiest to get wrong; the reference must tell each from the right.

Each takes a run, may change its parts, and returns the step to train with.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.loop import loss_sum, train_step
from harness.run import Run
from harness.state import GradNorm, UpdateReport

Step = Callable[[Run, int, Tensor], UpdateReport]


def clip_before_the_reduction(run: Run) -> Step:
    """Every rank clips its own gradient to the largest norm, and the clipped ones are added up."""
    return _with_local_gradients(run, clip_first=True)


def norm_of_the_local_gradient(run: Run) -> Step:
    """The gradient is reduced, but scaled by what this rank's own norm asks for."""
    return _with_local_gradients(run, clip_first=False)


def loss_averaged_per_rank(run: Run) -> Step:
    """Every rank divides by its own number of targets, and the ranks' gradients are averaged."""

    def step(run: Run, position: int, learning_rate: Tensor) -> UpdateReport:
        strategy = run.strategy
        batches = run.batches.at(position)
        rows = sum(len(batch.inputs) for batch in batches if not batch.is_padding)
        losses = []
        for index, batch in enumerate(batches, start=1):
            with strategy.accumulate(is_last=index == len(batches)):
                loss = loss_sum(run, batch) / (max(1, rows) * run.task.targets_per_row * strategy.world_size)
                strategy.backward(loss)
            losses.append(loss.detach())
        return UpdateReport(torch.stack(losses).sum(), strategy.update(learning_rate))

    return step


def _with_local_gradients(run: Run, *, clip_first: bool) -> Step:
    strategy: Any = run.strategy
    accumulate, update = strategy.accumulate, strategy.update
    max_norm = run.config.clip.max_norm  # type: ignore[union-attr]

    def never_reduce(*, is_last: bool) -> Any:
        return accumulate(is_last=False)

    def clip_and_reduce(learning_rate: Tensor) -> GradNorm:
        gradients = [gradient for _, gradient in strategy.gradients()]
        norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            if clip_first:
                gradient.mul_(coefficient)
            dist.all_reduce(gradient)
            gradient.div_(strategy.world_size)
            if not clip_first:
                gradient.mul_(coefficient)
        strategy._clip = type("NoClip", (), {})()
        found: GradNorm = update(learning_rate)
        return GradNorm(norm, found.per_parameter, coefficient, found.applied)

    strategy.accumulate, strategy.update = never_reduce, clip_and_reduce
    return train_step


MUTANTS: dict[str, Callable[[Run], Step]] = {
    "clip_before_the_reduction": clip_before_the_reduction,
    "norm_of_the_local_gradient": norm_of_the_local_gradient,
    "loss_averaged_per_rank": loss_averaged_per_rank,
}

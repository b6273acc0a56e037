"""Refuses parts of a run that do not fit, by trying one row."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import ConfigError
from harness.rows.order import BatchPlan


def check_batch_norm(model: nn.Module, plan: BatchPlan, forward: Callable[[], Any]) -> None:
    """Refuse a batch arithmetic that would give BatchNorm a single row to take the variance of.

    Args:
        forward: sends one row through `model`.
    Raises:
        ConfigError: names the layer and the batch that is too small.
    """
    layers = batch_norms(model, forward)
    if not layers:
        return
    for position in {0, plan.steps_per_epoch - 1}:
        for rank in range(plan.world_size):
            sizes = [stop - start for start, stop in plan.micro_batches(position, rank)]
            if 1 in sizes:
                raise ConfigError(
                    f"data.global_batch: batch {position + 1:,} of an epoch has {plan.rows_at(position)} rows, which "
                    f"leaves rank {rank} of {plan.world_size} a micro-batch of one row, and BatchNorm (layer "
                    f"{layers[0]}) wants two or more; with {plan.num_rows:,} training rows use another "
                    "data.global_batch, strategy.micro_batch or number of ranks, or model.norm=none"
                )


def check_padding(only_in_training: Sequence[str], plan: BatchPlan) -> None:
    """Refuse a batch arithmetic that leaves a rank without a row where some parameters are used in training mode alone.

    Such a rank runs a row in eval mode to keep the others company, and its reduction would wait for their gradients.

    Raises:
        ConfigError: names a parameter, the batch and the rank.
    """
    for position in {0, plan.steps_per_epoch - 1} if only_in_training else ():
        for rank in range(plan.world_size):
            if any(start == stop for start, stop in plan.micro_batches(position, rank)):
                raise ConfigError(
                    f"data.global_batch: batch {position + 1:,} of an epoch has {plan.rows_at(position)} rows, which "
                    f"leaves rank {rank} of {plan.world_size} a micro-batch without a row, and "
                    f"{only_in_training[0]} is used in training mode only; with {plan.num_rows:,} training rows use "
                    "another data.global_batch, strategy.micro_batch or number of ranks"
                )


def batch_norms(model: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """Return the names of the layers that cannot train on one row: their statistics would be of a single value.

    A BatchNorm of images is one of them where it sees images of 1x1, so one row goes through the network.

    Args:
        forward: sends it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not layers:
        return []
    single: set[nn.Module] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            single.add(module)

    hooks = [module.register_forward_pre_hook(note) for module in layers.values()]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        forward()
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return [name for name, module in layers.items() if module in single]

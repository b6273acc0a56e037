"""Parameters that the loss does not depend on: DDP would wait for their gradients for ever."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.errors import ConfigError
from harness.ranks.group import Ranks
from harness.strategy.graph import parameters_behind

PASSES = 8
"""Over the same rows, where a network draws at random."""
Losses = Callable[[], Any]
"""Computes the () sums of the loss of some rows, from which a backward pass could begin."""


class Unused(NamedTuple):
    """Names of trainable parameters that no loss depends on."""

    always: list[str]
    in_eval_mode: list[str]
    """Though it does in training mode."""
    sometimes: list[str]
    """For some rows, or at random, as in a mixture of experts or where layers are dropped."""


def unused_parameters(
    module: nn.Module, few: Losses, whole: Iterable[Losses], *, draws: bool = False, is_known: bool = True
) -> Unused:
    """Return the trainable parameters that the loss does not depend on, on this rank.

    The network is looked at in both of its modes: a head may be used in training only.

    Args:
        module: on its device, not wrapped yet.
        few: of a few rows.
        whole: of whole micro-batches.
        draws: whether the network draws at random, so that another pass may use other parameters.
        is_known: the network has no parameters for some rows or at some times only, so that the first micro-batch is
            looked at once, and others for as long as a parameter is not found.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

    def used_by(loss: Losses, *, is_training: bool) -> set[str]:
        module.train(is_training)
        with torch.enable_grad():
            used = parameters_behind([loss()])
        return {name for name, parameter in trainable.items() if parameter in used}

    rest = iter(whole)
    first = next(rest)
    passes = [used_by(first, is_training=True) for _ in range(PASSES if draws and not is_known else 1)]
    in_training = set().union(used_by(few, is_training=True), *passes)
    in_eval_mode = used_by(first, is_training=False) | used_by(few, is_training=False)
    while not is_known or len(in_training & in_eval_mode) < len(trainable):
        loss = next(rest, None)  # whose rows are read with it
        if loss is None:
            break
        passes.append(used_by(loss, is_training=True))
        in_training |= passes[-1]
        in_eval_mode |= used_by(loss, is_training=False)
    module.train()
    used = in_training | in_eval_mode
    return Unused(
        always=[name for name in trainable if name not in used],
        in_eval_mode=[name for name in trainable if name in in_training - in_eval_mode],
        sometimes=[name for name in trainable if name in used and not all(name in found for found in passes)],
    )


def freeze(module: nn.Module, unused: Unused, ranks: Ranks, *, waits: bool) -> tuple[tuple[str, ...], list[str]]:
    """Freeze parameters that no loss depends on. Collective.

    Args:
        unused: on this rank.
        waits: whether the strategy waits for the gradient of every parameter from every rank.
    Returns:
        What there is to say of them, and the parameters that the loss depends on at some times only.
    Raises:
        ConfigError: no parameter is left to train, or the strategy would wait for some for ever.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found: list[Unused] = ranks.gather_objects(unused)
    nowhere = [name for name in trainable if all(name in of_rank.always for of_rank in found)]
    missing = {name for of_rank in found for name in (*of_rank.always, *of_rank.sometimes)}
    sometimes = [name for name in trainable if name in missing and name not in nowhere]
    if sometimes and waits and ranks.world_size > 1:
        raise ConfigError(
            f"model: the loss depends on {len(sometimes)} parameters, such as {sometimes[0]}, for some rows, at some "
            "times or on some ranks only, and this strategy waits for their gradients from every rank; train on one "
            "rank, or with strategy.kind=zero2"
        )
    if len(nowhere) == len(trainable):
        raise ConfigError(
            f"model: none of its {len(trainable)} trainable parameters reaches the loss, so nothing would be trained; "
            "freeze less"
        )
    for name in nowhere:
        trainable[name].requires_grad_(False)
    notices = []
    if nowhere:
        notices.append(
            f"the loss does not depend on {len(nowhere)} of the model's parameters, which stay as they are: "
            f"{', '.join(nowhere[:4])}{', ...' if len(nowhere) > 4 else ''}"
        )
    if sometimes:
        notices.append(
            f"the loss depends on {len(sometimes)} of the model's parameters, such as {sometimes[0]}, for some rows or "
            "at some times only; in other updates their gradient is 0"
        )
    return tuple(notices), sometimes

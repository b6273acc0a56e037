"""Parameters that the loss does not depend on: DDP would wait for their gradients for ever."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.errors import ConfigError
from harness.ranks.group import Ranks
from harness.strategy.graph import parameters_behind

Losses = Callable[[], Any]
"""Computes the () sums of the loss of some rows, from which a backward pass could begin."""


class Unused(NamedTuple):
    """Names of trainable parameters that no loss depends on."""

    always: list[str]
    in_eval_mode: list[str]
    """Though it does in training mode."""


def unused_parameters(module: nn.Module, losses: Sequence[Losses]) -> Unused:
    """Return the trainable parameters that no loss depends on, on this rank.

    The network is looked at in both of its modes: a head may be used in training only, and a layer that is left out at
    random may be missing there.

    Args:
        module: on its device, not wrapped yet.
        losses: are asked one after the other for as long as some parameter is not found, first those of few rows.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    missing = {}
    for is_training in (False, True):
        unused = list(trainable)
        module.train(is_training)
        for loss in losses:
            if unused:
                with torch.enable_grad():
                    used = parameters_behind([loss()])
                unused = [name for name in unused if trainable[name] not in used]
        missing[is_training] = unused
    return Unused(
        always=[name for name in missing[True] if name in missing[False]],
        in_eval_mode=[name for name in missing[False] if name not in missing[True]],
    )


def freeze(module: nn.Module, unused: Sequence[str], ranks: Ranks) -> tuple[str, ...]:
    """Freeze parameters that no loss depends on, and return what there is to say of them. Collective.

    Args:
        unused: on this rank.
    Raises:
        ConfigError: no parameter is left to train, or the loss depends on some on one rank and not on another.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = ranks.gather_objects(unused)
    nowhere = [name for name in found[0] if all(name in names for names in found)]
    sometimes = sorted({name for names in found for name in names} - {*nowhere})
    if sometimes:
        raise ConfigError(
            f"model: {len(sometimes)} parameters, such as {sometimes[0]}, act on the rows of some ranks only, so the "
            "ranks cannot add their gradients up; train on one rank, or with strategy.kind=zero2"
        )
    if len(nowhere) == len(trainable):
        raise ConfigError(
            f"model: none of its {len(trainable)} trainable parameters reaches the loss, so nothing would be trained; "
            "freeze less"
        )
    for name in nowhere:
        trainable[name].requires_grad_(False)
    if not nowhere:
        return ()
    return (
        f"the loss does not depend on {len(nowhere)} of the model's parameters, which stay as they are: "
        f"{', '.join(nowhere[:4])}{', ...' if len(nowhere) > 4 else ''}",
    )

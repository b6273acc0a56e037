"""Parameters that nothing a network returns depends on: DDP would wait for their gradients for ever."""

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.ranks.group import Ranks
from harness.strategy.graph import parameters_behind

FEW = 2
"""Rows that are looked at first, since more only matter where these leave something out."""


def freeze_unused(
    module: nn.Module, inputs: Tensor, ranks: Ranks, *, autocast: torch.dtype | None = None
) -> tuple[str, ...]:
    """Freeze the trainable parameters that no output depends on, and return what there is to say of them. Collective.

    Leaves no trace in weights, buffers, gradients or random numbers.

    Args:
        module: on its device, not wrapped yet.
        inputs: some rows of this rank.
        autocast: what the run computes in, if in less than the type of its weights.
    Raises:
        ConfigError: no parameter is left to train, or outputs depend on some on one rank and not on another.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    unused = list(trainable)
    for rows in (inputs[:FEW], inputs):
        if unused:
            used = _used(module, rows, ranks.device, autocast)
            unused = [name for name in unused if trainable[name] not in used]
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
            f"model: none of its {len(trainable)} trainable parameters reaches what it returns, so nothing would be "
            "trained; freeze less"
        )
    for name in nowhere:
        trainable[name].requires_grad_(False)
    if not nowhere:
        return ()
    return (
        f"nothing that the model returns depends on {len(nowhere)} of its parameters, which stay as they are: "
        f"{', '.join(nowhere[:4])}{', ...' if len(nowhere) > 4 else ''}",
    )


def _used(module: nn.Module, rows: Tensor, device: torch.device, autocast: torch.dtype | None) -> set[nn.Parameter]:
    was_training = module.training
    module.eval()
    own_numbers = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with torch.enable_grad(), own_numbers, torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        used = parameters_behind([module(rows)])
    module.train(was_training)
    return used

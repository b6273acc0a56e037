"""What a network keeps besides its buffers, and what ranks have built: looked for on a few rows."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.ranks.group import Ranks
from harness.strategy.untouched import no_trace

TOLERANCE_ON_GPU = 5e-3
"""The same where products of matrices may be rounded to TF32."""
SAME_AGAIN = 1e-6
"""How far apart the losses of the same rows may be, relative to them."""


OF_TORCH = {*vars(nn.Module())}
"""Attributes of every module."""


def check_same_weights(module: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """Refuse a network whose construction depends on the rank; return checksums of its tensors. Collective."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    sums = {name: checksum(tensor.detach()) for name, tensor in tensors}
    of_ranks = ranks.gather_objects(sums)
    for rank, found in enumerate(of_ranks):
        others = [name for name in of_ranks[0] | found if found.get(name) != of_ranks[0].get(name)]
        if others:
            raise ConfigError(
                f"model: rank {rank} has built other first weights than rank 0 ({len(others)} tensors, such as "
                f"{others[0]}), so the ranks would train different networks; a constructor may depend on the seed of "
                "torch, and not on the rank, the time or a generator of its own"
            )
    return sums


def check_weights_are_kept(module: nn.Module, before: Mapping[str, Any]) -> None:
    """Refuse a network whose forward pass changes its own parameters, which the look has done now."""
    for name, parameter in module.named_parameters():
        if checksum(parameter.detach()) != before[name]:
            raise ConfigError(
                f"model: a forward pass changes its parameter {name}, as an average of weights or a clamp does; keep "
                "such a tensor in a buffer (register_buffer), or do it in the network's arithmetic"
            )


def checksum(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes with a tensor; nothing but one number of it is read."""
    shape = tuple(tensor.shape)
    if not tensor.numel():
        return shape, 0
    words = tensor.contiguous().view(-1).view(torch.uint8 if tensor.element_size() % 4 else torch.int32).long()
    places = torch.arange(1, len(words) + 1, device=words.device)
    return shape, int((words * places).sum())


def watched(module: nn.Module, losses: Callable[[], Tensor], device: torch.device) -> tuple[list[str], str, bool]:
    """Send the same rows through a network twice, with the same random numbers and buffers.

    Returns:
        The names of attributes that the second pass finds otherwise than it leaves them, such as a counter (what is
        only kept of the last rows is as it was), a digest of the order of module calls, and whether both losses are
        the same.
    """
    names = {child: name for name, child in module.named_modules()}
    order = hashlib.blake2b(digest_size=8)
    hooks = [
        child.register_forward_pre_hook(lambda child, _: order.update(f"{names[child]}/".encode())) for child in names
    ]
    kind = type(module).__name__
    module.train()
    with no_trace(module, device):
        first = losses().detach()
    for hook in hooks:
        hook.remove()
    before = {name: _attributes(child) for child, name in names.items()}
    second = losses().detach()
    changed = [
        ".".join(filter(None, [kind, name, attribute]))
        for child, name in names.items()
        for attribute, value in _attributes(child).items()
        if value != before[name].get(attribute)
    ]
    tolerance = TOLERANCE_ON_GPU if first.is_cuda else SAME_AGAIN
    return changed, order.hexdigest(), torch.allclose(first, second, rtol=tolerance, atol=0.0, equal_nan=True)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what in a module's attributes could be state that is no buffer: numbers, tensors and trees of them.

    A tensor with a gradient function is what the forward pass has just made, and no state.
    """
    found = {name: _state_of(value) for name, value in vars(module).items() if name not in OF_TORCH}
    return {name: value for name, value in found.items() if value is not None}


def _state_of(value: Any) -> Any:
    """Return what is compared: numbers as they are, checksums of arrays."""
    found: Any = None
    match value:
        case int() | float():
            found = value
        case torch.Generator():
            found = checksum(value.get_state())
        case np.ndarray():
            found = value.tobytes()
        case Tensor() if not value.requires_grad and value.layout == torch.strided:
            found = checksum(value)
        case list() | tuple() | deque():
            found = [_state_of(each) for each in value]
        case Mapping():
            found = {name: _state_of(each) for name, each in value.items()}
    return found

"""A copy of this rank's share of the state, which training that goes on cannot reach."""

import torch
from torch import Tensor

from harness.strategy.base import Strategy

STRIPE_BYTES = 64 * 2**20
"""The state is dealt out to the ranks in stripes of this size: many write a large one, one writes a small one."""


class Snapshot:
    """Takes copies into memory that is kept from one save to the next: the first save shows what all will need."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, strategy: Strategy) -> dict[str, Tensor]:
        """Return this rank's share of the whole tensors of `Strategy.state`, on the CPU. Collective.

        One tensor at a time is whole on the device. What an earlier call returned is overwritten.
        """
        share: dict[str, Tensor] = {}
        offset = 0
        for key, tensor in strategy.state():
            if offset // STRIPE_BYTES % strategy.world_size == strategy.rank:
                share[key] = self._copy(key, tensor.detach())
            offset += tensor.nbytes
        if strategy.device.type == "cuda":
            torch.cuda.synchronize(strategy.device)
        return share

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Page-locked memory, so that copies from a GPU overlap with the gathering of the next tensor.
            is_pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_pinned)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)

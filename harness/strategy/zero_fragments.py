"""Where DeepSpeed 0.19.8 keeps this rank's pieces of a parameter's gradient and moments.

The one file with DeepSpeed's private names, which is why deepspeed is pinned exactly.
Stages 1 and 2 lay a group's parameters end to end and cut the line into one partition a rank, so a piece can start
anywhere in a parameter; stage 3 cuts every parameter into equal pieces, the last ones padded.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter on this rank: `numel` elements from `start` of the flattened parameter."""

    start: int
    numel: int
    flat: Tensor
    """The fp32 partition that the inner optimizer updates; it holds pieces of many parameters."""
    start_in_flat: int

    def piece_of(self, flat: Tensor) -> Tensor:
        """Return this fragment's (numel,) view of a tensor that is laid out as `flat`."""
        return flat.narrow(0, self.start_in_flat, self.numel)

    def take(self, whole: Tensor, *, into: Tensor) -> None:
        """Copy this fragment of a whole tensor to its place in one that is laid out as `flat`."""
        self.piece_of(into).copy_(whole.reshape(-1).narrow(0, self.start, self.numel))


def fragment_of(parameter: nn.Parameter, optimizer: Any, *, stage: int) -> Fragment | None:
    """Return the piece of a trainable parameter that this rank updates, if it has one."""
    if stage < 3:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return Fragment(start, numel, flat, mapping.hp_fragment_address.start)
    group, start_in_flat, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = dist.get_rank(group=optimizer.dp_process_group) * padded
    numel = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
    if numel <= 0:
        return None
    return Fragment(start, numel, optimizer.fp32_partitioned_groups_flat[group], start_in_flat)


def local_gradient(parameter: nn.Parameter, fragment: Fragment, *, stage: int) -> Tensor:
    """Return this rank's (numel,) piece of the reduced gradient, between the backward pass and the step.

    It is the memory that the step reads, so changing it changes the update.
    """
    if stage < 3:
        index = parameter._index_in_param_group  # type: ignore[attr-defined]
        piece: Tensor = parameter._hp_mapping.get_lp_grad_fragment(index)  # type: ignore[attr-defined]
        return piece.view(-1)
    optimizer: Any = parameter._z3_optimizer  # type: ignore[attr-defined]
    padded, _ = optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)
    mine: Tensor = padded.view(-1).narrow(0, 0, fragment.numel)
    return mine


def group_index(parameter: nn.Parameter, optimizer: Any, *, stage: int) -> int:
    """Return the parameter group of a trainable parameter."""
    groups = optimizer.bit16_groups if stage < 3 else optimizer.fp16_groups
    index = next(index for index, group in enumerate(groups) if any(parameter is member for member in group))
    return index if stage < 3 else int(optimizer.sub_group_to_group_id[index])


def partitions(optimizer: Any, *, stage: int) -> list[Tensor]:
    """Return this rank's fp32 partitions, the keys of the inner optimizer's state."""
    groups = optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat
    return list(groups)


def wait_for_offload(optimizer: Any) -> None:
    """Wait until gradients that are kept in the host's memory have arrived there."""
    wait = getattr(optimizer, "_wait_for_offload_copies", None)
    if wait is not None:
        wait()

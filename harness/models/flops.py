"""How many floating-point operations a network makes for one row."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

NUM_ROWS = 2
"""BatchNorm refuses to train on one."""


def training_flops_per_row(model: nn.Module, row: Tensor) -> float:
    """Return the operations of the products of matrices in a forward and a backward pass over one row.

    A multiplication and an addition are two. They are counted on a copy without storage, so nothing is computed;
    weights that are not trained have no gradient to be counted. Of causal attention the whole square counts, as is
    usual (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Args:
        model: the bare network, without recomputation in its backward pass.
        row: (1, ...) an input, of which type and shape count.
    """
    tensors = [*model.parameters(), *model.buffers()]
    bare = copy.deepcopy(model, {id(tensor): _without_storage(tensor) for tensor in tensors})
    parameter = next(model.parameters())
    dtype = parameter.dtype if row.is_floating_point() else torch.int64
    rows = torch.empty(NUM_ROWS, *row.shape[1:], dtype=dtype, device="meta")
    with FlopCounterMode(display=False) as counter:
        bare(rows).sum().backward()
    num_flops: int = counter.get_total_flops()
    return num_flops / NUM_ROWS


def _without_storage(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

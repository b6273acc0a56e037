"""How many floating-point operations a network makes for one row."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NUM_ROWS = 2
"""BatchNorm refuses to train on one."""


def training_flops_per_row(model: nn.Module, row: Tensor) -> float:
    """Return the operations of the products of matrices in a forward and a backward pass over one row.

    A multiplication and an addition are two; weights that are not trained have no gradient to be counted. Of causal
    attention the whole square counts, as is usual (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). They are
    counted on a copy without storage, so nothing is computed, unless the network looks at its numbers, as some of
    transformers do: then two rows go through it. It is left as it was.

    Args:
        model: the bare network, without recomputation in its backward pass.
        row: (1, ...) an input.
    """
    parameter = next(model.parameters())
    row = row.to(parameter.dtype if row.is_floating_point() else torch.int64)
    rows = row.expand(NUM_ROWS, *row.shape[1:]).to(parameter.device)
    tensors = [*model.parameters(), *model.buffers()]
    bare = copy.deepcopy(model, {id(tensor): _without_storage(tensor) for tensor in tensors})
    try:
        return _count(bare, rows.to("meta"))
    except RuntimeError:
        was_training = model.training
        num_flops = _count(model.eval(), rows)  # without dropout, so no random number is drawn
        model.train(was_training).zero_grad()
        return num_flops


def _count(model: nn.Module, rows: Tensor) -> float:
    # The counter does not know torch's fused attention for CPUs; this one is made of products of matrices.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(rows).sum().backward()
    num_flops: int = counter.get_total_flops()
    return num_flops / len(rows)


def _without_storage(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

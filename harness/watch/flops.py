"""How many floating-point operations a network makes for one row."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.rows.batches import Batch
from harness.rows.tree import map_tree
from harness.strategy.graph import zero_of

NUM_ROWS = 2
"""BatchNorm refuses to train on one."""


def training_flops_per_row(model: nn.Module, forward: Callable[[nn.Module, Any], Any], rows: Batch) -> float:
    """Return the operations of the products of matrices in a forward and a backward pass over one row.

    A multiplication and an addition are two; weights that are not trained have no gradient to be counted. Of causal
    attention the whole square counts, as is usual (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). They are
    counted on a copy without storage, so nothing is computed, unless the network looks at its numbers, as some of
    transformers do: then two rows go through it. It is left as it was.

    Args:
        model: the bare network, without recomputation in its backward pass.
        forward: sends a batch through a network.
        rows: some rows, where the model is.
    """
    tensors = [*model.parameters(), *model.buffers()]
    try:  # a network that keeps an output with its graph cannot be copied
        bare = copy.deepcopy(model, {id(tensor): _without_storage(tensor) for tensor in tensors})
        on_meta = map_tree(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, rows.data)
        return _count(lambda: forward(bare, on_meta)) / rows.num_rows
    except RuntimeError:
        was_training = model.training
        model.eval()  # without dropout, so no random number is drawn
        num_flops = _count(lambda: forward(model, rows.data)) / rows.num_rows
        model.train(was_training).zero_grad()
        return num_flops


def _count(forward: Callable[[], Any]) -> int:
    # The counter does not know torch's fused attention for CPUs; this one is made of products of matrices.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        zero_of(forward()).backward()  # type: ignore[no-untyped-call]
    num_flops: int = counter.get_total_flops()
    return num_flops


def _without_storage(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

"""What an output depends on: the graph that its backward pass would walk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from harness.rows.tree import leaves


def parameters_behind(outputs: Iterable[Tensor | None]) -> set[nn.Parameter]:
    """Return the parameters that get a gradient from any of `outputs`; those that are frozen do not."""
    waiting: list[Any] = [tensor.grad_fn for tensor in outputs if tensor is not None]
    seen: set[Any] = set()
    found: set[nn.Parameter] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a gradient is added up
            found.add(node.variable)
        waiting += [before for before, _ in node.next_functions]
    return found


def differentiable(outputs: Any) -> list[Tensor]:
    """Return the tensors of a tree that a backward pass can begin at."""
    return [leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]


def zero_of(outputs: Any) -> Tensor:
    """Return a () zero whose backward pass goes to everything that a network's outputs depend on, with zeros.

    An output may be infinite, such as a logit of what is masked: 0 times that would be NaN.
    """
    finite = [torch.where(leaf.isfinite(), leaf, 0.0) for leaf in differentiable(outputs)]
    sums = [leaf.sum(dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in finite]
    return 0.0 * torch.stack(sums).sum()

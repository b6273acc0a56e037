"""Which parameters an output depends on, read from the graph that its backward pass would walk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


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

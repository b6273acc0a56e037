"""From some rows to one tree with the rows first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import DataError
from harness.rows.tree import child, children, paths

Collate = Callable[[list[Any]], Any]
"""From a list of rows to a tree of tensors with as many rows first."""
WRITE_COLLATE = "bring them to one shape, or give the data part a method collate(rows), which pads them"


def stack(rows: Sequence[Any], ids: Sequence[int]) -> Any:
    """Return the tree of some rows: tensors, arrays and numbers are stacked, all else comes as a list.

    Args:
        rows: trees with the same keys, lengths and fields.
        ids: of these rows, for messages.
    Raises:
        DataError: they are not alike; names two rows and what each has.
    """
    return _stack(list(rows), ids, "")


def _stack(rows: list[Any], ids: Sequence[int], path: str) -> Any:
    first = rows[0]
    names = children(first)
    for row, number in zip(rows, ids, strict=True):
        if (found := children(row)) != names or (names is not None and type(row) is not type(first)):
            raise DataError(
                f"row {number:,} has {_shape(found, row)}{_at(path)}, row {ids[0]:,} has {_shape(names, first)}: all "
                "rows are to be alike"
            )
    if names is None:
        return _stacked_leaves(rows, ids, path)
    parts = {name: _stack([child(row, name) for row in rows], ids, f"{path}.{name}".lstrip(".")) for name in names}
    if isinstance(first, list | tuple) and not hasattr(first, "_fields"):
        return type(first)(parts.values())
    if isinstance(first, dict):
        return parts
    return type(first)(**parts)


def _stacked_leaves(rows: list[Any], ids: Sequence[int], path: str) -> Any:
    if isinstance(rows[0], np.ndarray | np.generic):
        rows = [torch.as_tensor(row) for row in rows]
    first = rows[0]
    if isinstance(first, bool | int | float):
        has_floats = any(isinstance(row, float) for row in rows)
        return torch.tensor(rows, dtype=torch.float64 if has_floats else None)  # brought to the type of the run later
    if not isinstance(first, Tensor):
        return rows
    for row, number in zip(rows, ids, strict=True):
        if not isinstance(row, Tensor) or row.shape != first.shape:
            shape = tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise DataError(
                f"row {number:,} has shape {shape}{_at(path)}, row {ids[0]:,} has {tuple(first.shape)}: {WRITE_COLLATE}"
            )
    return torch.stack(rows)


def check_rows(tree: Any, num_rows: int) -> None:
    """Refuse a tree that has not `num_rows` rows first in every tensor.

    Raises:
        DataError: names the tensor.
    """
    tensors = [(path, leaf) for path, leaf in paths(tree) if isinstance(leaf, Tensor)]
    if not tensors:
        raise DataError(f"a batch of {num_rows} rows has no tensor in it; rows are trees of tensors and numbers")
    for path, tensor in tensors:
        found = len(tensor) if tensor.dim() else None
        if found != num_rows:
            what = "is one number" if found is None else f"has {found} rows"
            raise DataError(
                f"collate was given {num_rows} rows, and what it returned {what}{_at(path)}: every tensor of a batch "
                "has its rows first, as many as there are"
            )


def _at(path: str) -> str:
    return f" at {path}" if path else ""


def _shape(names: list[Any] | None, tree: Any) -> str:
    if names is None:
        return f"one {type(tree).__name__}"
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return f"a {type(tree).__name__} of {len(names)}"
    return f"the keys {', '.join(map(str, names))}"

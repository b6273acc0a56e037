"""Kinds of rows: in memory, and read when they are wanted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.rows.tree import leaves


@dataclass(frozen=True)
class Columns:
    """All rows of one split, in memory."""

    inputs: Tensor
    """(N, ...) floats, or (N, T) ids of tokens in any type of integers; contiguous."""
    targets: Tensor
    """(N,) int64 labels, (N, K) floats or (N, T) ids, contiguous; it may share memory with `inputs`."""

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.targets) > 0, "a split wants as many targets as inputs, and at least one"
        assert self.inputs.is_contiguous(), "columns are to be contiguous"
        assert self.targets.is_contiguous(), "columns are to be contiguous"

    def __len__(self) -> int:
        return len(self.inputs)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with the number of rows, the targets, or one of 1,024 rows."""
        digest = hashlib.blake2b(f"{tuple(self.inputs.shape)} {tuple(self.targets.shape)}".encode(), digest_size=8)
        every = -(-len(self) // 1024)
        for column in (self.targets, self.inputs[::every]):
            digest.update(column.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class ColumnTree:
    """All rows of one split, in memory: any tree of tensors, rows first."""

    tree: Any

    def __post_init__(self) -> None:
        assert len({len(column) for column in leaves(self.tree)}) == 1, "columns are to have as many rows each"

    def __len__(self) -> int:
        return len(next(leaves(self.tree)))

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with the number of rows, or one of 1,024 rows."""
        digest = hashlib.blake2b(digest_size=8)
        every = -(-len(self) // 1024)
        for column in leaves(self.tree):
            digest.update(f"{tuple(column.shape)} {column.dtype}".encode())
            digest.update(column[::every].contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


@runtime_checkable
class TakenRows(Protocol):
    """All rows of one split, read when they are wanted."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Return what changes with the rows."""
        ...

    def take(self, ids: NDArray[np.int64], *, epoch: int) -> Any:
        """Return some rows, on the CPU: a tree of tensors, rows first.

        Args:
            epoch: which pass over the rows this is; what is drawn at random for a row follows from both.
        """
        ...


@runtime_checkable
class InShards(Protocol):
    """Rows that lie in several files, of which an update takes from as few as it can."""

    rows_per_shard: NDArray[np.int64]


AnyRows = Columns | ColumnTree | TakenRows


def targets_of(rows: AnyRows) -> Tensor | None:
    """Return the (N, ...) column `targets` of rows in memory; None where there is none."""
    if isinstance(rows, Columns):
        return rows.targets
    tree = rows.tree if isinstance(rows, ColumnTree) else None
    targets = tree.get("targets") if isinstance(tree, dict) else None
    return targets if isinstance(targets, Tensor) else None


def labels_of(rows: AnyRows) -> Tensor | None:
    """Return the (N,) whole numbers that rows in memory have as `targets`; None where there are none."""
    targets = targets_of(rows)
    return targets if targets is not None and targets.dim() == 1 and not targets.is_floating_point() else None


class Augmentation(Protocol):
    """Random changes of rows that follow from the seed and the place in training alone."""

    def draw(self, places: NDArray[np.int64], *, epoch: int) -> Tensor:
        """Return (n, ...) what is drawn for places in an epoch."""
        ...

    def changed(self, data: Any, draws: Tensor) -> Any:
        """Return the rows of a batch as they were drawn, on their device."""
        ...


def evenly_spread(count: int, length: int) -> list[int]:
    """Return `count` of the numbers below `length`, or all, evenly spread from 0 on."""
    count = min(count, length)
    return [index * length // count for index in range(count)]

"""Columns in files that every rank of a machine maps instead of holding them: for tables larger than memory.

The files are written once, a block of rows at a time, into the cache (cache.py). Which rows an update takes is a
function of its position (order.py), so that a resumed run needs no cursor into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from harness.rows.batches import converted
from harness.rows.cache import Facts, Write
from harness.rows.rows import Columns


def write_columns(write: Write, name: str, inputs: Iterable[Tensor], targets: Tensor) -> Facts:
    """Write one split and return what `open_columns` wants to know of it.

    Args:
        inputs: blocks of (n, ...) floats, written as float32.
        targets: (N,) int64 or (N, K) floats.
    Raises:
        DataError: a number is too large for float32.
    """
    shape: list[int] = []

    def blocks() -> Iterator[memoryview]:
        for block in inputs:
            shape[:] = block.shape[1:]
            yield _bytes(converted(block, torch.float32))

    write(f"{name}-inputs.bin", blocks())
    targets = converted(targets, torch.float32)
    write(f"{name}-targets.bin", [_bytes(targets)])
    return {"inputs": [len(targets), *shape], "targets": list(targets.shape)}


def open_columns(folder: Path, name: str, facts: Facts, *, has_labels: bool) -> Columns:
    """Return the columns of a split, mapped: they take memory only while they are looked at, and are shared."""
    inputs = _mapped(folder / f"{name}-inputs.bin", facts["inputs"], torch.float32)
    dtype = torch.int64 if has_labels else torch.float32
    return Columns(inputs, _mapped(folder / f"{name}-targets.bin", facts["targets"], dtype))


def _mapped(path: Path, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=False, size=prod(shape), dtype=dtype).reshape(shape)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().numpy().data).cast("B")

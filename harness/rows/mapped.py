"""Columns in files that every rank of a machine maps instead of holding them: for tables larger than memory.

The files are written once, a block of rows at a time, under the cache of `datasets`. Which rows an update takes is a
function of its position (order.py), so that a resumed run needs no cursor into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.record.files import json_bytes, storage_errors, write_durably
from harness.rows.batches import Columns, converted

SCHEMA = 2  # raise it when a file written before would be read wrongly
FACTS = "facts.json"
Facts = dict[str, Any]


def cached(described: Any, build: Callable[[Path], Facts]) -> tuple[Path, Facts]:
    """Return the folder that `build` filled for what is `described`, now or earlier, and what it returned.

    Args:
        described: plain data; another one is another folder.
        build: is called with an empty folder, by one process of a machine while the others wait; returns plain data.
    Raises:
        StorageError: the cache cannot be written.
    """
    import datasets

    key = hashlib.blake2b(json.dumps([SCHEMA, described], sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "harness-columns" / key
    with storage_errors("write", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not (folder / FACTS).exists():
                _build(folder, build)
    return folder, json.loads((folder / FACTS).read_bytes())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # is let go when the file is closed, however this process ends
        yield


def _build(folder: Path, build: Callable[[Path], Facts]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        write_durably(temporary / FACTS, [json_bytes(build(temporary))])
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_columns(folder: Path, name: str, inputs: Iterable[Tensor], targets: Tensor) -> Facts:
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

    write_durably(folder / f"{name}-inputs.bin", blocks())
    targets = converted(targets, torch.float32)
    write_durably(folder / f"{name}-targets.bin", [_bytes(targets)])
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

"""The rows of a user's data part: a torch Dataset that is asked row by row, or a tree of columns in memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from harness.config.data import TWO_COLLATES, Pad
from harness.errors import ConfigError, DataError
from harness.rows import draws
from harness.rows.collate import described
from harness.rows.dataset import DatasetRows
from harness.rows.hugging_face import as_rows
from harness.rows.open_files import OpenFiles
from harness.rows.order import permutation_key
from harness.rows.rows import ColumnTree
from harness.rows.splits import DataSplits, set_aside
from harness.rows.tree import map_tree, paths


def own_splits(
    make: Callable[..., Any],
    *,
    has_split: bool,
    validation_fraction: float,
    seed: int,
    workers: int = 0,
    num_outputs: Callable[[Tensor | None], int] = lambda targets: 0,
    pad: Pad | None = None,
    keys: Sequence[str] = (),
) -> DataSplits:
    """Return the rows that `make()` returns, or `make(split="train")` and `make(split="validation")`.

    It is made with random numbers that follow from the seed alone, the same for both splits.

    Args:
        make: returns a torch Dataset with a length, or a tree of tensors or arrays with the rows first.
        has_split: whether it takes `split`; without it a fraction of the rows validates.
        seed: decides which do, and what is drawn at random for a row.
        workers: processes of each rank that read the rows of a Dataset ahead.
        num_outputs: of a network, from the (1, ...) column `targets` of a row, if there is one.
        pad: how rows of a Dataset that differ in shape become one tensor.
        keys: that the task wants a row to have.
    Raises:
        DataError: it returns something else, too few rows, or rows without these keys.
        ConfigError: these rows are not padded by us.
    """
    opened = OpenFiles()
    rows_of = functools.partial(_rows, make, seed=seed, pad=pad, workers=workers, opened=opened)
    with opened.noted():
        if has_split:
            train, validation = rows_of(split="train"), rows_of(split="validation")
        else:
            train, validation = _dealt_out(rows_of(), validation_fraction, seed=seed)
        firsts = [
            rows.take(np.zeros(1, np.int64), epoch=0) if isinstance(rows, DatasetRows) else rows.tree
            for rows in (train, validation)
        ]
    for first in firsts:
        _check_keys(first, keys)
    facts = train.facts if isinstance(train, DatasetRows) else {}
    _check_facts(facts)
    first = firsts[0]
    inputs, targets = (first.get(name) if isinstance(first, dict) else None for name in ("inputs", "targets"))
    shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()
    outputs = num_outputs(targets if isinstance(targets, Tensor) else None)
    return DataSplits(train, validation, shape, outputs, own_facts=facts)


def _rows(
    make: Callable[..., Any], *, seed: int, pad: Pad | None, workers: int, opened: OpenFiles, **split: str
) -> DatasetRows | ColumnTree:
    name = f"split {split['split']}" if split else "the data"
    make_it = functools.partial(_made, make, name, seed=seed, **split)
    thing = make_it()
    if _is_dataset(thing, name):
        if pad is not None and hasattr(thing, "collate"):
            raise ConfigError(TWO_COLLATES.format(name=type(thing).__name__))
        return DatasetRows(thing, seed=seed, pad=pad, workers=workers, make=make_it, opened=opened)
    if pad is not None:
        raise ConfigError(f"data.collate: {name} are columns, whose rows all have one shape; leave it out")
    return _columns(thing, name)


def _dealt_out(
    rows: DatasetRows | ColumnTree, fraction: float, *, seed: int
) -> tuple[DatasetRows | ColumnTree, DatasetRows | ColumnTree]:
    """Return what trains, and the fraction that validates."""
    train, validation = (
        rows.only(part) if isinstance(rows, DatasetRows) else _only(rows, part)
        for part in set_aside(len(rows), fraction, seed=seed)
    )
    return train, validation


def _made(make: Callable[..., Any], name: str, *, seed: int, **split: str) -> Any:
    with draws.kept():
        draws.seed(permutation_key(seed, 0, "make"))
        return as_rows(make(**split), name=name, **split)


def _is_dataset(thing: Any, name: str) -> bool:
    """Return whether something is a Dataset and no tree of columns.

    Raises:
        DataError: it has no rows that could be asked for.
    """
    if isinstance(thing, IterableDataset) or not hasattr(thing, "__len__"):
        raise DataError(
            f"{name}: {type(thing).__name__} has no length, so no row has a number that the run could ask for; give a "
            "Dataset with __len__ and __getitem__, such as a list of (file, offset) that __getitem__ reads, or "
            "load_dataset(...) without streaming"
        )
    if not hasattr(thing, "__getitem__") or isinstance(thing, dict | list | tuple | Tensor | np.ndarray):
        return False
    if len(thing) == 0:
        raise DataError(f"{name}: {type(thing).__name__} has not one row (its len is 0)")
    return True


def _columns(thing: Any, name: str) -> ColumnTree:
    tree = map_tree(lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, thing)
    lengths = {}
    for path, leaf in paths(tree):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            raise DataError(
                f"{name}: {path or 'it'} is {'one number' if isinstance(leaf, Tensor) else type(leaf).__name__}, not a "
                "column: columns are tensors or arrays with the rows first"
            )
        lengths[path] = len(leaf)
    if not lengths or 0 in lengths.values():
        raise DataError(f"{name}: it has not one row")
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{path} {count:,}" for path, count in lengths.items())
        raise DataError(f"{name}: its columns have other numbers of rows: {told}")
    return ColumnTree(tree)


def _only(rows: ColumnTree, ids: NDArray[np.int64]) -> ColumnTree:
    return ColumnTree(map_tree(lambda column: column[torch.from_numpy(ids)], rows.tree))


def _check_keys(batch: Any, keys: Sequence[str]) -> None:
    """Refuse rows that a task of ours would look into in vain.

    Raises:
        DataError: says what they have.
    """
    if keys and not (isinstance(batch, MutableMapping) and set(keys) <= batch.keys()):
        wanted = " and ".join(keys)
        shown = ", ".join(f'"{key}": ...' for key in keys)
        raise DataError(
            f"rows have {described(batch)}, where the task wants the keys {wanted}: return {{{shown}}} "
            "(a datasets.Dataset after rename_columns), or bring a task of your own"
        )


def _check_facts(facts: Any) -> None:
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the facts of the data are no JSON: {error}; numbers, texts and lists of them are") from error
    if not isinstance(facts, dict):
        raise DataError(
            f"the facts of the data are a {type(facts).__name__}; a dict such as {{'classes': 10}} is wanted"
        )

"""The rows of a user's data part: a torch Dataset that is asked row by row, or a tree of columns in memory."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from harness.errors import DataError
from harness.own_code import told
from harness.rows.batches import ColumnTree, TakenRows
from harness.rows.collate import Collate, check_rows, stack
from harness.rows.lengths import lengths_said_by
from harness.rows.order import permutation_key, random_bits
from harness.rows.splits import DataSplits, set_aside
from harness.rows.tree import map_tree, paths

DIGESTED_ROWS = 64
"""Of a Dataset, evenly spread, that are compared with those of a run that is resumed."""


def own_splits(
    make: Callable[..., Any],
    *,
    has_split: bool,
    validation_fraction: float,
    seed: int,
    num_outputs: Callable[[Tensor | None], int] = lambda targets: 0,
) -> DataSplits:
    """Return the rows that `make()` returns, or `make(split="train")` and `make(split="validation")`.

    Args:
        make: returns a torch Dataset with a length, or a tree of tensors or arrays with the rows first.
        has_split: whether it takes `split`; without it a fraction of the rows validates.
        seed: decides which do, and what is drawn at random for a row.
        num_outputs: of a network, from the (1, ...) column `targets` of a row, if there is one.
    Raises:
        DataError: it returns something else, or too few rows.
    """
    if has_split:
        made = [make(split=split) for split in ("train", "validation")]
        train, validation = (
            _rows(thing, f"split {name}", seed=seed) for thing, name in zip(made, ("train", "validation"), strict=True)
        )
    else:
        made = [make()]
        rows = _rows(made[0], "the data", seed=seed)
        ids = set_aside(len(rows), validation_fraction, seed=seed)
        train, validation = (rows.only(part) if isinstance(rows, DatasetRows) else _only(rows, part) for part in ids)
    facts = getattr(made[0], "facts", {})
    facts = facts() if callable(facts) else facts
    _check_facts(facts)
    first = train.take(np.zeros(1, np.int64), epoch=0) if isinstance(train, DatasetRows) else train.tree
    inputs, targets = (first.get(name) if isinstance(first, dict) else None for name in ("inputs", "targets"))
    shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()
    outputs = num_outputs(targets if isinstance(targets, Tensor) else None)
    return DataSplits(train, validation, shape, outputs, own_facts=facts)


def _rows(thing: Any, name: str, *, seed: int) -> DatasetRows | ColumnTree:
    if isinstance(thing, IterableDataset) or not hasattr(thing, "__len__"):
        raise DataError(
            f"{name}: {type(thing).__name__} has no length, so no row has a number that the run could ask for; give a "
            "Dataset with __len__ and __getitem__, such as a list of (file, offset) that __getitem__ reads"
        )
    if hasattr(thing, "__getitem__") and not isinstance(thing, dict | list | tuple | Tensor | np.ndarray):
        if len(thing) == 0:
            raise DataError(f"{name}: {type(thing).__name__} has not one row (its len is 0)")
        return DatasetRows(thing, seed=seed)
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


def _check_facts(facts: Any) -> None:
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the facts of the data are no JSON: {error}; numbers, texts and lists of them are") from error
    if not isinstance(facts, dict):
        raise DataError(
            f"the facts of the data are a {type(facts).__name__}; a dict such as {{'classes': 10}} is wanted"
        )


class DatasetRows(TakenRows):
    """Rows of a map-style Dataset, asked for one by one, each with random numbers of its own.

    Before a row is asked for, Python, numpy and torch are seeded with the seed, the epoch and the number of the row, so
    what is drawn with them follows from these alone; the random state of the process is as it was afterwards.

    Args:
        dataset: has `__len__` and `__getitem__`, and may have `collate(rows)` and `digest()`.
        ids: those that count; None is all.
    """

    def __init__(self, dataset: Any, *, seed: int, ids: NDArray[np.int64] | None = None) -> None:
        self._dataset, self._seed = dataset, seed
        self._ids = np.arange(len(dataset)) if ids is None else ids
        self._collate: Collate | None = getattr(dataset, "collate", None)

    @property
    def has_own_collate(self) -> bool:
        """Whether the Dataset says how rows become a batch, as it must where they are of different shapes."""
        return self._collate is not None

    def __len__(self) -> int:
        return len(self._ids)

    def numbers(self, ids: Sequence[int]) -> list[int]:
        """Return the numbers that rows of this split have in the Dataset."""
        found: list[int] = self._ids[list(ids)].tolist()
        return found

    def lengths(self) -> NDArray[np.int64] | None:
        """Return the (N,) lengths of the rows as the Dataset says them, see `lengths_said_by`."""
        of_all = lengths_said_by(self._dataset)
        return None if of_all is None else of_all[self._ids]

    def only(self, ids: NDArray[np.int64]) -> DatasetRows:
        """Return some of the rows as a split of their own."""
        return DatasetRows(self._dataset, seed=self._seed, ids=self._ids[ids])

    def take(self, ids: NDArray[np.int64], *, epoch: int) -> Any:
        """Return rows as one tree; see `TakenRows`.

        Raises:
            DataError: a row raises, rows are not alike, or `collate` changes their number.
        """
        numbers = self._ids[ids].tolist()
        seeds = random_bits(self._ids[ids], key=permutation_key(self._seed, epoch, "row")).tolist()
        with _random_state_kept():
            rows = [self._row(number, seed) for number, seed in zip(numbers, seeds, strict=True)]
            if self._collate is None:
                return stack(rows, numbers)
            try:
                tree = self._collate(rows)
            except Exception as error:
                raise DataError(f"collate of rows {_few(numbers)} raised {told(error)}") from error
        check_rows(tree, len(numbers))
        return tree

    def _row(self, number: int, seed: int) -> Any:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # the global state is what transforms draw from
        torch.default_generator.manual_seed(seed)
        try:
            return self._dataset[number]
        except Exception as error:
            raise DataError(f"row {number:,} of {type(self._dataset).__name__} raised {told(error)}") from error

    def digest(self) -> str:
        """Return what the Dataset says of itself, or what changes with its length and 64 of its rows."""
        digest = hashlib.blake2b(f"{len(self)}".encode(), digest_size=8)
        if hasattr(self._dataset, "digest"):
            digest.update(f"{self._dataset.digest()} {_few(self._ids)}".encode())
            return digest.hexdigest()
        ids = np.arange(0, len(self), -(-len(self) // DIGESTED_ROWS))
        for number in ids:
            for path, leaf in paths(self._one(int(number))):
                digest.update(f"{path} {leaf if not isinstance(leaf, Tensor) else (leaf.dtype, leaf.shape)}".encode())
                if isinstance(leaf, Tensor):
                    digest.update(leaf.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _one(self, place: int) -> Any:
        number = int(self._ids[place])
        (seed,) = random_bits(self._ids[[place]], key=permutation_key(self._seed, 0, "row")).tolist()
        with _random_state_kept():
            row = self._row(number, seed)
        return map_tree(lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf, row)

    def is_repeatable(self) -> bool:
        """Return whether row 0, asked for twice, is the same."""
        first, second = (list(paths(self._one(0))) for _ in range(2))
        return len(first) == len(second) and all(
            name == other and (torch.equal(leaf, twin) if isinstance(leaf, Tensor) else leaf == twin)
            for (name, leaf), (other, twin) in zip(first, second, strict=True)
        )


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)


def _few(ids: Sequence[int] | NDArray[np.int64]) -> str:
    shown = ", ".join(f"{number:,}" for number in ids[:4])
    return f"{shown}, ..." if len(ids) > 4 else shown

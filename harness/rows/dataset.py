"""The rows of a map-style Dataset, each with random numbers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.config.data import Pad
from harness.errors import DataError
from harness.own_code import told
from harness.rows import draws
from harness.rows.collate import Collate, at, check_rows, padded
from harness.rows.hugging_face import facts_of
from harness.rows.lengths import lengths_of
from harness.rows.open_files import OpenFiles
from harness.rows.order import permutation_key, random_bits
from harness.rows.rows import AnyRows, TakenRows, evenly_spread
from harness.rows.tree import paths

COMPARED_ROWS = 64
"""Evenly spread over a Dataset; a resumed run compares them with those that it was trained on."""
LOOKED_AT_TWICE = 8
"""Of these, also evenly spread."""


class DatasetRows(TakenRows):
    """Rows of a map-style Dataset.

    Before a row is asked for, Python, numpy and torch are seeded with the seed, the epoch and the number of the row, so
    what is drawn with them follows from these alone; the random state of the process is as it was afterwards. As long
    as nothing is drawn, which is looked at in every batch, rows are not seeded, and are asked for at once where the
    Dataset can do that (`__getitems__`).

    Args:
        dataset: has `__len__` and `__getitem__`, and may have `__getitems__`, `collate(rows)` and `digest()`.
        ids: those that count; None is all.
        pad: how rows that differ in shape become one tensor, where the Dataset does not collate them itself.
        workers: processes that are to read rows ahead.
        make: makes the Dataset once more, as a worker must where it holds files open.
        opened: what it holds open.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        ids: NDArray[np.int64] | None = None,
        pad: Pad | None = None,
        workers: int = 0,
        make: Callable[[], Any] | None = None,
        opened: OpenFiles | None = None,
    ) -> None:
        self._dataset, self._seed, self._pad, self._make = dataset, seed, pad, make
        self._length = len(dataset)
        self._ids = np.arange(self._length) if ids is None else ids
        self._collate: Collate | None = getattr(dataset, "collate", None)
        self.workers = workers
        self.opened = opened or OpenFiles()
        self._draws = False  # until it is seen to draw
        self.collate_draws = False
        """Whether `look` has seen that what collate makes of some rows is drawn at random."""
        self._comes_together = hasattr(dataset, "__getitems__")
        self._drew: dict[int, bool] = {}  # of rows that were looked at, whether anything was drawn the first time
        self._keeps: set[int] = set()  # rows for which something was drawn only sometimes, so that they keep it
        self._measured_in = -1  # the epoch in which the length was looked at last: it may cost a query

    @property
    def may_pad(self) -> bool:
        """Whether a batch may have more of a row than the row has: padding, by us or by a collate of the Dataset."""
        return self._collate is not None or self._pad is not None

    @property
    def name(self) -> str:
        """What the class of the Dataset is called."""
        return type(self._dataset).__name__

    @property
    def facts(self) -> Any:
        """What the Dataset says of itself."""
        facts = getattr(self._dataset, "facts", None)
        return facts_of(self._dataset) if facts is None else facts() if callable(facts) else facts

    def __len__(self) -> int:
        return len(self._ids)

    def numbers(self, ids: Sequence[int]) -> list[int]:
        """Return the numbers that rows of this split have in the Dataset."""
        found: list[int] = self._ids[list(ids)].tolist()
        return found

    def lengths(self) -> NDArray[np.int64] | None:
        """Return the (N,) lengths of the rows as the Dataset says them, see `lengths_of`."""
        of_all = lengths_of(self._dataset)
        return None if of_all is None else of_all[self._ids]

    def only(self, ids: NDArray[np.int64]) -> DatasetRows:
        """Return some of the rows as a split of their own."""
        return DatasetRows(
            self._dataset,
            seed=self._seed,
            ids=self._ids[ids],
            pad=self._pad,
            workers=self.workers,
            make=self._make,
            opened=self.opened,
        )

    def make_again(self) -> None:
        """Take a Dataset of this process's own in the place of the one that another has made.

        Raises:
            DataError: it cannot be made a second time.
        """
        assert self._make is not None, "nothing is known of how these rows are made"
        self._of_another = self._dataset  # to be kept: what it holds open is not this process's to close
        try:
            self._dataset = self._make()
        except Exception as error:
            raise DataError(
                f"{self.name} holds {self.opened.names()[0]}, so a worker has to make its own, which raised "
                f"{told(error)}; open it so that several processes can, or set data.workers=0"
            ) from error
        self._collate = getattr(self._dataset, "collate", None)
        self._measured_in = -1

    def take(self, ids: NDArray[np.int64], *, epoch: int) -> Any:
        """Return rows as one tree; see `TakenRows`.

        Raises:
            DataError: a row raises, rows are not alike, `collate` changes their number, or the Dataset has another
                length in this epoch.
        """
        if epoch != self._measured_in:
            self._check_length()
            self._measured_in = epoch
        numbers = self._ids[ids].tolist()
        before = draws.state()
        if not self._draws:
            tree = self._taken_at_once(numbers)
            self._draws = draws.drew(before, draws.state())
            if tree is not None and not self._draws:
                return tree
        try:
            seeds = _seeds(self._ids[ids], key=permutation_key(self._seed, epoch, "row"))
            return self._collated([self._row(*each) for each in zip(numbers, seeds, strict=True)], numbers)
        finally:
            draws.restore(before)

    def _check_length(self) -> None:
        if (length := len(self._dataset)) != self._length:
            raise DataError(
                f"{self.name} had {self._length:,} rows when the run began and has {length:,} now, so rows may have "
                "other numbers; let its length stay, such as by taking what is there once, in the constructor"
            )

    def _taken_at_once(self, numbers: list[int]) -> Any:
        """Return rows for which nothing is seeded; None where one raises: asked one by one they tell which."""
        try:
            if self._comes_together:
                return self._collated(self._dataset.__getitems__(numbers), numbers)
            get = self._dataset.__getitem__
            return self._collated([get(number) for number in numbers], numbers)
        except Exception:
            self._comes_together = False
            return None

    def _collated(self, rows: list[Any], numbers: list[int]) -> Any:
        if self._collate is None:
            return padded(rows, numbers, self._pad)
        try:
            tree = self._collate(rows)
        except Exception as error:
            raise DataError(f"collate of rows {first_of(numbers)} raised {told(error)}") from error
        check_rows(tree, len(numbers))
        return tree

    def _row(self, number: int, random_number: int) -> Any:
        draws.seed(random_number)
        try:
            return self._dataset[number]
        except Exception as error:
            reason = told(error)
            if (length := len(self._dataset)) != self._length:
                reason += f"; its length was {self._length:,} and is {length:,} now, so rows have other numbers"
            raise DataError(f"row {number:,} of {self.name} raised {reason}") from error

    @cached_property
    def compared(self) -> dict[str, Any]:
        """What a resumed run compares, as JSON: the length, and what the Dataset says of itself or some of its rows."""
        own = str(self._dataset.digest()) if hasattr(self._dataset, "digest") else None
        numbers = [] if own else self._some(COMPARED_ROWS)
        with draws.kept():
            return {"length": len(self), "digest": own, "rows": {str(number): self._seen(number) for number in numbers}}

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with the length, and with what the Dataset says of itself."""
        said = f"{len(self)} {self.compared['digest']} {first_of(self._ids)}"
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    def difference(self, saved: Mapping[str, Any], *, there: str, here: str) -> str:
        """Return what is other than in `compared` of another time or rank; nothing where all that can be compared is.

        A row that is another each time it is asked for says nothing.

        Args:
            there, here: what to call that time or rank, and this one.
        """
        now = self.compared
        if saved["length"] != now["length"]:
            return f"{saved['length']:,} rows {there}, {now['length']:,} {here}"
        if saved["digest"] != now["digest"]:
            before, after = (each["digest"] or "missing" for each in (saved, now))
            return f"their digest() is {before} {there}, {after} {here}"
        both = saved["rows"].keys() & now["rows"].keys()
        if not both and saved["rows"]:
            before, after = (first_of(sorted(map(int, each["rows"]))) for each in (saved, now))
            return f"row {before} {there}, row {after} {here}"
        others = sorted(int(number) for number in both if saved["rows"][number] != now["rows"][number])
        with draws.kept():
            others = [number for number in others if self._seen(number) == now["rows"][str(number)]]
        if not others:
            return ""
        return (
            f"row {first_of(others)} is another {here} than {there} ({len(others)} of {len(both)} that were compared)"
        )

    def look(self) -> list[int]:
        """Ask for some rows twice with the same seed and once with another.

        Returns:
            the numbers of those that are not the same with the same seed, or draw only the first time, since the
            Dataset keeps what was drawn.

        What is found besides is kept: whether the rows draw at random, come together, and what the Dataset holds open.
        """
        numbers = self._some(LOOKED_AT_TWICE)
        with self.opened.noted(), draws.kept():
            seen = [[self._seen(number, stream=stream) for number in numbers] for stream in ("row", "row", "other")]
            self._draws |= seen[1] != seen[2]
            if self._collate is not None:
                rows = [self._row(number, number) for number in numbers]
                before = draws.state()
                self._collated(rows, numbers)
                self.collate_draws = draws.drew(before, draws.state())
            if self._comes_together and not self._draws:
                self._comes_together = self._are_alike_together(self._some(COMPARED_ROWS))
        unlike = {number for number, first, second in zip(numbers, *seen[:2], strict=True) if first != second}
        return sorted(unlike | self._keeps)

    def _are_alike_together(self, numbers: list[int]) -> bool:
        """Return whether rows that are asked for at once are those that come one by one."""
        alone = [self._seen(number) for number in numbers]
        try:
            return [_digest(row) for row in self._dataset.__getitems__(numbers)] == alone
        except Exception:
            return False

    @property
    def draws(self) -> bool:
        """Whether random numbers were drawn for any row that was asked for until now."""
        return self._draws

    def _some(self, count: int) -> list[int]:
        """Return the numbers of at most `count` rows, evenly spread."""
        found: list[int] = self._ids[evenly_spread(count, len(self))].tolist()
        return found

    def _seen(self, number: int, *, stream: str = "row") -> str:
        """Return the digest of a row as it is in the first epoch, and note whether anything is drawn for it."""
        (random_number,) = _seeds(np.array([number]), key=permutation_key(self._seed, 0, stream))
        draws.seed(random_number)
        before = draws.state()
        row = self._row(number, random_number)
        drew = draws.drew(before, draws.state())
        self._draws |= drew
        if self._drew.setdefault(number, drew) != drew:
            self._keeps.add(number)
        _check_row(row, number)
        return _digest(row)


def own_rows(train: AnyRows, validation: AnyRows | None) -> dict[str, DatasetRows]:
    """Return which of the rows of a run are of a Dataset, by what they are called in messages."""
    named = {"training": train, "validation": validation}
    return {name: rows for name, rows in named.items() if isinstance(rows, DatasetRows)}


def _seeds(numbers: NDArray[np.int64], *, key: int) -> list[int]:
    found: list[int] = random_bits(numbers, key=key).tolist()
    return found


def _check_row(row: Any, number: int) -> None:
    """Refuse a row without a tensor, or with one that is not where rows are read.

    Raises:
        DataError: names the row.
    """
    tensors = [(path, leaf) for path, leaf in paths(row) if isinstance(leaf, Tensor)]
    if not any(isinstance(leaf, Tensor | np.ndarray | np.generic | int | float) for _, leaf in paths(row)):
        raise DataError(f"row {number:,} has no tensor in it; rows are trees of tensors and numbers")
    for path, tensor in tensors:
        if tensor.device.type != "cpu":
            raise DataError(
                f"row {number:,} has a tensor on {tensor.device}{at(path)}; leave rows on the CPU, from "
                "where the run copies whole batches to its device"
            )


def _digest(row: Any) -> str:
    """Return 16 hexadecimal digits that follow from the values of a row alone, in any process."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in paths(row):
        if isinstance(leaf, Tensor):
            digest.update(f"{path} {(leaf.dtype, leaf.shape)}".encode())
            if leaf.numel():
                digest.update(leaf.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif hasattr(leaf, "__array_interface__"):  # an array, a number of numpy, or an image of PIL
            array = np.asarray(leaf)
            digest.update(f"{path} {(array.dtype, array.shape)}".encode())
            digest.update(str(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        else:
            shown: Any = type(leaf).__repr__
            is_address = shown is object.__repr__
            digest.update(f"{path} {type(leaf) if is_address else leaf}".encode())
    return digest.hexdigest()


def first_of(ids: Sequence[int] | NDArray[np.int64]) -> str:
    """Return the first of some numbers, for messages."""
    shown = ", ".join(f"{number:,}" for number in ids[:4])
    return f"{shown}, ..." if len(ids) > 4 else shown

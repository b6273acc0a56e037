"""Rows in memory and rows that are read, and the batches a rank takes from them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.errors import DataError, RowError
from harness.rows.lengths import lengths_said_by
from harness.rows.order import BatchPlan, InOrder, TokenLimit
from harness.rows.tree import leaves, map_tree

RESIDENT_BYTES = 2**30  # columns up to this size live on the GPU; larger ones are copied there batch by batch
LOOK_AHEAD_ROWS = 65_536  # an id of the permutation costs 60 ns in blocks of this size, 5 us in blocks of 64
LOOK_AHEAD_MICRO_BATCHES = 4_096  # each is a tensor of its ids, so that many small ones do not stall an update


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


def lengths_of(rows: AnyRows) -> NDArray[np.int64] | None:
    """Return how long each row is, (N,) whole numbers above 0, where the rows say it; None where they do not.

    Raises:
        DataError: they say something else.
    """
    return lengths_said_by(rows)


class Augmentation(Protocol):
    """Random changes of rows that follow from the seed and the place in training alone."""

    def draw(self, places: NDArray[np.int64], *, epoch: int) -> Tensor:
        """Return (n, ...) what is drawn for places in an epoch."""
        ...

    def changed(self, data: Any, draws: Tensor) -> Any:
        """Return the rows of a batch as they were drawn, on their device."""
        ...


class Batch(NamedTuple):
    """Some rows on the device of the model.

    Padding: this rank has no row here but must run the model with the other ranks, since a forward can be
    collective. The batch then holds one real row, whose loss counts zero and whose outputs are ignored.
    """

    data: Any
    """A tree of tensors, rows first, and of what stays on the host; only the task looks inside."""
    num_rows: int
    ids: Tensor
    """(num_rows,) which rows of the split these are."""
    is_padding: bool


class TrainingBatches:
    """This rank's micro-batches of any position of the plan, in the numbers' final type and place.

    Args:
        rows: floats become `dtype`, in memory once; integers of `Columns` come out as int64.
        plan: which rows each position and rank has.
        rank: of this process.
        device: where the model is.
        dtype: of the model's inputs.
        augmentation: is applied on the device.
    Raises:
        DataError: a number is too large for `dtype`.
    """

    def __init__(
        self,
        rows: AnyRows,
        plan: BatchPlan,
        *,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        augmentation: Augmentation | None = None,
    ) -> None:
        assert plan.num_rows == len(rows), f"a plan for {plan.num_rows} rows met {len(rows)} rows"
        self.rows, self.plan = rows, plan
        self._rows = _rows_on(device, rows, dtype=dtype, rank=rank)
        self.seconds_waited = 0.0
        """What the host has spent in `at` so far."""
        self._rank, self._device = rank, device
        self._augmentation = augmentation
        self._ahead = range(0)  # positions whose ids are known
        self._firsts = [0]  # of these positions and the one after: which micro-batch is the first
        self._ids: tuple[Tensor, ...] = ()  # of these positions' micro-batches, one after another
        self._draws: tuple[Tensor, ...] = ()  # of the augmentation, likewise

    def at(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of one update: on every rank as many, at least one."""
        began = time.perf_counter()
        batches = self._at(position)
        self.seconds_waited += time.perf_counter() - began
        return batches

    def numbers(self, ids: Sequence[int]) -> list[int]:
        """Return how people call rows of this split: by their number in the Dataset, if they come from one."""
        own = getattr(self.rows, "numbers", None)
        return own(ids) if own else list(ids)

    def some(self, ids: Sequence[int]) -> Batch:
        """Return some rows by their number, as they are in the first epoch and not augmented."""
        return self._rows.batch(torch.tensor(ids, device=self._rows.home), epoch=0)

    def _at(self, position: int) -> list[Batch]:
        if position not in self._ahead:
            self._look_ahead(position)
        index = position - self._ahead.start
        mine = slice(self._firsts[index], self._firsts[index + 1])
        epoch = self.plan.epoch_of(position)
        batches = [self._rows.batch(ids, epoch=epoch) for ids in self._ids[mine]]
        if self._augmentation is None:
            return batches
        changed = self._augmentation.changed
        return [
            batch if batch.is_padding else batch._replace(data=changed(batch.data, drawn.to(self._device)))
            for batch, drawn in zip(batches, self._draws[mine], strict=True)
        ]

    def _look_ahead(self, position: int) -> None:
        """Compute the ids of many positions at once; the last of an epoch, if it is smaller, is looked at alone."""
        plan = self.plan
        num_full = plan.num_rows // plan.global_batch - position % plan.steps_per_epoch
        most = LOOK_AHEAD_MICRO_BATCHES // plan.most_micro_batches
        num_positions = max(1, min(-(-LOOK_AHEAD_ROWS // plan.rows_looked_at), most, num_full))
        sizes = plan.micro_batch_sizes(position, self._rank, num_positions=num_positions)
        rows_of_each = list(chain.from_iterable(sizes))
        ids = torch.from_numpy(plan.sample_ids(position, self._rank, num_positions=num_positions))
        self._ahead = range(position, position + num_positions)
        self._firsts = list(accumulate(map(len, sizes), initial=0))
        home = self._rows.home
        self._ids = torch.split(ids.to(home), rows_of_each)
        if self._augmentation is not None:
            places = plan.places(position, self._rank, num_positions=num_positions)
            draws = self._augmentation.draw(places, epoch=plan.epoch_of(position))
            self._draws = torch.split(draws.to(home), rows_of_each)


class ValidationBatches:
    """Every row once over all ranks, in order, and on every rank the same number of batches.

    Args:
        rows: floats become `dtype`, in memory once; integers of `Columns` come out as int64.
        rank, world_size: which contiguous share of the rows is visited here.
        batch_rows: rows of one batch; the last one of a rank may have fewer, or be padding.
        device: where the model is.
        dtype: of the model's inputs.
        token_limit: of one batch, in the place of `batch_rows`.
    Raises:
        DataError: a number is too large for `dtype`.
    """

    def __init__(
        self,
        rows: AnyRows,
        *,
        rank: int,
        world_size: int,
        batch_rows: int,
        device: torch.device,
        dtype: torch.dtype,
        token_limit: TokenLimit | None = None,
    ) -> None:
        self._rows = _rows_on(device, rows, dtype=dtype, rank=rank)
        # One global batch of everything is divided among ranks exactly as validation wants it.
        plan = BatchPlan(
            num_rows=len(rows),
            global_batch=len(rows),
            world_size=world_size,
            micro_batch=None if token_limit else batch_rows,
            seed=0,
            order=InOrder(),
            token_limit=token_limit,
        )
        self._pieces = plan.micro_batches(0, rank)
        self.num_rows = len(rows)
        """Over all ranks."""

    @property
    def first_row(self) -> int:
        """Where this rank's share begins."""
        return self._pieces[0][0]

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Batch]:
        for start, stop in self._pieces:
            yield self._rows.batch(torch.arange(start, stop, device=self._rows.home), epoch=0)


def _rows_on(device: torch.device, rows: AnyRows, *, dtype: torch.dtype, rank: int) -> _InMemory | _Taken:
    if isinstance(rows, Columns):
        return _InMemory({"inputs": rows.inputs, "targets": rows.targets}, device=device, dtype=dtype, widen=True)
    if isinstance(rows, ColumnTree):
        return _InMemory(rows.tree, device=device, dtype=dtype)
    return _Taken(rows, device=device, dtype=dtype, rank=rank)


class _InMemory:
    """Columns in their final type, on the device if they are small, from which batches are taken.

    Args:
        widen: ids come out as int64, which embeddings and cross-entropy want; all are kept in the type they came in.
    """

    def __init__(self, tree: Any, *, device: torch.device, dtype: torch.dtype, widen: bool = False) -> None:
        columns = [converted(column, dtype) for column in leaves(tree)]
        is_resident = sum(column.nbytes for column in columns) <= RESIDENT_BYTES
        self.home = home = device if is_resident else torch.device("cpu")
        self._columns = [column.to(home) for column in columns]
        self._is_widened = [widen and not column.is_floating_point() for column in columns]
        places = iter(range(len(columns)))
        self._tree = map_tree(lambda _: next(places), tree)  # of places in _columns
        self._is_flat = type(tree) is dict and len(tree) == len(columns)
        self._padding = torch.zeros(1, dtype=torch.int64, device=home)
        self._copy_to = None if home.type == device.type else device

    def batch(self, ids: Tensor, *, epoch: int) -> Batch:
        """Return the rows `ids`, which are where the columns are; without any, padding."""
        is_padding = ids.numel() == 0
        if is_padding:
            ids = self._padding
        taken = [column.index_select(0, ids) for column in self._columns]
        if is_padding:
            taken = [_finite(column) for column in taken]
        if self._copy_to is not None:
            taken = [column.pin_memory().to(self._copy_to, non_blocking=True) for column in taken]
        taken = [column.long() if wide else column for column, wide in zip(taken, self._is_widened, strict=True)]
        data = dict(zip(self._tree, taken, strict=True)) if self._is_flat else map_tree(taken.__getitem__, self._tree)
        return Batch(data, len(ids), ids, is_padding)


class _Taken:
    """Rows that are read when a batch wants them."""

    def __init__(self, rows: TakenRows, *, device: torch.device, dtype: torch.dtype, rank: int) -> None:
        self.home = torch.device("cpu")
        self._rows, self._device, self._dtype, self._rank = rows, device, dtype, rank

    def batch(self, ids: Tensor, *, epoch: int) -> Batch:
        """Return the rows `ids`; without any, padding."""
        is_padding = ids.numel() == 0
        if is_padding:
            ids = torch.zeros(1, dtype=torch.int64)
        try:
            data = map_tree(self._on_device, self._rows.take(ids.numpy(), epoch=epoch))
        except DataError as error:
            raise RowError(f"{error.args[0]} (on rank {self._rank})") from error
        return Batch(map_tree(_finite, data) if is_padding else data, len(ids), ids, is_padding)

    def _on_device(self, leaf: Any) -> Any:
        return converted(leaf, self._dtype).to(self._device) if isinstance(leaf, Tensor) else leaf


def _finite(leaf: Any) -> Any:
    """Return numbers without NaN and infinity, which would spoil the gradient even of a row that counts zero."""
    return leaf.nan_to_num() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def converted(column: Tensor, dtype: torch.dtype) -> Tensor:
    """Return floats as `dtype`, and labels as they are.

    Raises:
        DataError: a number is too large for `dtype`.
    """
    if column.dtype == dtype or not column.is_floating_point():
        return column
    result = column.to(dtype)
    too_large = result.isinf() & column.isfinite()
    if too_large.any():
        place = too_large.nonzero()[0].tolist()
        raise DataError(
            f"{int(too_large.sum())} numbers are too large for {dtype}, the first {column[tuple(place)].item():g} in "
            f"row {place[0]}; bring the columns to a smaller unit, or set strategy.precision: fp64"
        )
    return result

"""The batches that a rank takes from rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.errors import DataError, RowError
from harness.rows.dataset import DatasetRows
from harness.rows.loader import FIRST, Loader, Request
from harness.rows.order import BatchPlan, InOrder, TokenLimit
from harness.rows.rows import AnyRows, Augmentation, Columns, ColumnTree, TakenRows
from harness.rows.tree import leaves, map_tree

RESIDENT_BYTES = 2**30  # columns up to this size live on the GPU; larger ones are copied there batch by batch
LOOK_AHEAD_ROWS = 65_536  # an id of the permutation costs 60 ns in blocks of this size, 5 us in blocks of 64
LOOK_AHEAD_MICRO_BATCHES = 4_096  # each is a tensor of its ids, so that many small ones do not stall an update


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
        self._readers = _with_workers(self._rows)
        self._from_workers: int | None = None  # the position that they have read next

    def at(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of one update: on every rank as many, at least one."""
        began = time.perf_counter()
        batches = self._at(position)
        self.seconds_waited += time.perf_counter() - began
        return batches

    def start(self, position: int) -> None:
        """Have workers read ahead from a position on, if there are any: from then on `at` waits for them."""
        if self._readers:
            self._readers.read(self._requests(position))
            self._from_workers = position

    def close(self) -> None:
        """End the workers."""
        self._from_workers = None
        self._rows.close()

    def numbers(self, ids: Sequence[int]) -> list[int]:
        """Return how people call rows of this split: by their number in the Dataset, if they come from one."""
        own = getattr(self.rows, "numbers", None)
        return own(ids) if own else list(ids)

    def some(self, ids: Sequence[int]) -> Batch:
        """Return some rows by their number, as they are in the first epoch and not augmented."""
        return self._rows.batch(torch.tensor(ids, device=self._rows.home), epoch=0)

    def _at(self, position: int) -> list[Batch]:
        if self._readers and position == self._from_workers:
            self._from_workers += 1
            return self._readers.read_update()
        places = self._places_ahead(position)
        epoch = self.plan.epoch_of(position)
        batches = [self._rows.batch(ids, epoch=epoch) for ids in self._ids[places]]
        if self._augmentation is None:
            return batches
        changed = self._augmentation.changed
        return [
            batch if batch.is_padding else batch._replace(data=changed(batch.data, drawn.to(self._device)))
            for batch, drawn in zip(batches, self._draws[places], strict=True)
        ]

    def _requests(self, position: int) -> Iterator[Request]:
        """Yield what workers are to read from a position on, without an end."""
        for ahead in itertools.count(position):
            places = self._places_ahead(ahead)
            *first, last = self._ids[places]
            epoch = self.plan.epoch_of(ahead)
            yield from (Request(ids.numpy(), epoch, is_last=False) for ids in first)
            yield Request(last.numpy(), epoch, is_last=True)

    def _places_ahead(self, position: int) -> slice:
        """Return where in `_ids` the micro-batches of a position stand."""
        if position not in self._ahead:
            self._look_ahead(position)
        index = position - self._ahead.start
        return slice(self._firsts[index], self._firsts[index + 1])

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
        self.rows = rows
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
        self._readers = _with_workers(self._rows)
        self._is_begun = False  # they have begun to read the next evaluation
        self.num_rows = len(rows)
        """Over all ranks."""

    @property
    def first_row(self) -> int:
        """Where this rank's share begins."""
        return self._pieces[0][0]

    def __len__(self) -> int:
        return len(self._pieces)

    def start(self) -> None:
        """Have workers begin to read the next evaluation, if there are any."""
        if self._readers and not self._is_begun:
            self._readers.read(Request(np.arange(*piece), epoch=0) for piece in self._pieces)
            self._is_begun = True

    def close(self) -> None:
        """End the workers."""
        self._rows.close()

    def __iter__(self) -> Iterator[Batch]:
        self.start()
        self._is_begun = False
        for piece in self._pieces:
            if self._readers:
                yield from self._readers.read_update()
            else:
                yield self._rows.batch(torch.arange(*piece, device=self._rows.home), epoch=0)


def _rows_on(device: torch.device, rows: AnyRows, *, dtype: torch.dtype, rank: int) -> _InMemory | _Taken:
    if isinstance(rows, Columns):
        return _InMemory({"inputs": rows.inputs, "targets": rows.targets}, device=device, dtype=dtype, widen=True)
    if isinstance(rows, ColumnTree):
        return _InMemory(rows.tree, device=device, dtype=dtype)
    return _Taken(rows, device=device, dtype=dtype, rank=rank)


def _with_workers(rows: _InMemory | _Taken) -> _Taken | None:
    """Return rows that worker processes read, if these are some."""
    return rows if isinstance(rows, _Taken) and rows.has_workers else None


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

    def close(self) -> None:
        """Nothing is to be ended."""

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
    """Rows that are read when a batch wants them, or ahead of it by worker processes."""

    def __init__(self, rows: TakenRows, *, device: torch.device, dtype: torch.dtype, rank: int) -> None:
        self.home = torch.device("cpu")
        self._rows, self._dtype, self._rank = rows, dtype, rank
        self._copied = CopyTo(device)
        self._loader: Loader | None = None

    @property
    def has_workers(self) -> bool:
        """Whether worker processes read the rows."""
        return isinstance(self._rows, DatasetRows) and self._rows.workers > 0

    def read(self, requests: Iterable[Request]) -> None:
        """Have workers read these micro-batches from now on."""
        if self._loader is None:
            assert isinstance(self._rows, DatasetRows), "these rows are not read by workers"
            self._loader = Loader(self._rows, finish=self._finished, pins=self._copied.is_to_gpu, rank=self._rank)
        self._loader.read(requests)

    def read_update(self) -> list[Batch]:
        """Return the next micro-batches that workers have read, up to the last of an update."""
        assert self._loader is not None, "nothing was asked for"
        batches, is_last = [], False
        while not is_last:
            with self._errors_of_a_row():
                (ids, _, is_last), tree = self._loader.answer()
            batches.append(self._batch(torch.from_numpy(ids), tree))
        return batches

    def close(self) -> None:
        """End the workers."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def batch(self, ids: Tensor, *, epoch: int) -> Batch:
        """Return the rows `ids`; without any, padding."""
        with self._errors_of_a_row():
            tree = map_tree(self._finished, self._rows.take(FIRST if ids.numel() == 0 else ids.numpy(), epoch=epoch))
        return self._batch(ids, tree)

    def _batch(self, ids: Tensor, tree: Any) -> Batch:
        is_padding = ids.numel() == 0
        ids = torch.from_numpy(FIRST) if is_padding else ids
        return Batch(self._copied(map_tree(_finite, tree) if is_padding else tree), len(ids), ids, is_padding)

    def _finished(self, leaf: Any) -> Any:
        return converted(leaf, self._dtype) if isinstance(leaf, Tensor) else leaf

    @contextmanager
    def _errors_of_a_row(self) -> Iterator[None]:
        try:
            yield
        except RowError:  # which knows of the rank
            raise
        except DataError as error:
            raise RowError(f"{error.args[0]} (on rank {self._rank})") from error


class CopyTo:
    """Copies trees to the device of the model; to a GPU beside the computation of the update before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_to_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.is_to_gpu else None  # type: ignore[no-untyped-call]

    def __call__(self, tree: Any) -> Any:
        """Return a tree on the device."""
        if self._device.type == "cpu":
            return tree
        if self._stream is None:
            return map_tree(lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, tree)
        with torch.cuda.stream(self._stream):
            tree = map_tree(self._pinned_and_copied, tree)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for leaf in leaves(tree):
            if isinstance(leaf, Tensor):
                leaf.record_stream(computing)  # so that its memory is not given away while it is computed with
        return tree

    def _pinned_and_copied(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf if leaf.is_pinned() else leaf.pin_memory()).to(self._device, non_blocking=True)


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

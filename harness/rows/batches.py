"""Columns of numbers, and the batches a rank takes from them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.catalogue.images.augment import Augmentation, changed
from harness.errors import DataError
from harness.rows.order import BatchPlan

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


class TakenColumns(Protocol):
    """All rows of one split, read when they are wanted."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Return what changes with the rows."""
        ...

    def take(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of some rows, on the CPU."""
        ...


class Batch(NamedTuple):
    """Some rows on the device of the model.

    Padding: this rank has no row here but must run the model with the other ranks, since a forward can be
    collective. The batch then holds one real row, whose loss counts zero and whose outputs are ignored.
    """

    inputs: Tensor
    targets: Tensor
    is_padding: bool


class TrainingBatches:
    """This rank's micro-batches of any position of the plan, in the numbers' final type and place.

    Args:
        columns: floats are converted to `dtype` here, once; integers come out as int64.
        plan: which rows each position and rank has.
        rank: of this process.
        device: where the model is.
        dtype: of the model's inputs.
        augmentation: of inputs that are images; on the device.
    Raises:
        DataError: a number is too large for `dtype`.
    """

    def __init__(
        self,
        columns: Columns | TakenColumns,
        plan: BatchPlan,
        *,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        augmentation: Augmentation | None = None,
    ) -> None:
        assert plan.num_rows == len(columns), f"a plan for {plan.num_rows} rows met columns of {len(columns)}"
        self._rows = (
            _Rows(columns, device=device, dtype=dtype)
            if isinstance(columns, Columns)
            else _RowsTaken(columns, device=device, dtype=dtype)
        )
        self.seconds_waited = 0.0
        """What the host has spent in `at` so far."""
        self._plan = plan
        self._rank = rank
        self._augmentation = augmentation
        self._ahead = range(0)  # positions whose ids are known
        self._ids: tuple[Tensor, ...] = ()  # of these positions' micro-batches, one after another
        self._draws: tuple[Tensor, ...] = ()  # of the augmentation, likewise

    def at(self, position: int) -> list[Batch]:
        """Return this rank's micro-batches of one update: on every rank as many, at least one."""
        began = time.perf_counter()
        batches = self._at(position)
        self.seconds_waited += time.perf_counter() - began
        return batches

    def _at(self, position: int) -> list[Batch]:
        if position not in self._ahead:
            self._look_ahead(position)
        first = (position - self._ahead.start) * self._micro_batches
        batches = [self._rows.batch(ids) for ids in self._ids[first : first + self._micro_batches]]
        if self._augmentation is None:
            return batches
        draws = self._draws[first : first + self._micro_batches]
        return [
            batch if batch.is_padding else batch._replace(inputs=changed(batch.inputs, drawn.to(batch.inputs.device)))
            for batch, drawn in zip(batches, draws, strict=True)
        ]

    def _look_ahead(self, position: int) -> None:
        """Compute the ids of many positions at once; the last of an epoch, if it is smaller, is looked at alone."""
        plan = self._plan
        largest_share = -(-plan.global_batch // plan.world_size)
        sizes = [stop - start for start, stop in plan.micro_batches(position, self._rank)]
        num_full = plan.num_rows // plan.global_batch - position % plan.steps_per_epoch
        limits = (-(-LOOK_AHEAD_ROWS // largest_share), LOOK_AHEAD_MICRO_BATCHES // len(sizes), num_full)
        num_positions = max(1, min(limits))
        ids = torch.from_numpy(plan.sample_ids(position, self._rank, num_positions=num_positions))
        self._ahead = range(position, position + num_positions)
        self._micro_batches = len(sizes)
        home = self._rows.home
        self._ids = torch.split(ids.to(home), sizes * num_positions)
        if self._augmentation is not None:
            places = plan.places(position, self._rank, num_positions=num_positions)
            draws = self._augmentation.draw(places, epoch=plan.epoch_of(position))
            self._draws = torch.split(draws.to(home), sizes * num_positions)


class ValidationBatches:
    """Every row once over all ranks, in order, and on every rank the same number of batches.

    Args:
        columns: floats are converted to `dtype` here, once; integers come out as int64.
        rank, world_size: which contiguous share of the rows is visited here.
        batch_rows: rows of one batch; the last one of a rank may have fewer, or be padding.
        device: where the model is.
        dtype: of the model's inputs.
    Raises:
        DataError: a number is too large for `dtype`.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        rank: int,
        world_size: int,
        batch_rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._rows = _Rows(columns, device=device, dtype=dtype)
        # One global batch of everything is divided among ranks exactly as validation wants it.
        plan = BatchPlan(
            num_rows=len(columns), global_batch=len(columns), world_size=world_size, micro_batch=batch_rows, seed=0
        )
        self._pieces = plan.micro_batches(0, rank)
        self.num_rows = len(columns)
        """Over all ranks."""

    @property
    def first_row(self) -> int:
        """Where this rank's share begins."""
        return self._pieces[0][0]

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Batch]:
        for start, stop in self._pieces:
            yield self._rows.batch(torch.arange(start, stop, device=self._rows.home))


class _Rows:
    """Columns in their final type, on the device if they are small, from which batches are taken."""

    def __init__(self, columns: Columns, *, device: torch.device, dtype: torch.dtype) -> None:
        inputs, targets = (converted(column, dtype) for column in (columns.inputs, columns.targets))
        is_resident = inputs.nbytes + targets.nbytes <= RESIDENT_BYTES
        self.home = home = device if is_resident else torch.device("cpu")
        self.inputs, self.targets = inputs.to(home), targets.to(home)
        self._padding = torch.zeros(1, dtype=torch.int64, device=home)
        self._copy_to = None if home.type == device.type else device

    def batch(self, ids: Tensor) -> Batch:
        """Return the rows `ids`, which are where the columns are; without any, padding."""
        is_padding = ids.numel() == 0
        if is_padding:
            ids = self._padding
        inputs, targets = self.inputs.index_select(0, ids), self.targets.index_select(0, ids)
        if self._copy_to is not None:
            inputs = inputs.pin_memory().to(self._copy_to, non_blocking=True)
            targets = targets.pin_memory().to(self._copy_to, non_blocking=True)
        return Batch(_widened(inputs), _widened(targets), is_padding)


def _widened(numbers: Tensor) -> Tensor:
    """Return ids as int64, which embeddings and cross-entropy want; all rows are kept in the type they came in."""
    return numbers if numbers.is_floating_point() else numbers.long()


class _RowsTaken:
    """Rows that are read when a batch wants them."""

    def __init__(self, columns: TakenColumns, *, device: torch.device, dtype: torch.dtype) -> None:
        self.home = torch.device("cpu")
        self._columns, self._device, self._dtype = columns, device, dtype

    def batch(self, ids: Tensor) -> Batch:
        """Return the rows `ids`; without any, padding."""
        is_padding = ids.numel() == 0
        rows = torch.zeros(1, dtype=torch.int64) if is_padding else ids
        inputs, targets = (converted(column, self._dtype) for column in self._columns.take(rows.numpy()))
        return Batch(inputs.to(self._device), targets.to(self._device), is_padding)


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

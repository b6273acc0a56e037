"""Which rows belong to an update: a pure function of its position, the same for any number of ranks.

A *position* counts attempted updates of the whole run from 0. An epoch's rows stand in one pseudo-random order;
each position takes the next `global_batch` of them, each rank a contiguous share of these. No table is kept, so
that any position of any size of data set is reached in constant time and memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6  # of the Feistel network; even, so that both halves are mixed equally often


def permutation_key(seed: int, epoch: int, stream: str = "train") -> int:
    """Return a 64-bit key that is unrelated between seeds, epochs and streams; a stream names one use of a seed."""
    digest = hashlib.blake2b(f"{stream}/{seed}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(indices: NDArray[np.int64], *, size: int, key: int) -> NDArray[np.int64]:
    """Return where a pseudo-random permutation of range(size) sends each index, without a table.

    Args:
        indices: (n,) each in 0..size-1.
        size: number of things permuted, 1 to 2**62.
        key: 64 bits that choose the permutation; see `permutation_key`.
    Returns:
        (n,) each in 0..size-1; different for different indices.
    Source: cycle walking over a Feistel network, Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    assert 1 <= size <= 2**62, f"a permutation of {size} things was asked for"
    # An index outside would walk a cycle that never comes back into range.
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() < size), "an index is outside the permutation"
    num_bits = (size - 1).bit_length()
    round_keys = _mix(np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(key))
    values = _feistel(indices.astype(np.uint64), num_bits, round_keys)
    walking = np.flatnonzero(values >= size)
    while walking.size:  # fewer than half of them each time on average
        moved = _feistel(values[walking], num_bits, round_keys)
        values[walking] = moved
        walking = walking[moved >= size]
    return values.view(np.int64)


def _feistel(values: NDArray[np.uint64], num_bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute range(2**num_bits); the halves differ by one bit where num_bits is odd."""
    left_bits = num_bits // 2
    right_bits = num_bits - left_bits
    left_mask, right_mask = np.uint64(2**left_bits - 1), np.uint64(2**right_bits - 1)
    left, right = values >> np.uint64(right_bits), values & right_mask
    for right_key, left_key in round_keys.reshape(-1, 2):
        right ^= _mix(left + right_key) & right_mask
        left ^= _mix(right + left_key) & left_mask
    return (left << np.uint64(right_bits)) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Overwrite with the splitmix64 finaliser (Steele, Lea and Flood 2014)."""
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    x ^= x >> 31
    return x


class RowOrder(Protocol):
    """Which row stands at each place of an epoch, where it is not every row once in one random order."""

    def at(self, places: NDArray[np.int64], *, epoch: int) -> NDArray[np.int64]:
        """Return the row at each of some places, (n,) each in 0..N-1, whatever else is asked for."""
        ...


class BalancedRows:
    """Puts rows of every class, equally often, in the places of an epoch; keeps the rows by class, and no position.

    In an epoch of N places each of C classes has N/C of them, and each row of a class as many as any other of it, to
    within one. So the rows of a large class are a sample, another one each epoch, those of a small class come again.

    Args:
        labels: (N,) class of each row.
    """

    def __init__(self, labels: NDArray[np.int64], *, seed: int) -> None:
        self._num_rows = len(labels)
        counts = np.bincount(labels)
        firsts = np.cumsum(counts) - counts
        self._classes = [(int(firsts[label]), int(counts[label]), int(label)) for label in np.flatnonzero(counts)]
        self._rows_by_class = np.argsort(labels, kind="stable")
        self._seed = seed

    def at(self, places: NDArray[np.int64], *, epoch: int) -> NDArray[np.int64]:
        """Return the row at each of some places, as of `RowOrder`."""
        places = permute(places, size=self._num_rows, key=permutation_key(self._seed, epoch))
        class_of, turns = places % len(self._classes), places // len(self._classes)
        rows = np.empty_like(places)
        for index, (first, count, label) in enumerate(self._classes):
            mine = np.flatnonzero(class_of == index)
            key = permutation_key(self._seed, epoch, f"class {label}")
            rows[mine] = self._rows_by_class[first + permute(turns[mine] % count, size=count, key=key)]
        return rows


class ShardedRows:
    """Every row once an epoch, a shard of rows after another: shards and the rows in each in pseudo-random order.

    Args:
        rows_per_shard: (S,) rows number through the shards.
    """

    def __init__(self, rows_per_shard: NDArray[np.int64], *, seed: int) -> None:
        self._counts, self._seed = rows_per_shard, seed
        self._firsts = np.cumsum(rows_per_shard) - rows_per_shard

    def at(self, places: NDArray[np.int64], *, epoch: int) -> NDArray[np.int64]:
        """Return the row at each of some places, as of `RowOrder`."""
        num_shards = len(self._counts)
        shards = permute(np.arange(num_shards), size=num_shards, key=permutation_key(self._seed, epoch, "shards"))
        ends = np.cumsum(self._counts[shards])
        turns = np.searchsorted(ends, places, side="right")
        rows = np.empty_like(places)
        for turn in np.unique(turns):
            shard, mine = shards[turn], np.flatnonzero(turns == turn)
            count = int(self._counts[shard])
            key = permutation_key(self._seed, epoch, f"shard {shard}")
            within = places[mine] - (ends[turn] - count)
            rows[mine] = self._firsts[shard] + permute(within, size=count, key=key)
        return rows


def random_bits(places: NDArray[np.int64], *, key: int) -> NDArray[np.uint64]:
    """Return 64 pseudo-random bits for each place, (n,), whatever else is asked for."""
    return _mix(places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(key))


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Divides every epoch into global batches, these into one share a rank, these into micro-batches.

    An epoch has every row exactly once (where it is balanced, as many rows): its last global batch has those that
    remain. The ranks' sample ids, one rank after another, are the same global batch in the same order at any world
    size and micro-batch.
    """

    num_rows: int
    global_batch: int
    """Rows of one update over all ranks."""
    world_size: int
    micro_batch: int | None
    """Rows of one forward and backward on one rank; None is a rank's whole share."""
    seed: int
    order: RowOrder | None = None
    """None is every row once, in one pseudo-random order."""

    def __post_init__(self) -> None:
        sizes = (self.num_rows, self.global_batch, self.world_size, self.micro_batch or 1)
        assert min(sizes) >= 1, f"a plan wants positive sizes, not {self}"

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch, the smaller last one included."""
        return -(-self.num_rows // self.global_batch)

    def epoch_of(self, position: int) -> int:
        """Return the epoch a position lies in, from 0."""
        return position // self.steps_per_epoch

    def rows_at(self, position: int) -> int:
        """Return the rows of one global batch, over all ranks."""
        return min(self.global_batch, self.num_rows - self._start(position))

    def samples_before(self, position: int) -> int:
        """Return the rows of all global batches before this one, over all ranks and epochs."""
        return self.epoch_of(position) * self.num_rows + self._start(position)

    def share(self, position: int, rank: int) -> tuple[int, int]:
        """Return (start, stop) of a rank's rows as offsets within the epoch; shares differ by one row at most."""
        start, rows = self._start(position), self.rows_at(position)
        return start + rank * rows // self.world_size, start + (rank + 1) * rows // self.world_size

    def micro_batches(self, position: int, rank: int) -> list[tuple[int, int]]:
        """Return (start, stop) of a rank's micro-batches as offsets within the epoch.

        Every rank has the same number of them, at least one; where a rank has fewer rows than another the last
        ones may be empty (start == stop).
        """
        start, stop = self.share(position, rank)
        largest_share = -(-self.rows_at(position) // self.world_size)
        size = self.micro_batch or largest_share
        firsts = range(start, start + largest_share, size)
        return [(min(first, stop), min(first + size, stop)) for first in firsts]

    def places(self, position: int, rank: int, *, num_positions: int = 1) -> NDArray[np.int64]:
        """Return where in the epoch a rank's shares of `num_positions` of its updates lie, one after another."""
        assert self.epoch_of(position) == self.epoch_of(position + num_positions - 1), (
            "these positions are not of one epoch"
        )
        return np.concatenate([np.arange(*self.share(p, rank)) for p in range(position, position + num_positions)])

    def sample_ids(self, position: int, rank: int, *, num_positions: int = 1) -> NDArray[np.int64]:
        """Return the row numbers of a rank's shares of `num_positions` updates of one epoch, one after another.

        An id costs tens of nanoseconds in blocks of 65,536 and microseconds in blocks of 64.
        """
        epoch = self.epoch_of(position)
        places = self.places(position, rank, num_positions=num_positions)
        if self.order is not None:
            return self.order.at(places, epoch=epoch)
        return permute(places, size=self.num_rows, key=permutation_key(self.seed, epoch))

    def _start(self, position: int) -> int:
        return position % self.steps_per_epoch * self.global_batch

"""Which rows belong to an update: a pure function of its position, the same for any number of ranks.

A *position* counts attempted updates of the whole run from 0. An epoch's rows stand in one pseudo-random order;
each position takes the next `global_batch` of them, each rank a contiguous share of these. No table is kept, so
that any position of any size of data set is reached in constant time and memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harness.rows.lengths import lengths_digest

NUM_ROUNDS = 6  # of the Feistel network; even, so that both halves are mixed equally often
WINDOW_BATCHES = 64
"""Global batches whose rows are sorted by length together, at most; a quarter of an epoch if that is fewer."""


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


class InOrder:
    """Every row where it stands."""

    def at(self, places: NDArray[np.int64], *, epoch: int) -> NDArray[np.int64]:
        """Return the row at each of some places, as of `RowOrder`."""
        return places


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


class RowsByLength:
    """Every row once an epoch, rows of about one length together, batches of short and of long ones in random order.

    The rows of an epoch, in pseudo-random order, are cut into windows of whole global batches. Those of a window are
    sorted, the longest first (equal ones as they stood), cut into global batches, and these are put in pseudo-random
    order; the last batch of the epoch, if it is smaller, stays the last. An update takes as long as the longest of its
    shares whichever rank that is, so rows stay sorted within a global batch: then shares and micro-batches, which
    are contiguous pieces of it, have rows of about one length as well.

    An epoch of F whole batches has max(4, F / 64) windows, rounded up, as equal as can be: so one has 64 batches at
    most, about a quarter of the epoch at most, and an epoch of 4 batches or fewer is mixed as without lengths.

    Args:
        lengths: (N,) of each row.
        global_batch: rows of one update over all ranks.
    """

    def __init__(self, lengths: NDArray[np.int64], *, global_batch: int, seed: int) -> None:
        self._num_rows, self._global_batch, self._seed = len(lengths), global_batch, seed
        # By how much each is shorter than the longest, in few bytes: numpy sorts numbers of 16 bits the quicker way.
        longest = int(lengths.max())
        self._shorter_by = (longest - lengths).astype(np.min_scalar_type(longest))
        self._num_batches = len(lengths) // global_batch  # whole ones
        self._num_windows = max(min(4, self._num_batches), -(-self._num_batches // WINDOW_BATCHES))
        self.facts = {"window_batches": WINDOW_BATCHES, "lengths": lengths_digest(lengths)}
        """What decides the order besides seed and global batch."""
        self._last = (-1, -1, np.empty(0, np.int64))  # epoch, window, rows: only so as not to sort them twice in a row

    def at(self, places: NDArray[np.int64], *, epoch: int) -> NDArray[np.int64]:
        """Return the row at each of some places, as of `RowOrder`; a window of rows is held at a time."""
        windows = self._windows_of(places)
        by_window = np.argsort(windows, kind="stable")
        found, firsts = np.unique(windows[by_window], return_index=True)
        rows = np.empty_like(places)
        for window, mine in zip(found.tolist(), np.split(by_window, firsts[1:]), strict=True) if len(places) else ():
            rows[mine] = self._rows_of(window, epoch)[places[mine] - self._start(window)]
        return rows

    def _windows_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the window of each place; that of a smaller last batch comes after all others."""
        batches = places // self._global_batch
        if self._num_batches == 0:
            return batches
        windows = ((batches + 1) * self._num_windows - 1) // self._num_batches  # the inverse of _start
        return np.where(batches < self._num_batches, windows, self._num_windows)

    def _start(self, window: int) -> int:
        """Return the first place of a window, or where the smaller last batch begins."""
        if self._num_batches == 0:
            return 0
        return window * self._num_batches // self._num_windows * self._global_batch

    def _rows_of(self, window: int, epoch: int) -> NDArray[np.int64]:
        """Return the rows of a window in the order of their places."""
        last_epoch, last_window, rows = self._last
        if (last_epoch, last_window) == (epoch, window):
            return rows
        is_last_batch = window == self._num_windows
        stop = self._num_rows if is_last_batch else self._start(window + 1)
        places = np.arange(self._start(window), stop)
        rows = permute(places, size=self._num_rows, key=permutation_key(self._seed, epoch))
        rows = rows[np.argsort(self._shorter_by[rows], kind="stable")]
        if not is_last_batch:
            batches = rows.reshape(-1, self._global_batch)
            key = permutation_key(self._seed, epoch, f"window {window}")
            rows = batches[permute(np.arange(len(batches)), size=len(batches), key=key)].ravel()
        self._last = (epoch, window, rows)
        return rows


class TokenLimit:
    """How large a micro-batch may be, padding included: its rows times the length of the longest of them.

    Args:
        lengths: (N,) of each row, none above `max_tokens`.
    """

    def __init__(self, lengths: NDArray[np.int64], max_tokens: int) -> None:
        longest = int(lengths.max())
        assert longest <= max_tokens, f"a row of {longest} tokens is in no micro-batch of {max_tokens}"
        self.lengths, self.max_tokens = lengths, max_tokens
        self.rows_that_always_fit = max_tokens // longest

    def sizes(self, rows: NDArray[np.int64]) -> list[int]:
        """Return how many of some rows, in their order, are in each micro-batch: each has as many as fit."""
        max_tokens = self.max_tokens
        firsts = [0] if len(rows) else []  # of each micro-batch, which of `rows`
        first = longest = most = 0
        for place, length in enumerate(self.lengths[rows].tolist()):
            if length > longest:
                longest, most = length, max_tokens // length
            if place - first >= most:
                firsts.append(place)
                first, longest, most = place, length, max_tokens // length
        return [stop - start for start, stop in pairwise([*firsts, len(rows)])]


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
    token_limit: TokenLimit | None = None
    """Of a forward and backward on one rank, in the place of `micro_batch`: then their number follows from the rows."""

    def __post_init__(self) -> None:
        sizes = (self.num_rows, self.global_batch, self.world_size, self.micro_batch or 1)
        assert min(sizes) >= 1, f"a plan wants positive sizes, not {self}"
        assert self.micro_batch is None or self.token_limit is None, "a micro-batch has one measure"

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
        if self.token_limit is not None:
            [sizes] = self.micro_batch_sizes(position, rank)
            stops = list(accumulate(sizes, initial=start))
            return list(pairwise(stops))
        largest_share = -(-self.rows_at(position) // self.world_size)
        size = self.micro_batch or largest_share
        firsts = range(start, start + largest_share, size)
        return [(min(first, stop), min(first + size, stop)) for first in firsts]

    def micro_batch_sizes(self, position: int, rank: int, *, num_positions: int = 1) -> list[list[int]]:
        """Return the rows of each of a rank's micro-batches, for each of `num_positions` updates of one epoch.

        With a limit of tokens the rows of all ranks are looked at, 60 ns each: a rank has as many micro-batches as the
        one that needs most, and the last of them may be empty.
        """
        last = position + num_positions - 1
        if self.token_limit is None:  # all alike but for the last of an epoch
            first_sizes, last_sizes = (
                [stop - start for start, stop in self.micro_batches(one, rank)] for one in (position, last)
            )
            return [*[first_sizes] * (num_positions - 1), last_sizes]
        start = self._start(position)
        rows = self._rows_at(np.arange(start, self._start(last) + self.rows_at(last)), epoch=self.epoch_of(position))
        found = []
        for one in range(position, last + 1):
            shares = [self.share(one, other) for other in range(self.world_size)]
            of_ranks = [self.token_limit.sizes(rows[first - start : stop - start]) for first, stop in shares]
            num_empty = max(map(len, of_ranks)) - len(of_ranks[rank])
            found.append(of_ranks[rank] + [0] * num_empty)
        return found

    @property
    def most_micro_batches(self) -> int:
        """Micro-batches of one update that no update has more of."""
        largest_share = -(-self.global_batch // self.world_size)
        rows = self.token_limit.rows_that_always_fit if self.token_limit else self.micro_batch or largest_share
        return -(-largest_share // rows)

    @property
    def rows_looked_at(self) -> int:
        """Rows of one update that a rank has to know the numbers of, at most: its own, or those of all ranks."""
        return self.global_batch if self.token_limit else -(-self.global_batch // self.world_size)

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
        places = self.places(position, rank, num_positions=num_positions)
        return self._rows_at(places, epoch=self.epoch_of(position))

    def _rows_at(self, places: NDArray[np.int64], *, epoch: int) -> NDArray[np.int64]:
        if self.order is not None:
            return self.order.at(places, epoch=epoch)
        return permute(places, size=self.num_rows, key=permutation_key(self.seed, epoch))

    def _start(self, position: int) -> int:
        return position % self.steps_per_epoch * self.global_batch

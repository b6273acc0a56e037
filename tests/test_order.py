"""The order of rows: a permutation an epoch, divided among any number of ranks without loss."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from harness.rows.order import BalancedRows, BatchPlan, RowsByLength, TokenLimit, permutation_key, permute

unhurried = settings(deadline=None)  # the machine may be busy


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Plans of all kinds of order and of micro-batch, for rows of which some are long."""
    num_rows, global_batch, seed = draw(st.integers(1, 300)), draw(st.integers(1, 64)), draw(st.integers(0, 5))
    lengths = lengths_of_rows(num_rows, longest=draw(st.sampled_from([1, 3, 40, 70_000])), seed=seed)
    by_length = RowsByLength(lengths, global_batch=global_batch, seed=seed)
    limits = st.builds(TokenLimit, st.just(lengths), st.integers(0, 20).map(lambda k: int(lengths.max() * (1 + k / 3))))
    rows, limit = draw(st.one_of(st.tuples(st.none() | st.integers(1, 20), st.none()), st.tuples(st.none(), limits)))
    return BatchPlan(
        num_rows=num_rows,
        global_batch=global_batch,
        world_size=draw(st.integers(1, 9)),
        micro_batch=rows,
        seed=seed,
        order=draw(st.sampled_from([None, by_length])),
        token_limit=limit,
    )


def lengths_of_rows(num_rows: int, *, longest: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths of 1 to `longest`, most of them short."""
    return np.ceil(longest * np.random.default_rng(seed).random(num_rows) ** 3).astype(np.int64).clip(1)


def global_ids(plan: BatchPlan, position: int) -> list[int]:
    return [i for rank in range(plan.world_size) for i in plan.sample_ids(position, rank).tolist()]


def epoch_ids(plan: BatchPlan, epoch: int) -> list[int]:
    steps = plan.steps_per_epoch
    return [i for position in range(epoch * steps, (epoch + 1) * steps) for i in global_ids(plan, position)]


# ---------------------------------------------------------------- permute


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_every_size_to_300_is_permuted_one_to_one(key: int) -> None:
    for size in range(1, 301):
        assert sorted(permute(np.arange(size), size=size, key=key)) == list(range(size))


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 2**40, 2**48 + 1, 2**62])
def test_a_block_of_a_huge_range_is_sent_to_different_places_in_range(size: int) -> None:
    start = size - 2**16
    images = permute(np.arange(start, size), size=size, key=7)
    assert len(np.unique(images)) == len(images)
    assert images.min() >= 0
    assert images.max() < size


def test_an_index_is_sent_to_the_same_place_whatever_else_is_asked_for() -> None:
    whole = permute(np.arange(1000), size=1000, key=3)
    assert [permute(np.array([i]), size=1000, key=3)[0] for i in range(1000)] == whole.tolist()


def test_ten_indices_of_a_huge_range_cost_neither_time_nor_memory() -> None:
    tracemalloc.start()
    began = time.perf_counter()
    permute(np.arange(10), size=2**40, key=1)
    seconds, (_, peak_bytes) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000
    assert seconds < 1


def test_nothing_is_permuted_into_nothing() -> None:
    assert permute(np.arange(0), size=5, key=1).tolist() == []


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_the_range_is_our_bug_and_not_an_endless_walk(index: int) -> None:
    with pytest.raises(AssertionError, match="outside"):
        permute(np.array([index]), size=5, key=1)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 10, 16, 17])
def test_over_keys_every_index_goes_everywhere_equally_often(size: int) -> None:
    num_keys = 2000
    images = np.stack([permute(np.arange(size), size=size, key=permutation_key(key, 0)) for key in range(num_keys)])
    counts = np.stack([np.bincount(images[:, index], minlength=size) for index in range(size)])
    expected = num_keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2  # rows and columns of `counts` all sum to num_keys
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # mean and five standard deviations


def test_over_keys_neighbours_end_equally_often_at_every_distance() -> None:
    size, num_keys = 16, 4000
    pairs = np.stack([permute(np.array([4, 5]), size=size, key=permutation_key(key, 1)) for key in range(num_keys)])
    counts = np.bincount((pairs[:, 1] - pairs[:, 0]) % size, minlength=size)[1:]
    expected = num_keys / (size - 1)
    assert ((counts - expected) ** 2 / expected).sum() < 14 + 5 * np.sqrt(2 * 14)


def test_keys_differ_between_seeds_epochs_and_streams() -> None:
    keys = [permutation_key(seed, epoch, stream) for seed in (0, 1, 11) for epoch in (0, 1, 11) for stream in "ab"]
    assert len(set(keys)) == len(keys)


def test_different_seeds_and_epochs_give_different_orders() -> None:
    plan = BatchPlan(num_rows=100, global_batch=10, world_size=2, micro_batch=None, seed=1)
    other = BatchPlan(num_rows=100, global_batch=10, world_size=2, micro_batch=None, seed=2)
    orders = [tuple(epoch_ids(p, epoch)) for p in (plan, other) for epoch in (0, 1)]
    assert len({*orders, tuple(range(100))}) == 5


# ---------------------------------------------------------------- BatchPlan


@unhurried
@given(plans(), st.integers(0, 3))
def test_over_an_epoch_every_row_comes_exactly_once(plan: BatchPlan, epoch: int) -> None:
    assert sorted(epoch_ids(plan, epoch)) == list(range(plan.num_rows))


@unhurried
@given(plans(), st.integers(0, 500))
def test_any_number_of_ranks_sees_the_same_global_batch_in_the_same_order(plan: BatchPlan, position: int) -> None:
    alone = replace(plan, world_size=1, micro_batch=None, token_limit=None)
    assert global_ids(plan, position) == global_ids(alone, position)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_over_an_epoch_2_4_and_8_ranks_see_the_order_of_one(world_size: int) -> None:
    orders = [
        epoch_ids(BatchPlan(num_rows=1003, global_batch=64, world_size=w, micro_batch=4, seed=42), epoch=1)
        for w in (1, world_size)
    ]
    assert orders[0] == orders[1]


@unhurried
@given(plans(), st.integers(0, 500))
def test_shares_follow_each_other_and_differ_by_one_row_at_most(plan: BatchPlan, position: int) -> None:
    shares = [plan.share(position, rank) for rank in range(plan.world_size)]
    assert all(left[1] == right[0] for left, right in pairwise(shares))
    assert shares[-1][1] - shares[0][0] == plan.rows_at(position)
    lengths = [stop - start for start, stop in shares]
    assert max(lengths) - min(lengths) <= 1


@unhurried
@given(plans(), st.integers(0, 500))
def test_micro_batches_are_a_rank_s_share_in_pieces_as_many_on_every_rank(plan: BatchPlan, position: int) -> None:
    pieces = [plan.micro_batches(position, rank) for rank in range(plan.world_size)]
    assert len({len(of_rank) for of_rank in pieces}) == 1
    for rank, of_rank in enumerate(pieces):
        rows = [row for start, stop in of_rank for row in range(start, stop)]
        assert rows == list(range(*plan.share(position, rank)))
        assert all(stop - start <= (plan.micro_batch or plan.global_batch) for start, stop in of_rank)
        assert len(of_rank) <= plan.most_micro_batches
    assert any(of_rank[-1][0] < of_rank[-1][1] for of_rank in pieces), "a micro-batch is empty on every rank"


@unhurried
@given(plans(), st.integers(0, 500))
def test_samples_are_counted_as_they_are_seen(plan: BatchPlan, position: int) -> None:
    assert plan.samples_before(position) == sum(plan.rows_at(earlier) for earlier in range(position))
    assert plan.epoch_of(position) == plan.samples_before(position) // plan.num_rows


@unhurried
@given(plans(), st.integers(0, 500), st.integers(1, 500))
def test_ids_of_many_positions_are_those_of_each(plan: BatchPlan, position: int, num_positions: int) -> None:
    end_of_epoch = (plan.epoch_of(position) + 1) * plan.steps_per_epoch
    num_positions = min(num_positions, end_of_epoch - position)
    ids = plan.sample_ids(position, 0, num_positions=num_positions)
    each = [plan.sample_ids(p, 0) for p in range(position, position + num_positions)]
    assert ids.tolist() == np.concatenate(each).tolist()


@unhurried
@given(plans(), st.integers(0, 500), st.integers(1, 500), st.integers(0, 8))
def test_sizes_of_the_micro_batches_of_many_positions_are_those_of_each(
    plan: BatchPlan, position: int, num_positions: int, rank: int
) -> None:
    end_of_epoch = (plan.epoch_of(position) + 1) * plan.steps_per_epoch
    num_positions, rank = min(num_positions, end_of_epoch - position), rank % plan.world_size
    each = [plan.micro_batches(p, rank) for p in range(position, position + num_positions)]
    sizes = [[stop - start for start, stop in pieces] for pieces in each]
    assert plan.micro_batch_sizes(position, rank, num_positions=num_positions) == sizes


def test_a_position_far_away_costs_no_more_than_the_first() -> None:
    plan = BatchPlan(num_rows=2**40, global_batch=1024, world_size=8, micro_batch=None, seed=0)
    assert len(plan.sample_ids(10**12, rank=7)) == 128


def test_positions_of_two_epochs_are_not_asked_for_at_once() -> None:
    plan = BatchPlan(num_rows=10, global_batch=4, world_size=1, micro_batch=None, seed=0)
    with pytest.raises(AssertionError, match="one epoch"):
        plan.sample_ids(2, 0, num_positions=2)


@pytest.mark.parametrize("name", ["num_rows", "global_batch", "world_size"])
def test_a_plan_of_nothing_is_our_bug(name: str) -> None:
    sizes_of_one = {"num_rows": 1, "global_batch": 1, "world_size": 1}
    with pytest.raises(AssertionError, match="positive"):
        BatchPlan(**(sizes_of_one | {name: 0}), micro_batch=None, seed=0)


# ---------------------------------------------------------------- balanced


LABELS = np.repeat([0, 1, 3], [90, 7, 1])[permute(np.arange(98), size=98, key=1)]  # class 2 has no row


def balanced(
    *, world_size: int = 1, micro_batch: int | None = None, global_batch: int = 16, seed: int = 5
) -> BatchPlan:
    order = BalancedRows(LABELS, seed=seed)
    return BatchPlan(
        num_rows=98,
        global_batch=global_batch,
        world_size=world_size,
        micro_batch=micro_batch,
        seed=seed,
        order=order,
    )


def test_a_balanced_epoch_has_every_class_and_every_row_of_a_class_equally_often_to_within_one() -> None:
    for epoch in range(5):
        rows = np.array(epoch_ids(balanced(), epoch))
        assert len(rows) == 98
        assert sorted(np.bincount(LABELS[rows])) == [0, 32, 33, 33]
        times = np.bincount(rows, minlength=98)
        for label in (0, 1, 3):
            assert np.ptp(times[label == LABELS]) <= 1


def test_a_large_class_is_sampled_anew_each_epoch_until_all_of_it_was_seen() -> None:
    plan = balanced()
    seen: list[set[int]] = [{row for row in epoch_ids(plan, epoch) if LABELS[row] == 0} for epoch in range(40)]
    assert seen[0] != seen[1]
    assert set.union(*seen) == set(np.flatnonzero(LABELS == 0).tolist())


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, None), (4, 1), (8, 2)])
def test_balanced_batches_are_the_same_at_any_number_of_ranks(world_size: int, micro_batch: int | None) -> None:
    alone, together = balanced(), balanced(world_size=world_size, micro_batch=micro_batch)
    for position in range(2 * alone.steps_per_epoch):
        assert global_ids(together, position) == global_ids(alone, position)


def test_a_balanced_row_follows_from_its_position_alone() -> None:
    plan = balanced()
    whole = plan.sample_ids(plan.steps_per_epoch, 0, num_positions=plan.steps_per_epoch).tolist()
    steps = plan.steps_per_epoch
    backwards = [global_ids(plan, position) for position in range(2 * steps - 1, steps - 1, -1)]
    assert [row for batch in reversed(backwards) for row in batch] == whole


def test_the_classes_of_a_balanced_epoch_come_in_no_order() -> None:
    rows = balanced(global_batch=1)
    labels = LABELS[np.array(epoch_ids(rows, 0))]
    repeats = sum(before == after for before, after in pairwise(labels.tolist()))
    assert 15 < repeats < 50  # a third of 97 on average
    assert epoch_ids(balanced(seed=6), 0) != epoch_ids(balanced(), 0)

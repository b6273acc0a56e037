"""Rows in the order of their lengths, and micro-batches by tokens: pure functions of lengths, seed and epoch."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from harness.errors import ConfigError
from harness.fits import check_batch_norm, check_padding, check_sync_batch_norm
from harness.rows import order
from harness.rows.batches import ValidationBatches
from harness.rows.order import WINDOW_BATCHES, BatchPlan, RowsByLength, TokenLimit
from harness.rows.rows import Columns
from tests.test_order import global_ids, lengths_of_rows, plans, unhurried


def by_length(
    lengths: NDArray[np.int64],
    *,
    global_batch: int = 8,
    world_size: int = 1,
    max_tokens: int | None = None,
    seed: int = 3,
) -> BatchPlan:
    return BatchPlan(
        num_rows=len(lengths),
        global_batch=global_batch,
        world_size=world_size,
        micro_batch=None,
        seed=seed,
        order=RowsByLength(lengths, global_batch=global_batch, seed=seed),
        token_limit=None if max_tokens is None else TokenLimit(lengths, max_tokens),
    )


def batches_of(plan: BatchPlan, epoch: int = 0) -> list[list[int]]:
    steps = plan.steps_per_epoch
    return [global_ids(plan, position) for position in range(epoch * steps, (epoch + 1) * steps)]


def padding(lengths: NDArray[np.int64], batches: list[list[int]]) -> int:
    """Tokens that are added where each batch is padded to its longest row."""
    return int(sum(lengths[rows].max() * len(rows) - lengths[rows].sum() for rows in batches))


def assert_is_a_plan(plan: BatchPlan, epoch: int) -> None:
    """Hold all that is promised of an epoch of a plan, on all ranks."""
    alone = replace(plan, world_size=1, micro_batch=None, token_limit=None)
    seen: list[int] = []
    for position in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        rows = global_ids(plan, position)
        assert rows == global_ids(alone, position), "another number of ranks sees other rows"
        seen += rows
        sizes = [plan.micro_batch_sizes(position, rank)[0] for rank in range(plan.world_size)]
        assert len({len(of_rank) for of_rank in sizes}) == 1, "a rank has more micro-batches than another"
        assert any(of_rank[-1] for of_rank in sizes), "a micro-batch is empty on every rank"
        for rank, of_rank in enumerate(sizes):
            assert_fills_its_limit(plan, plan.sample_ids(position, rank), of_rank)
    assert sorted(seen) == list(range(plan.num_rows)), "an epoch is not every row once"


def assert_fills_its_limit(plan: BatchPlan, rows: NDArray[np.int64], sizes: list[int]) -> None:
    assert sum(sizes) == len(rows)
    if (limit := plan.token_limit) is None:
        assert all(size <= (plan.micro_batch or plan.global_batch) for size in sizes)
        return
    start = 0
    for size in filter(None, sizes):
        assert size * limit.lengths[rows[start : start + size]].max() <= limit.max_tokens
        if start + size < len(rows):
            assert (size + 1) * limit.lengths[rows[start : start + size + 1]].max() > limit.max_tokens, "one more fits"
        start += size


@settings(unhurried, max_examples=200)
@given(plans(), st.integers(0, 3))
def test_every_row_comes_once_an_epoch_in_micro_batches_within_their_limit_as_many_on_every_rank(
    plan: BatchPlan, epoch: int
) -> None:
    assert_is_a_plan(plan, epoch)


@pytest.mark.long
@settings(unhurried, max_examples=5_000)
@given(plans(), st.integers(0, 1000))
def test_five_thousand_plans_see_every_row_once_an_epoch(plan: BatchPlan, epoch: int) -> None:
    assert_is_a_plan(plan, epoch)


# ---------------------------------------------------------------- order


@unhurried
@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 90), st.integers(0, 9))
def test_sorting_a_window_leaves_at_most_one_batch_of_the_longest_rows_as_padding(
    num_rows: int, global_batch: int, longest: int, epoch: int
) -> None:
    # In a sorted window of batches of B rows each batch is padded by at most B (first - last), and these differences
    # add up to at most the longest less the shortest row of it; the same holds of the smaller last batch.
    lengths = lengths_of_rows(num_rows, longest=longest)
    num_batches = num_rows // global_batch
    num_windows = max(min(4, num_batches), -(-num_batches // WINDOW_BATCHES)) + (num_rows % global_batch > 0)
    found = padding(lengths, batches_of(by_length(lengths, global_batch=global_batch), epoch))
    assert found <= num_windows * global_batch * (lengths.max() - lengths.min())


def test_of_two_lengths_a_window_mixes_one_batch_and_by_chance_almost_all_are_mixed() -> None:
    lengths = np.where(np.arange(64_000) % 2 == 0, 100, 10)
    plan = by_length(lengths, global_batch=10)  # 6,400 batches in 100 windows
    by_chance = replace(plan, order=None)
    mixed = [sum(len(set(lengths[rows])) == 2 for rows in batches_of(of)) for of in (plan, by_chance)]
    assert mixed[0] <= 100
    assert mixed[1] == pytest.approx(6400 * (1 - 2 * 0.5**10), abs=6 * (6400 * 2 * 0.5**10) ** 0.5)


def test_rows_of_a_batch_stand_from_long_to_short_so_that_shares_and_micro_batches_are_of_about_one_length() -> None:
    lengths = lengths_of_rows(1003, longest=300)
    for rows in batches_of(by_length(lengths)):
        assert lengths[rows].tolist() == sorted(lengths[rows], reverse=True)


def test_batches_of_a_window_come_in_no_order_and_the_smaller_last_batch_comes_last() -> None:
    lengths = lengths_of_rows(8 * 64 * 2 + 5, longest=300)
    plan = by_length(lengths)
    for epoch in range(3):
        batches = batches_of(plan, epoch)
        assert [len(rows) for rows in batches] == [8] * 128 + [5]
        firsts = [int(lengths[rows[0]]) for rows in batches[:128]]
        rises = sum(after > before for before, after in pairwise(firsts))
        assert 40 < rises < 88, "half of 127 on average"


def test_a_small_epoch_is_mixed_in_quarters_and_one_of_four_batches_as_without_lengths() -> None:
    lengths = np.arange(1, 8 * 16 + 1)
    sets = [
        {row for rows in batches_of(by_length(lengths))[first : first + 4] for row in rows} for first in (0, 4, 8, 12)
    ]
    for of_quarter in sets:
        assert lengths[list(of_quarter)].min() < 32
        assert lengths[list(of_quarter)].max() > 96
    few = lengths[:32]
    uniform = replace(by_length(few), order=None)
    assert [set(rows) for rows in batches_of(by_length(few))] == [set(rows) for rows in batches_of(uniform)]


def test_rows_of_one_length_stand_in_a_batch_as_they_stand_without_lengths() -> None:
    plan = by_length(np.full(8 * 64, 5))
    found, uniform = (sorted(batches_of(of)) for of in (plan, replace(plan, order=None)))
    assert found == uniform


def test_other_epochs_and_seeds_make_other_batches() -> None:
    lengths = lengths_of_rows(512, longest=300)
    found = [
        frozenset(frozenset(rows) for rows in batches_of(by_length(lengths, seed=seed), epoch))
        for seed, epoch in ((3, 0), (3, 1), (4, 0))
    ]
    assert found[0] != found[1] != found[2] != found[0]
    assert len(found[0] & found[1]) < 8, "of 64 batches"


@unhurried
@given(st.integers(1, 300), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_row_follows_from_its_place_whatever_was_asked_for_before(
    num_rows: int, global_batch: int, chance: random.Random
) -> None:
    lengths = lengths_of_rows(num_rows, longest=50)
    asked = RowsByLength(lengths, global_batch=global_batch, seed=1)
    whole = {
        epoch: RowsByLength(lengths, global_batch=global_batch, seed=1).at(np.arange(num_rows), epoch=epoch)
        for epoch in (0, 7)
    }
    for _ in range(5):
        epoch, places = (
            chance.choice((0, 7)),
            np.array(chance.choices(range(num_rows), k=chance.randint(0, 20)), np.int64),
        )
        assert asked.at(places, epoch=epoch).tolist() == whole[epoch][places].tolist()


def test_a_position_far_away_looks_at_one_window_as_the_first_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = lengths_of_rows(100_000, longest=500)
    looked_at: list[int] = []
    permute = order.permute

    def counted(indices: NDArray[np.int64], *, size: int, key: int) -> NDArray[np.int64]:
        looked_at.append(len(indices))
        return permute(indices, size=size, key=key)

    monkeypatch.setattr(order, "permute", counted)
    for position in (0, 10**6, 10**12):
        looked_at.clear()
        by_length(lengths, global_batch=32, max_tokens=2000).micro_batches(position, 0)
        assert sum(looked_at) <= 32 * WINDOW_BATCHES + WINDOW_BATCHES


def test_an_order_by_length_says_what_it_follows_from() -> None:
    lengths = lengths_of_rows(50, longest=30)
    other = lengths.copy()
    other[7] += 1
    facts = [RowsByLength(of, global_batch=8, seed=0).facts for of in (lengths, lengths.copy(), other)]
    assert facts[0] == facts[1] != facts[2]
    assert facts[0]["window_batches"] == WINDOW_BATCHES


# ---------------------------------------------------------------- micro-batches by tokens


def test_a_micro_batch_has_as_many_rows_in_order_as_fit_by_the_longest_of_them() -> None:
    limit = TokenLimit(np.array([4, 4, 4, 1, 1, 6, 12, 1]), max_tokens=12)
    assert limit.sizes(np.arange(8)) == [3, 2, 1, 1, 1]  # 3 x 4, 2 x 1 (a 6 would make 18), 1 x 6, 1 x 12, 1 x 1
    assert limit.sizes(np.array([3, 4, 7, 0])) == [3, 1]
    assert limit.sizes(np.arange(0)) == []


def test_a_rank_with_short_rows_waits_with_empty_micro_batches_for_one_with_long_rows() -> None:
    plan = by_length(np.array([9, 8, 7, 6, 2, 2, 1, 1]), world_size=2, max_tokens=9)
    assert [plan.micro_batch_sizes(0, rank) for rank in (0, 1)] == [[[1, 1, 1, 1]], [[4, 0, 0, 0]]]


def test_a_limit_below_a_row_is_our_bug_and_so_are_two_measures() -> None:
    with pytest.raises(AssertionError, match="a row of 5 tokens"):
        TokenLimit(np.array([1, 5]), 4)
    with pytest.raises(AssertionError, match="one measure"):
        replace(by_length(np.array([1, 5]), max_tokens=5), micro_batch=1)


@unhurried
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 9))
def test_validation_batches_keep_to_the_limit_in_the_order_of_the_rows(
    num_rows: int, world_size: int, more: int
) -> None:
    lengths = lengths_of_rows(num_rows, longest=20)
    limit = TokenLimit(lengths, int(lengths.max()) + 5 * more)
    rows = Columns(torch.zeros(num_rows, 1), torch.arange(num_rows))
    of_ranks = [
        list(
            ValidationBatches(
                rows,
                rank=rank,
                world_size=world_size,
                batch_rows=num_rows,
                device=torch.device("cpu"),
                dtype=torch.float32,
                token_limit=limit,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1
    real = [batch.ids.tolist() for batches in of_ranks for batch in batches if not batch.is_padding]
    assert [row for ids in real for row in ids] == list(range(num_rows))
    assert all(len(ids) * lengths[ids].max() <= limit.max_tokens for ids in real)


# ---------------------------------------------------------------- what cannot have micro-batches of one row, or of none

NORM = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
LENGTHS = np.array([8, 7, 6, 5, 4, 4, 4, 2])


def test_batch_norm_is_refused_where_any_update_may_have_a_micro_batch_of_one_row() -> None:
    def forward() -> torch.Tensor:
        return torch.as_tensor(NORM(torch.zeros(1, 2)))

    with pytest.raises(ConfigError, match=r"micro_batch_tokens: .* one row in any update, and BatchNorm \(layer 1\)"):
        check_batch_norm(NORM, by_length(LENGTHS, max_tokens=16), forward)
    check_batch_norm(NORM, by_length(LENGTHS, max_tokens=64), forward)  # a share is always one micro-batch
    check_batch_norm(nn.Linear(2, 3), by_length(LENGTHS, max_tokens=16), forward)


def test_sync_batch_norm_is_refused_where_a_rank_may_have_fewer_micro_batches_than_another() -> None:
    network = nn.Sequential(nn.SyncBatchNorm(3))  # which can train on a row of several values
    with pytest.raises(ConfigError, match=r"micro_batch_tokens: .*SyncBatchNorm \(layer 0\) would wait"):
        check_sync_batch_norm(network, by_length(LENGTHS, world_size=2, max_tokens=16), converted=False)
    check_sync_batch_norm(network, by_length(LENGTHS, max_tokens=16), converted=False)
    short = BatchPlan(num_rows=33, global_batch=32, world_size=2, micro_batch=None, seed=0)
    said = "batch 2 of an epoch has 1 rows, which leaves rank 0 of 2 a micro-batch without a row, and"
    with pytest.raises(ConfigError, match=rf"{said} SyncBatchNorm \(layer 0\) would wait"):
        check_sync_batch_norm(network, short, converted=False)
    with pytest.raises(ConfigError, match=f"{said} model.sync_batch_norm would wait"):
        check_sync_batch_norm(nn.Linear(2, 3), short, converted=True)
    check_sync_batch_norm(nn.Linear(2, 3), short, converted=False)
    check_sync_batch_norm(network, replace(short, num_rows=34), converted=False)


def test_a_head_of_training_alone_is_refused_where_a_rank_may_have_fewer_micro_batches_than_another() -> None:
    two = by_length(LENGTHS, world_size=2, max_tokens=8)
    with pytest.raises(ConfigError, match=r"in any update a rank may have fewer .* head\.weight is used in training"):
        check_padding(["head.weight"], two)
    check_padding([], two)
    check_padding(["head.weight"], by_length(LENGTHS, max_tokens=8))
    check_padding(["head.weight"], by_length(LENGTHS, world_size=2, max_tokens=32))

"""Parts of a user's own, trained as plain PyTorch trains them on the whole global batch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.own import EXAMPLES as FOLDER
from tests.distributed.own import Course, Own, with_plain_pytorch, with_the_harness
from tests.distributed.ranks import run_ranks, run_standing_ranks

EXAMPLES = ("two_towers", "ragged", "two_heads", "segmentation")
FROM_DATASET = ("data.source=curves_by_row",)
PARTS = [*((name, ()) for name in EXAMPLES), ("two_heads", FROM_DATASET)]
BY_HAND = (
    f"use=[{FOLDER / 'ragged/ragged.py'},{Path(__file__).parent / 'padded_by_hand.py'}]",
    *("data.source=walks_by_hand", "data.collate=null"),
)


def ways(world_size: int) -> list[Own]:
    """Every part in both precisions, whole and in micro-batches that are not all of one size."""
    return [
        Own(example, precision=precision, micro_batch=micro_batch, overrides=overrides)
        for example, overrides in PARTS
        for precision in ("fp32", "fp64")
        for micro_batch in ((None, 2, 4)[: 1 + (world_size < 8)] if world_size < 3 else (None,))
    ]


@cache
def plain(example: str, precision: str, overrides: tuple[str, ...], num_rows: int) -> Course:
    own = Own(example, precision=precision, overrides=overrides, num_rows=num_rows)
    found: Course = run_standing_ranks(1, with_plain_pytorch, own)[0]
    return found


def assert_alike(found: Course, own: Own) -> None:
    wanted = plain(own.example, own.precision, own.overrides, own.num_rows)
    close = {"rel": 1e-12, "abs": 1e-13} if own.precision == "fp64" else {"rel": 1e-5, "abs": 1e-6}
    assert len(found.terms) == len(wanted.terms)
    for here, there in zip(found.terms, wanted.terms, strict=True):
        assert here == pytest.approx(there, **close), own
    assert found.norms == pytest.approx(wanted.norms, **close), own
    assert found.weights.keys() == wanted.weights.keys()
    for name, weights in wanted.weights.items():
        tolerance = 1e-12 if own.precision == "fp64" else 1e-5
        torch.testing.assert_close(found.weights[name], weights, rtol=0, atol=tolerance)
    assert found.scores["val/loss"] == pytest.approx(wanted.scores["val/loss"], **close), own
    assert found.scores == pytest.approx(wanted.scores, rel=1e-5, abs=1e-6), own  # plain metrics count in fp32


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_ddp_trains_parts_of_ones_own_as_plain_pytorch_does(world_size: int) -> None:
    owns = ways(world_size)
    courses = run_ranks(world_size, with_the_harness, owns, deadline_seconds=240)[0]
    for found, own in zip(courses, owns, strict=True):
        assert_alike(found, own)


def test_a_collate_of_ones_own_that_pads_alike_trains_to_the_same_bits() -> None:
    own = Own("ragged", micro_batch=4)
    found, wanted = run_standing_ranks(2, with_the_harness, [replace(own, overrides=BY_HAND), own])[0]
    assert (found.terms, found.norms, found.scores) == (wanted.terms, wanted.norms, wanted.scores)
    assert all(torch.equal(weights, found.weights[name]) for name, weights in wanted.weights.items())


def test_a_rank_without_rows_adds_nothing_to_the_weight_of_a_batch() -> None:
    own = Own("ragged", precision="fp64", num_rows=49)  # the third batch has one row
    (found,) = run_standing_ranks(2, with_the_harness, [own])[0]
    assert_alike(found, own)


def by_tokens(**settings: Any) -> list[Own]:
    """Rows of 3 to 24 steps in micro-batches of at most 40, so that an update has more of them the longer its rows.

    Of 67 rows the third batch has 19, of 235 two or three batches are sorted together.
    """
    samplings: tuple[tuple[int, tuple[str, ...]], ...] = ((67, ()), (235, ("data.sampling=by_length",)))
    return [
        Own("ragged", micro_batch_tokens=40, num_rows=num_rows, overrides=overrides, **settings)
        for num_rows, overrides in samplings
    ]


def assert_that_micro_batches_change(of_ranks: list[list[Course]], index: int) -> None:
    courses = [of_rank[index] for of_rank in of_ranks]
    assert all(course.micro_batches == courses[0].micro_batches for course in courses)
    assert len(set(courses[0].micro_batches)) > 1, "an update has as many micro-batches as any other"
    assert max(courses[0].micro_batches) > 1
    assert sum(course.num_padding for course in courses) > 0 or len(courses) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_by_tokens_train_as_plain_pytorch_does_on_whole_batches(world_size: int) -> None:
    owns = [own for precision in ("fp32", "fp64") for own in by_tokens(precision=precision)]
    of_ranks = run_ranks(world_size, with_the_harness, owns, deadline_seconds=240)
    for index, own in enumerate(owns):
        assert_alike(of_ranks[0][index], own)
        assert_that_micro_batches_change(of_ranks, index)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_accumulates_as_many_micro_batches_as_the_tokens_of_each_update_want(strategy: str) -> None:
    for own in by_tokens(strategy=strategy):
        of_ranks = run_standing_ranks(2, with_the_harness, [own])
        assert_alike(of_ranks[0][0], own)
        assert_that_micro_batches_change(of_ranks, 0)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_trains_parts_of_ones_own_as_plain_pytorch_does(strategy: str) -> None:
    owns = [Own(name, strategy=strategy, micro_batch=micro) for name in EXAMPLES for micro in (None, 4)]
    for own in owns:
        (found,) = run_standing_ranks(2, with_the_harness, [own])[0]
        assert_alike(found, own)

"""Batches of tensors: the rows that the plan says, every validation row once, padding where a rank has none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import DataError
from harness.rows import batches
from harness.rows.batches import Batch, TrainingBatches, ValidationBatches
from harness.rows.order import BatchPlan
from harness.rows.rows import Columns
from tests.test_order import plans, unhurried

CPU = torch.device("cpu")


def numbered_columns(num_rows: int) -> Columns:
    """Row r holds the input (r, -r) and the label r."""
    labels = torch.arange(num_rows)
    return Columns(torch.stack([labels, -labels], dim=1).float(), labels)


def a_plan(num_rows: int, global_batch: int, world_size: int = 1, micro_batch: int | None = None) -> BatchPlan:
    return BatchPlan(
        num_rows=num_rows, global_batch=global_batch, world_size=world_size, micro_batch=micro_batch, seed=3
    )


def training_batches(plan: BatchPlan, rank: int) -> TrainingBatches:
    return TrainingBatches(numbered_columns(plan.num_rows), plan, rank=rank, device=CPU, dtype=torch.float32)


def validation_batches(num_rows: int, rank: int, world_size: int, batch_rows: int) -> list[Batch]:
    return list(
        ValidationBatches(
            numbered_columns(num_rows),
            rank=rank,
            world_size=world_size,
            batch_rows=batch_rows,
            device=CPU,
            dtype=torch.float32,
        )
    )


def real_rows(micro_batches: list[Batch]) -> list[int]:
    return [row for batch in micro_batches if not batch.is_padding for row in batch.data["targets"].tolist()]


def assert_is_padding(batch: Batch) -> None:
    assert batch.is_padding
    assert batch.data["inputs"].tolist() == [[0, 0]], "padding is row 0"
    assert batch.data["targets"].tolist() == [0]


# ---------------------------------------------------------------- training


@unhurried
@given(plans(), st.lists(st.integers(0, 300), min_size=1, max_size=8), st.data())
def test_rows_looked_up_ahead_are_those_computed_directly_after_any_jump(
    plan: BatchPlan, positions: list[int], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, plan.world_size - 1))
    rows = training_batches(plan, rank)
    for start in positions:
        for position in (start, start + 1, start):
            found = rows.at(position)
            assert real_rows(found) == plan.sample_ids(position, rank).tolist()
            sizes = [0 if batch.is_padding else batch.num_rows for batch in found]
            assert sizes == [stop - start for start, stop in plan.micro_batches(position, rank)]


def test_ids_are_computed_again_where_a_block_ends_and_where_the_run_jumps_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "LOOK_AHEAD_ROWS", 10)
    plan = a_plan(num_rows=50, global_batch=4)  # blocks of three positions; an epoch has 13
    computed: list[int] = []
    direct = BatchPlan.sample_ids

    def counted(self: BatchPlan, position: int, rank: int, *, num_positions: int = 1) -> object:
        computed.append(num_positions)
        return direct(self, position, rank, num_positions=num_positions)

    monkeypatch.setattr(BatchPlan, "sample_ids", counted)
    rows = training_batches(plan, 0)
    seen = [real_rows(rows.at(position)) for position in [*range(14), 2]]
    assert computed == [3, 3, 3, 3, 1, 3, 3]
    assert seen == [direct(plan, position, 0).tolist() for position in [*range(14), 2]]


def test_inputs_and_targets_of_a_row_stay_together() -> None:
    [batch] = training_batches(a_plan(num_rows=20, global_batch=20), 0).at(0)
    assert batch.data["inputs"].tolist() == [[row, -row] for row in batch.data["targets"].tolist()]


def test_every_rank_has_as_many_micro_batches_and_pads_those_without_rows() -> None:
    plan = a_plan(num_rows=8, global_batch=5, world_size=3, micro_batch=1)  # shares 1 2 2, and of the last 3 rows 1 1 1
    at_first = [training_batches(plan, rank).at(0) for rank in range(3)]
    assert [[batch.is_padding for batch in of_rank] for of_rank in at_first] == [
        [False, True],
        [False] * 2,
        [False] * 2,
    ]
    assert_is_padding(at_first[0][1])
    assert [len(training_batches(plan, rank).at(1)) for rank in range(3)] == [1, 1, 1]


def test_a_rank_without_any_row_still_has_a_batch() -> None:
    plan = a_plan(num_rows=9, global_batch=8, world_size=4)
    [batch] = training_batches(plan, 0).at(1)
    assert_is_padding(batch)
    assert plan.rows_at(1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_are_converted_once_and_labels_never(dtype: torch.dtype) -> None:
    plan = a_plan(num_rows=4, global_batch=2)
    labelled = TrainingBatches(numbered_columns(4), plan, rank=0, device=CPU, dtype=dtype).at(0)[0]
    assert (labelled.data["inputs"].dtype, labelled.data["targets"].dtype) == (dtype, torch.int64)
    numbers = Columns(torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))
    regression = TrainingBatches(numbers, plan, rank=0, device=CPU, dtype=dtype).at(0)[0]
    assert (regression.data["inputs"].dtype, regression.data["targets"].dtype) == (dtype, dtype)
    assert regression.data["targets"].shape == (2, 3)


def test_a_number_too_large_for_the_type_is_refused_instead_of_becoming_infinite() -> None:
    inputs = torch.ones(4, 2, dtype=torch.float64)
    inputs[2, 1] = 1e300
    columns = Columns(inputs, torch.zeros(4, dtype=torch.int64))
    plan = a_plan(num_rows=4, global_batch=2)
    with pytest.raises(DataError, match=r"1 numbers are too large for torch\.float32, the first 1e\+300 in row 2"):
        TrainingBatches(columns, plan, rank=0, device=CPU, dtype=torch.float32)
    TrainingBatches(columns, plan, rank=0, device=CPU, dtype=torch.float64)


def test_a_plan_for_other_rows_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="plan for 5 rows met 4 rows"):
        TrainingBatches(numbered_columns(4), a_plan(5, 2), rank=0, device=CPU, dtype=torch.float32)


def test_columns_of_different_lengths_or_with_gaps_are_our_bug() -> None:
    numbers = torch.zeros(3, 2)
    with pytest.raises(AssertionError, match="as many targets"):
        Columns(numbers, torch.zeros(2))
    for inputs, targets in ((numbers[:, :1], numbers), (numbers, numbers[:, :1])):
        with pytest.raises(AssertionError, match="contiguous"):
            Columns(inputs, targets)


def test_a_digest_tells_another_number_of_rows_another_input_and_another_target_apart() -> None:
    def digest(rows: int = 5, value: float = 0.0, label: int = 0) -> str:
        inputs, targets = torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.int64)
        inputs[3, 1], targets[3] = value, label
        return Columns(inputs, targets).digest()

    assert digest() == digest()
    assert len({digest(), digest(rows=6), digest(value=1.0), digest(label=1)}) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("resident_bytes", [0, 2**30])
def test_on_a_gpu_the_same_rows_arrive_from_the_device_and_from_the_host(
    resident_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "RESIDENT_BYTES", resident_bytes)
    plan = a_plan(num_rows=8, global_batch=5, world_size=3, micro_batch=1)
    device = torch.device("cuda", 0)
    rows = TrainingBatches(numbered_columns(8), plan, rank=0, device=device, dtype=torch.float32)
    for position in (0, 1, 2, 0):
        for batch, expected in zip(rows.at(position), training_batches(plan, 0).at(position), strict=True):
            assert batch.data["inputs"].device == device
            assert torch.equal(batch.data["inputs"].cpu(), expected.data["inputs"])
            assert torch.equal(batch.data["targets"].cpu(), expected.data["targets"])
    validation = ValidationBatches(
        numbered_columns(5), rank=0, world_size=3, batch_rows=1, device=device, dtype=torch.float32
    )
    assert [batch.data["targets"].tolist() for batch in validation] == [[0], [0]]


# ---------------------------------------------------------------- validation


@unhurried
@given(st.integers(1, 120), st.integers(1, 9), st.integers(1, 40))
def test_validation_visits_every_row_once_in_order_with_as_many_batches_on_every_rank(
    num_rows: int, world_size: int, batch_rows: int
) -> None:
    ranks = [validation_batches(num_rows, rank, world_size, batch_rows) for rank in range(world_size)]
    assert [row for of_rank in ranks for row in real_rows(of_rank)] == list(range(num_rows))
    assert len({len(of_rank) for of_rank in ranks}) == 1
    assert all(len(batch.data["targets"]) <= batch_rows for of_rank in ranks for batch in of_rank)


def test_a_rank_that_runs_out_of_validation_rows_pads() -> None:
    ranks = [validation_batches(5, rank, world_size=3, batch_rows=1) for rank in range(3)]  # shares 1 2 2
    assert [[batch.is_padding for batch in of_rank] for of_rank in ranks] == [[False, True], [False] * 2, [False] * 2]
    assert_is_padding(ranks[0][1])


def test_validation_can_be_visited_again_and_says_how_many_batches_it_has() -> None:
    rows = ValidationBatches(numbered_columns(7), rank=0, world_size=1, batch_rows=3, device=CPU, dtype=torch.float32)
    assert len(rows) == 3
    assert [real_rows(list(rows)) for _ in range(2)] == [list(range(7))] * 2

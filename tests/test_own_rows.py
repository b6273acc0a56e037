"""Rows of a user's own: a Dataset asked row by row, a tree of columns, and what is refused of either."""

from __future__ import annotations

import random
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from harness.errors import DataError, RowError
from harness.rows.batches import TrainingBatches, ValidationBatches
from harness.rows.collate import stack
from harness.rows.dataset import DatasetRows
from harness.rows.lengths import lengths_of
from harness.rows.order import BatchPlan
from harness.rows.own import own_splits
from harness.rows.rows import Columns, ColumnTree
from harness.rows.tree import leaves, map_tree, paths

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "left right")


@dataclass
class Both:
    image: Tensor
    name: str


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


class Numbered(Dataset[Any]):
    """Row i has i in every sort of tree, and what is drawn for it."""

    def __init__(self, num_rows: int = 20) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> Any:
        number = torch.tensor([float(i), -float(i)])
        nested = Pair(Both(number, f"row {i}"), (i, [np.float64(i), i % 2 == 0]))
        return {"number": number, "nested": nested, "drawn": torch.tensor(draws())}


def plan(num_rows: int, *, world_size: int = 1, global_batch: int = 6, micro_batch: int | None = None) -> BatchPlan:
    return BatchPlan(
        num_rows=num_rows, global_batch=global_batch, world_size=world_size, micro_batch=micro_batch, seed=1
    )


def batches(rows: Any, *, rank: int = 0, **numbers: Any) -> TrainingBatches:
    return TrainingBatches(rows, plan(len(rows), **numbers), rank=rank, device=CPU, dtype=torch.float32)


def test_a_batch_of_a_dataset_is_the_tree_of_its_rows_and_texts_stay_on_the_host() -> None:
    batch = batches(DatasetRows(Numbered(), seed=0)).at(0)[0]
    ids = batch.ids.tolist()
    data = batch.data
    assert data["number"].tolist() == [[i, -i] for i in ids]
    assert isinstance(data["nested"], Pair)
    assert isinstance(data["nested"].left, Both)
    assert data["nested"].left.name == [f"row {i}" for i in ids]
    whole, (real, even) = data["nested"].right
    assert whole.tolist() == ids
    assert whole.dtype == torch.int64
    assert (real.tolist(), real.dtype) == (ids, torch.float32)
    assert even.tolist() == [i % 2 == 0 for i in ids]


def drawn_by_row(world_size: int, micro_batch: int | None, epoch: int) -> dict[int, list[float]]:
    found = {}
    for rank in range(world_size):
        mine = batches(DatasetRows(Numbered(), seed=5), rank=rank, world_size=world_size, micro_batch=micro_batch)
        steps = plan(20).steps_per_epoch
        for position in range(epoch * steps, (epoch + 1) * steps):
            for batch in mine.at(position):
                if not batch.is_padding:
                    found |= dict(zip(batch.ids.tolist(), batch.data["drawn"].tolist(), strict=True))
    return found


def test_what_a_row_draws_follows_from_the_seed_the_epoch_and_its_number_alone() -> None:
    one = drawn_by_row(1, None, 0)
    assert sorted(one) == list(range(20))
    assert drawn_by_row(3, None, 0) == drawn_by_row(2, 1, 0) == one
    other = drawn_by_row(1, None, 1)
    assert all(one[row] != other[row] for row in one), "each epoch draws anew"
    assert len({tuple(values) for values in one.values()}) == 20


def test_the_random_numbers_of_the_process_are_left_alone() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches(DatasetRows(Numbered(), seed=0)).at(0)
    assert draws() == wanted


@pytest.mark.parametrize("has_split", [True, False])
def test_a_part_that_knows_of_splits_is_made_twice_and_of_any_other_a_fraction_validates(has_split: bool) -> None:
    made = []

    def make(split: str = "all") -> Numbered:
        made.append(split)
        return Numbered(12 if split == "validation" else 20)

    splits = own_splits(make, has_split=has_split, validation_fraction=0.25, seed=3)
    assert made == (["train", "validation"] if has_split else ["all"])
    assert (len(splits.train), len(splits.validation)) == ((20, 12) if has_split else (15, 5))
    if not has_split:
        ids = [
            row
            for rows in (splits.train, splits.validation)
            for row in rows.take(np.arange(len(rows)), epoch=0)["number"][:, 0].tolist()  # type: ignore[union-attr]
        ]
        assert sorted(ids) == list(range(20))


def test_a_tree_of_columns_is_taken_row_by_row_and_keeps_its_types() -> None:
    tree = {"a": torch.arange(10), "b": (np.arange(10.0) * 2, torch.arange(10) % 2 == 0)}
    splits = own_splits(lambda: tree, has_split=False, validation_fraction=0.2, seed=0)
    assert isinstance(splits.train, ColumnTree)
    batch = batches(splits.train, global_batch=8).at(0)[0]
    assert batch.data["b"][0].tolist() == (2 * batch.data["a"]).tolist()
    assert batch.data["b"][0].dtype == torch.float32, "the type of the run"
    assert batch.data["b"][1].dtype == torch.bool
    rows = ValidationBatches(splits.validation, rank=0, world_size=1, batch_rows=2, device=CPU, dtype=torch.float32)
    seen = [*batch.data["a"].tolist(), *(row for found in rows for row in found.data["a"].tolist())]
    assert sorted(seen) == list(range(10))


def test_digests_change_with_a_row_and_not_with_the_way_it_is_asked_for() -> None:
    class Changed(Numbered):
        def __getitem__(self, i: int) -> Any:
            row = super().__getitem__(i)
            return {**row, "number": row["number"] + (i == 7)}

    def digest_of(dataset: Any) -> str:
        return str(DatasetRows(dataset, seed=0).compared)

    assert digest_of(Numbered()) == digest_of(Numbered())
    assert len({digest_of(Numbered()), digest_of(Changed()), digest_of(Numbered(19))}) == 3
    columns = [ColumnTree({"a": torch.arange(n), "b": torch.zeros(n)}) for n in (5, 6)]
    other = ColumnTree({"a": torch.tensor([0, 1, 2, 3, 5]), "b": torch.zeros(5)})
    assert len({rows.digest() for rows in (*columns, other)}) == 3


def test_a_generator_of_its_own_is_found_by_asking_twice() -> None:
    class Own(Numbered):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def __getitem__(self, i: int) -> Any:
            return torch.rand(2, generator=self.generator)

    assert not DatasetRows(Numbered(), seed=0).look()
    assert DatasetRows(Own(), seed=0).look()[0] == 0


class Bad(Numbered):
    """Has one fault in row 3."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def __getitem__(self, i: int) -> Any:
        row: dict[str, Any] = {"x": torch.zeros(2), "y": 0}
        if i != 3:
            return row
        match self.fault:
            case "raises":
                return {}["pixels"]
            case "keys":
                return {"x": torch.zeros(2), "z": 0}
            case "shape":
                return {"x": torch.zeros(3), "y": 0}
            case _:
                return [torch.zeros(2), 0]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", r"row 3 of Bad raised KeyError: 'pixels' \(.*test_own_rows.py, line \d+: return {}\[\"pixels\"\]\)"),
        ("keys", "row 3 has the keys x, z, row 0 has the keys x, y"),
        (
            "shape",
            r"row 3 has shape \(3,\) at x, row 0 has \(2,\): pad them with data.collate: {pad: 0}, bring .* collate",
        ),
        ("kind", "row 3 has a list of 2, row 0 has the keys x, y"),
    ],
)
def test_a_row_that_is_no_row_is_told_by_its_number_and_the_rank(fault: str, said: str) -> None:
    rows = DatasetRows(Bad(fault), seed=0)
    with pytest.raises(DataError, match=said):
        rows.take(np.arange(5), epoch=0)
    mine = batches(rows, global_batch=20)
    with pytest.raises(RowError, match=r"row 3 .*\(on rank 0\)") as caught:
        mine.at(0)
    assert caught.value.is_of_one_rank
    assert caught.value.exit_code == 3


def test_collate_of_a_part_makes_the_batch_and_may_not_change_the_number_of_rows() -> None:
    class Ragged(Numbered):
        def __getitem__(self, i: int) -> Any:
            return torch.ones(1 + i % 3)

        def collate(self, rows: list[Tensor]) -> Any:
            return {"x": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    class Fewer(Ragged):
        def collate(self, rows: list[Tensor]) -> Any:
            return super().collate(rows[1:])

    class Raises(Ragged):
        def collate(self, rows: list[Tensor]) -> Any:
            raise ValueError("no rows wanted")

    assert DatasetRows(Ragged(), seed=0).take(np.arange(3), epoch=0)["x"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    with pytest.raises(DataError, match="collate was given 3 rows, and what it returned has 2 rows at x"):
        DatasetRows(Fewer(), seed=0).take(np.arange(3), epoch=0)
    with pytest.raises(DataError, match=r"collate of rows 0, 1, 2 raised ValueError: no rows wanted .*line"):
        DatasetRows(Raises(), seed=0).take(np.arange(3), epoch=0)


class Measured(Numbered):
    """Says how long its rows are."""

    def __init__(self, lengths: Any, num_rows: int = 20) -> None:
        super().__init__(num_rows)
        self.lengths = lengths


def test_a_rank_without_rows_is_kept_company_by_finite_numbers() -> None:
    class Infinite(Dataset[Tensor]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> Tensor:
            return torch.tensor([float("nan"), float("inf"), 1.0])

    (batch,) = batches(DatasetRows(Infinite(), seed=0), global_batch=1, world_size=2).at(0)
    assert batch.is_padding
    assert batch.data.isfinite().all()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple, lambda lengths: lambda: lengths])
def test_a_dataset_says_its_lengths_by_an_attribute_or_a_method_and_a_split_has_those_of_its_rows(kind: Any) -> None:
    lengths = [3 * i + 1 for i in range(20)]
    splits = own_splits(lambda: Measured(kind(lengths)), has_split=False, validation_fraction=0.2, seed=0)
    for rows in (splits.train, splits.validation):
        assert isinstance(rows, DatasetRows)
        found = lengths_of(rows)
        assert found is not None
        assert found.dtype == np.int64
        assert found.tolist() == [3 * i + 1 for i in rows.numbers(range(len(rows)))]


def test_rows_that_say_no_lengths_have_none() -> None:
    assert lengths_of(DatasetRows(Numbered(), seed=0)) is None
    assert lengths_of(ColumnTree({"x": torch.zeros(3)})) is None
    assert lengths_of(Columns(torch.zeros(3, 2), torch.zeros(3))) is None


def raises() -> list[int]:
    raise OSError("no such index")


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([1] * 19, "there are 19 of them for 20 rows"),
        (7, r"one number a row is wanted, not an array of shape \(\) of int64"),
        (np.ones((20, 1), np.int64), r"not an array of shape \(20, 1\)"),
        ((i for i in range(20)), r"not an array of shape \(\) of object"),
        ([1] * 7 + [0] + [1] * 12, "row 7 has 0"),
        ([1] * 7 + [-3] + [1] * 12, "row 7 has -3"),
        ([2**63] * 20, "row 0 has 9223372036854775808"),
        ([1.0] * 7 + [2.5] + [1.0] * 12, "whole numbers are wanted, not float64, and row 7 has 2.5"),
        (torch.ones(20), "whole numbers are wanted, not float32, and row 0 has 1"),
        ([1] * 7 + [float("nan")] + [1] * 12, "row 7 has nan"),
        ([True] * 20, "not bool"),
        (["4"] * 20, "not <U1, and row 0 has"),
        ([None] * 20, "not object, and row 0 has None"),
        ([[1], [1, 2]] * 10, "raised ValueError"),
        (raises, r"raised OSError: no such index \(.*test_own_rows.py, line \d+: raise OSError"),
    ],
)
def test_lengths_that_are_not_one_whole_number_above_0_a_row_are_refused(lengths: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"lengths of Measured:? .*{said}.*; give the Dataset"):
        lengths_of(DatasetRows(Measured(lengths), seed=0))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from range(3)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Endless(), "Endless has no length, so no row has a number"),
        (Numbered(0), r"Numbered has not one row \(its len is 0\)"),
        ({}, "has not one row"),
        ({"x": torch.zeros(0, 2)}, "has not one row"),
        ({"x": torch.zeros(3), "y": torch.zeros(2)}, "other numbers of rows: x 3, y 2"),
        ({"x": torch.zeros(3), "y": 7}, "y is int, not a column"),
        ({"x": torch.zeros(())}, "x is one number, not a column"),
        (Numbered(1), "at least 2 rows are wanted"),
    ],
)
def test_what_is_no_set_of_rows_is_refused(made: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        own_splits(lambda: made, has_split=False, validation_fraction=0.2, seed=0)


def test_facts_are_json() -> None:
    class Facts(Numbered):
        facts: ClassVar[Any] = {"classes": 3}

    assert own_splits(Facts, has_split=False, validation_fraction=0.2, seed=0).own_facts == {"classes": 3}
    for wrong, said in (({"a": torch.zeros(1)}, "no JSON"), ({"a": float("nan")}, "no JSON"), ([1], "are a list")):
        Facts.facts = wrong
        with pytest.raises(DataError, match=said):
            own_splits(Facts, has_split=False, validation_fraction=0.2, seed=0)


def test_a_tree_goes_through_a_map_as_what_it_was() -> None:
    class Outputs(dict[str, Any]):
        """As transformers has them: attributes are keys."""

        def __getattr__(self, name: str) -> Any:
            return self[name]

    tree = {"a": [1, (2, 3)], "b": Pair(4, Both(torch.zeros(1), "x")), "c": Outputs(logits=5)}
    doubled = map_tree(lambda leaf: leaf * 2, tree)
    assert doubled["a"] == [2, (4, 6)]
    assert doubled["b"].left == 8
    assert doubled["b"].right.name == "xx"
    assert type(doubled["c"]) is Outputs
    assert doubled["c"].logits == 10
    assert tree["c"].logits == 5, "the tree itself is left as it was"
    assert [path for path, _ in paths(tree)] == [
        "a.0",
        "a.1.0",
        "a.1.1",
        "b.left",
        "b.right.image",
        "b.right.name",
        "c.logits",
    ]
    assert list(leaves(7)) == [7]


def test_stacking_names_the_place_that_differs() -> None:
    with pytest.raises(DataError, match=r"row 9 has shape str at a.0, row 4 has \(1,\)"):
        stack([{"a": [torch.zeros(1)]}, {"a": ["text"]}], [4, 9])


def test_numbers_of_python_keep_their_digits() -> None:
    tree = stack([{"age": 0.1, "i": 1, "old": True}, {"age": 2, "i": 2, "old": False}], [0, 1])
    assert tree["age"].tolist() == [0.1, 2.0]
    assert (tree["i"].dtype, tree["old"].dtype) == (torch.int64, torch.bool)

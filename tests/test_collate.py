"""Rows become a batch: stacked as torch does it, padded as pad_sequence does it, or refused with what to type."""

from __future__ import annotations

import functools
import re
import signal
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate

from harness.config import use
from harness.config.changes import compare
from harness.config.data import Pad
from harness.config.io import load_config
from harness.config.run_config import RunConfig
from harness.errors import ConfigError, DataError
from harness.rows.collate import padded, stack
from harness.rows.dataset import DatasetRows
from harness.rows.own import own_splits
from harness.rows.tree import child, children, leaves, paths

EXAMPLES = Path(__file__).parents[1] / "examples"
Pair = namedtuple("Pair", "left right")


@dataclass
class Both:
    image: Tensor
    name: str


def batch_of(rows: list[Any], **pad: Any) -> Any:
    return padded(rows, range(len(rows)), Pad(**pad))


def walks(*lengths: int, width: int = 3) -> list[Any]:
    """Rows whose tensors differ in length, each as long as the others of its row."""
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "steps": torch.randn(length, width, generator=draw),
            "nested": Pair(Both(torch.randint(9, (length,), generator=draw), f"{length} steps"), (length, [True])),
            "fixed": torch.randn(5, generator=draw),
        }
        for length in lengths
    ]


# ---------------------------------------------------------------- stacked


@pytest.mark.parametrize(
    "rows",
    [
        [torch.full((2, 3), float(i)) for i in range(3)],
        [{"a": torch.tensor(i), "b": (torch.ones(2, dtype=torch.bool), torch.zeros(2, 2))} for i in range(3)],
        [Pair(torch.arange(3), {"x": torch.rand(1), "y": i}) for i in range(3)],
        [{"a": np.full((2, 2), i), "b": np.float32(i), "c": np.int16(i), "d": np.bool_(i)} for i in range(3)],
        [{"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}] * 2,
        [torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)],
    ],
)
def test_rows_of_one_shape_are_stacked_as_torch_does_it(rows: list[Any]) -> None:
    found, wanted = (list(leaves(tree)) for tree in (stack(rows, range(len(rows))), default_collate(rows)))
    assert len(found) == len(wanted) > 0
    for here, there in zip(found, wanted, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


def test_a_tree_stays_of_its_kind_and_the_order_of_keys_means_nothing() -> None:
    rows = [UserDict(a=torch.zeros(1), b=OrderedDict(c=1)), UserDict(b=OrderedDict(c=2), a=torch.ones(1))]
    tree = stack(rows, [0, 1])
    assert type(tree) is UserDict
    assert type(tree["b"]) is OrderedDict
    assert (tree["a"].tolist(), tree["b"]["c"].tolist()) == ([[0], [1]], [1, 2])


def test_arrays_that_torch_does_not_take_as_they_are_are_copied() -> None:
    picture = np.arange(6.0).reshape(2, 3)
    fixed = picture.copy()
    fixed.flags.writeable = False
    tree = stack([{"x": picture[:, ::-1]}, {"x": fixed}], [0, 1])
    assert tree["x"].tolist() == [[[2, 1, 0], [5, 4, 3]], [[0, 1, 2], [3, 4, 5]]]


def test_numbers_of_numpy_and_python_may_stand_beside_each_other() -> None:
    tree = stack([{"x": 0.1}, {"x": np.float64(0.2)}, {"x": torch.tensor(0.5)}], [0, 1, 2])
    assert tree["x"].tolist() == [0.1, 0.2, 0.5]


class Listed(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def test_what_is_padded_with_is_not_rounded() -> None:
    large = 2**53 + 1  # which no float is
    assert batch_of([torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)], pad=large)[0, 1] == large


def in_a_worker(rows: list[Any], pad: Pad | None) -> Any:
    """The batch of a worker, and for each of its tensors whether it was made in memory that is shared."""
    loader = DataLoader(
        Listed(rows),
        batch_size=len(rows),
        num_workers=1,
        collate_fn=functools.partial(_with_shared, pad=pad),
        multiprocessing_context="fork",
    )
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return next(iter(loader))
    finally:
        signal.signal(signal.SIGCHLD, before)  # torch sets one for good


def _with_shared(rows: list[Any], pad: Pad | None) -> Any:
    tree = padded(rows, range(len(rows)), pad)
    return tree, [leaf.is_shared() for leaf in leaves(tree) if isinstance(leaf, Tensor) and leaf.dim() > 1]


@pytest.mark.parametrize("pad", [None, Pad(pad=0), Pad(pad={"x": -1, "y": 0}, multiple_of=4)])
def test_a_worker_makes_large_tensors_in_shared_memory_and_they_are_those_of_the_rank(pad: Pad | None) -> None:
    rows = [{"x": torch.full((2 + (pad is not None) * i, 3000), float(i)), "y": torch.arange(2)} for i in range(3)]
    tree, is_shared = in_a_worker(rows, pad)
    assert is_shared == [True, False]
    for here, there in zip(leaves(tree), leaves(padded(rows, range(3), pad)), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


@pytest.mark.parametrize("first", [torch.float32, torch.int64, torch.float64])
@pytest.mark.parametrize("pad", [None, Pad(pad=0)])
def test_rows_of_different_types_become_the_wider_in_a_worker_as_in_the_rank(
    first: torch.dtype, pad: Pad | None
) -> None:
    rows = [torch.ones(2, dtype=first), torch.full((2 + (pad is not None),), 0.1, dtype=torch.float64)]
    tree, _ = in_a_worker(rows, pad)
    assert tree.dtype == torch.float64
    assert tree[1, 0].item() == 0.1
    assert torch.equal(tree, padded(rows, range(2), pad))


# ---------------------------------------------------------------- padded


def test_rows_are_padded_at_their_ends_as_pad_sequence_does_it() -> None:
    rows = walks(4, 1, 7)
    steps, marks = [row["steps"] for row in rows], [row["nested"].left.image for row in rows]
    one = batch_of(rows, pad=0)
    assert torch.equal(one["steps"], pad_sequence(steps, batch_first=True))
    assert torch.equal(one["nested"].left.image, pad_sequence(marks, batch_first=True))
    each = batch_of(rows, pad={"steps": 0.5, "nested.left.image": -100})
    assert torch.equal(each["steps"], pad_sequence(steps, batch_first=True, padding_value=0.5))
    assert torch.equal(each["nested"].left.image, pad_sequence(marks, batch_first=True, padding_value=-100))
    for tree in (one, each):
        assert torch.equal(tree["fixed"], torch.stack([row["fixed"] for row in rows]))
        assert tree["nested"].left.name == ["4 steps", "1 steps", "7 steps"]
        assert tree["nested"].right[0].tolist() == [4, 1, 7]


TREES = st.recursive(
    st.sampled_from(["float", "int", "bool", "array", "text"]),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1) | st.lists(inner, min_size=1, max_size=3),
    max_leaves=5,
)


@st.composite
def rows_of_any_tree(draw: st.DrawFn) -> list[Any]:
    """Some rows of one tree; each of its tensors has as many dimensions in every row, and any size of each."""
    tree = draw(TREES)
    num_dims = iter(draw(st.lists(st.integers(0, 3), min_size=20, max_size=20)))
    dims_of = {path: next(num_dims) for path, _ in paths(tree)}
    draws = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def filled(kind: Any, path: str) -> Any:
        names = children(kind)
        if names is not None:
            parts = {name: filled(child(kind, name), f"{path}.{name}".lstrip(".")) for name in names}
            return parts if isinstance(kind, dict) else list(parts.values())
        shape = [draw(st.integers(0, 4)) for _ in range(dims_of[path])]
        tensor = torch.randint(1, 9, shape, generator=draws)
        match kind:
            case "text":
                return f"{shape}"
            case "array":
                return tensor.numpy()
            case "float":
                return tensor.float()
            case "bool":
                return tensor.bool()
            case _:
                return tensor

    return [filled(tree, "") for _ in range(draw(st.integers(1, 4)))]


@settings(max_examples=200, deadline=None)
@given(rows=rows_of_any_tree(), multiple_of=st.integers(1, 4))
def test_what_was_padded_comes_back_when_the_padding_is_cut_off(rows: list[Any], multiple_of: int) -> None:
    tree = batch_of(rows, pad=0, multiple_of=multiple_of)
    of_rows = [dict(paths(row)) for row in rows]
    for path, column in _columns_of(tree, rows[0], ""):
        leaves_of_rows = [row[path] for row in of_rows]
        if isinstance(column, list):
            assert column == leaves_of_rows
            continue
        tensors = list(map(torch.as_tensor, leaves_of_rows))
        for there, tensor in zip(column, tensors, strict=True):
            assert torch.equal(there[tuple(map(slice, tensor.shape))], tensor)
            assert int(there.sum()) == int(tensor.sum()), "what stands behind the row is 0"
        for size, sizes in zip(column.shape[1:], zip(*(t.shape for t in tensors), strict=True), strict=True):
            is_ragged = len(set(sizes)) > 1
            assert size == (-(-max(sizes) // multiple_of) * multiple_of if is_ragged else max(sizes))


def _columns_of(tree: Any, row: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What a batch has in the place of each leaf of a row; of texts, a list."""
    names = children(row)
    if names is None:
        yield path, tree
        return
    for name in names:
        yield from _columns_of(child(tree, name), child(row, name), f"{path}.{name}" if path else str(name))


def test_a_fixed_vector_is_not_rounded_with_one_value_for_all_and_a_named_one_always_is() -> None:
    alike, ragged = walks(6, 6), walks(6, 3)
    assert batch_of(alike, pad=0, multiple_of=8)["steps"].shape == (2, 6, 3)
    assert batch_of(ragged, pad=0, multiple_of=8)["steps"].shape == (2, 8, 3)
    for rows in (alike, ragged):
        tree = batch_of(rows, pad={"steps": 1, "nested.left.image": 0}, multiple_of=8)
        assert tree["steps"].shape == (2, 8, 3)
        assert (tree["steps"][:, 6:] == 1).all()
        assert tree["nested"].left.image.shape == (2, 8)
        assert tree["fixed"].shape == (2, 5)


def test_a_batch_that_is_long_enough_is_not_rounded_further() -> None:
    assert batch_of([torch.zeros(8), torch.zeros(3)], pad=0, multiple_of=8).shape == (2, 8)
    assert batch_of([{"x": torch.zeros(8)}], pad={"x": 0}, multiple_of=8)["x"].shape == (1, 8)


def test_pictures_are_padded_in_both_directions_and_keep_their_channels() -> None:
    rows = [torch.ones(3, 5, 9), torch.ones(3, 7, 4)]
    found = batch_of(rows, pad=0, multiple_of=4)
    assert found.shape == (2, 3, 8, 12)
    assert found.sum() == 3 * (5 * 9 + 7 * 4)
    with pytest.raises(DataError, match=r"it rounds the first dimension, and would make 4 of the 3 at x, .* pad: 0"):
        batch_of([{"x": row} for row in rows], pad={"x": 0}, multiple_of=4)


@pytest.mark.parametrize(
    ("rows", "pad", "said"),
    [
        (
            [{"steps": torch.zeros(2)}, {"steps": torch.zeros(3)}],
            None,
            "row 1 has shape (3,) at steps, row 0 has (2,): pad them with data.collate: {pad: 0}, bring them to one",
        ),
        (
            [{"steps": torch.zeros(2), "side": torch.zeros(n)} for n in (2, 3)],
            {"steps": 0.5},
            "row 1 has shape (3,) at side, row 0 has (2,): name it as well, with what it is padded with: "
            "data.collate: {pad: {steps: 0.5, side: 0}}",
        ),
        (
            [{"image": {"left": torch.zeros(2)}, "y": 1}] * 2,
            {"image.let": 0},
            "data.collate.pad.image.let: rows have no such tensor (nearest: image.left; they have image.left, y)",
        ),
        ([{"x": torch.zeros(2), "name": "a"}], {"name": 0}, "pad.name: rows have no such tensor (they have x)"),
        (
            [torch.zeros(2)],
            {"x": 0},
            "pad.x: rows have no such tensor (they have one without a name, which pad: 0 pads",
        ),
        (
            [{"x": torch.zeros(2, 2)}, {"x": torch.zeros(3)}],
            0,
            "row 1 has shape (3,) at x, row 0 has (2, 2): padding makes a dimension longer and adds none",
        ),
        (
            [{"ids": [1, 2, 3]}, {"ids": [1, 2]}],
            0,
            "row 1 has a list of 2 at ids, row 0 has a list of 3: a list is a tensor for each of its places, so "
            'return torch.tensor(...) of it (a datasets.Dataset does after with_format("torch")), and pad with',
        ),
        ([{"x": torch.zeros(2)}, {"x": None}], 0, "row 1 has shape NoneType at x, row 0 has (2,): all rows"),
        ([{"x": 1}, {"x": 1, "y": 2}], None, "row 1 has the keys x, y, row 0 has the keys x: all rows are to be alike"),
        ([{"x": 1}, {"x": None}], None, "row 1 has one NoneType at x, row 0 has one int: all rows are to be alike"),
        ([{"x": None}, {"x": torch.zeros(2)}], None, "row 1 has one Tensor at x, row 0 has one NoneType: all rows"),
        ([{"x": "a"}, {"x": ["a"]}], None, "row 1 has a list of 1 at x, row 0 has one str: all rows are to be alike"),
        ([{"x": np.array(["a"])}], None, "row 0 has an array of <U1 at x, of which torch has none"),
        (
            [{"x": torch.ones(n, requires_grad=True)} for n in (2, 3)],
            0,
            "the tensors of the rows at x do not become one: RuntimeError",
        ),
        ([{"x": torch.eye(2).to_sparse()}] * 2, None, "the tensors of the rows at x do not become one: RuntimeError"),
    ],
)
def test_rows_that_are_no_batch_are_told_with_what_to_type(rows: list[Any], pad: Any, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        padded(rows, range(len(rows)), None if pad is None else Pad(pad=pad))


@pytest.mark.parametrize(
    ("dtype", "fill", "holds"),
    [
        (torch.uint8, -100, "whole numbers from 0 to 255"),
        (torch.int64, 0.5, "whole numbers from -9223372036854775808 to"),
        (torch.int8, 128, "whole numbers from -128 to 127"),
        (torch.bool, 2, "true and false"),
        (torch.float16, 1e5, "numbers from -65504 to 65504"),
        (torch.uint8, 255, None),
        (torch.int64, 2.0, None),
        (torch.bool, True, None),
        (torch.bool, 1, None),
        (torch.float32, -100, None),
    ],
)
def test_what_a_type_does_not_hold_pads_nothing_of_that_type(dtype: torch.dtype, fill: Any, holds: str | None) -> None:
    rows = [{"x": torch.zeros(n, dtype=dtype), "fixed": torch.zeros(3, dtype=torch.uint8)} for n in (1, 2)]
    for pad, where in ((fill, "data.collate.pad: "), ({"x": fill}, "data.collate.pad.x: ")):
        if holds is None:
            assert batch_of(rows, pad=pad)["x"].tolist() == [[0, fill], [0, 0]]
        else:
            said = rf"{re.escape(f'{where}{fill} does not fit into {dtype} at x, which holds {holds}')}"
            with pytest.raises(DataError, match=said):
                batch_of(rows, pad=pad)


def test_a_picture_of_pil_is_told_how_it_becomes_a_tensor() -> None:
    picture = PIL.Image.new("RGB", (4, 4))
    with pytest.raises(
        DataError, match=r"row 7 has a PIL image at image: end the transform with v2.ToImage\(\) and v2"
    ):
        stack([{"image": picture, "y": 1}] * 2, [7, 8])


def test_a_set_of_hugging_face_is_padded_once_its_rows_are_tensors() -> None:
    dataset = datasets.Dataset.from_dict({"ids": [[1, 2, 3], [4], [5, 6]], "label": [0, 1, 0]})
    with pytest.raises(DataError, match=r'row 1 has a list of 1 at ids, .* with_format\("torch"\)'):
        DatasetRows(dataset, seed=0, pad=Pad(pad=0)).take(np.arange(3), epoch=0)
    rows = DatasetRows(dataset.with_format("torch"), seed=0, pad=Pad(pad={"ids": 0}))
    tree = rows.take(np.arange(3), epoch=0)
    assert tree["ids"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert tree["label"].tolist() == [0, 1, 0]


# ---------------------------------------------------------------- rows of a part


def ragged_rows() -> list[Tensor]:
    return [torch.ones(1 + i % 3) for i in range(10)]


def test_splits_and_parts_of_splits_are_padded_alike() -> None:
    splits = own_splits(
        lambda: Listed(ragged_rows()), has_split=False, validation_fraction=0.3, seed=0, pad=Pad(pad=-1)
    )
    for rows in (splits.train, splits.validation):
        assert isinstance(rows, DatasetRows)
        assert rows.may_pad
        tree = rows.take(np.arange(len(rows)), epoch=0)
        assert tree.shape == (len(rows), 3)
        assert [int((row == 1).sum()) for row in tree] == [1 + i % 3 for i in rows.numbers(range(len(rows)))]


class Collated(Listed):
    def collate(self, rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            Collated(ragged_rows()),
            "data.collate: Collated brings a method collate.* of its own; leave out data.collate",
        ),
        ({"x": torch.zeros(9, 2)}, "data.collate: the data are columns, whose rows all have one shape; leave it out"),
    ],
)
def test_rows_that_we_do_not_pad_are_not_configured_to_be_padded(made: Any, said: str) -> None:
    make: Callable[..., Any] = lambda: made  # noqa: E731
    settings_: Mapping[str, Any] = {"has_split": False, "validation_fraction": 0.2, "seed": 0}
    own_splits(make, **settings_)
    with pytest.raises(ConfigError, match=said):
        own_splits(make, **settings_, pad=Pad(pad=0))


# ---------------------------------------------------------------- in a configuration


@pytest.fixture
def configured() -> Iterator[Callable[..., RunConfig]]:
    """The configuration of examples/ragged with another `data.collate`."""
    yield lambda given: load_config(EXAMPLES / "ragged/run.yaml", (f"data.collate={given}",)).config
    use.unload()


@pytest.mark.parametrize(
    ("given", "pad", "multiple_of"),
    [
        ("{pad: 0}", 0, 1),
        ("{pad: -0.5, multiple_of: 8}", -0.5, 8),
        ("{pad: true}", True, 1),
        ("{pad: {image.left: 0, 1.mask: false}}", {"image.left": 0, "1.mask": False}, 1),
    ],
)
def test_padding_is_configured_with_one_value_or_by_the_paths_of_tensors(
    given: str, pad: Any, multiple_of: int, configured: Callable[..., RunConfig]
) -> None:
    found = configured(given).data.collate  # type: ignore[attr-defined]
    assert (found.pad, found.multiple_of) == (pad, multiple_of)
    assert configured("null").data.collate is None  # type: ignore[attr-defined]


WANTED = "a finite number, or a section with a finite number for each name"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{}", f"data.collate.pad: missing; wanted: {WANTED}"),
        ("{padding: 0}", "data.collate.padding: unknown key (nearest: pad; allowed: pad, multiple_of)"),
        ("{pad: zero}", f"data.collate.pad: 'zero' is not {WANTED}"),
        ("{pad: null}", f"data.collate.pad: null is not {WANTED}"),
        ("{pad: [0]}", f"data.collate.pad: [0] is not {WANTED}"),
        ("{pad: {}}", "data.collate.pad: {} is not a section with a finite number for each name"),
        ("{pad: {side: x}}", "data.collate.pad.side: 'x' is not a finite number"),
        ("{pad: {side: .inf}}", "data.collate.pad.side: '.inf' is not a finite number"),
        ("{pad: 0, multiple_of: 0}", "data.collate.multiple_of: 0 is not a whole number, at least 1"),
        ("pad", "data.collate: 'pad' is not a section with pad, or null"),
    ],
)
def test_what_is_no_padding_is_told_with_what_is_wanted(
    given: str, said: str, configured: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        configured(given)


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ("{pad: 0}", {"data.collate.pad", "data.collate.pad.steps", "data.collate.pad.side"}),
        ("{pad: {steps: 0, side: -1}}", {"data.collate.pad.side"}),
        ("{pad: {steps: 0, side: -100}, multiple_of: 8}", {"data.collate.multiple_of"}),
        ("null", {"data.collate.pad.steps", "data.collate.pad.side", "data.collate.multiple_of"}),
    ],
)
def test_how_rows_are_padded_may_not_change_on_resume(
    given: str, changed: set[str], configured: Callable[..., RunConfig]
) -> None:
    stored, now = configured("{pad: {steps: 0, side: -100}}"), configured(given)
    for one, other in ((stored, now), (now, stored)):
        changes = compare(one, other)
        assert {change.path for change in changes.refused} == changed
        assert not changes.noticed + changes.allowed

"""Rows of other libraries, the real ones: Hugging Face's datasets and tokenizers, and torchvision."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
from torch import Tensor

from harness.config import use
from harness.config.data import Pad
from harness.config.io import load_config
from harness.errors import DataError
from harness.rows import draws
from harness.rows.batches import TrainingBatches
from harness.rows.dataset import DatasetRows
from harness.rows.order import BatchPlan
from harness.rows.own import own_splits
from harness.rows.tree import leaves, map_tree, paths
from tests.children import start_python
from tests.distributed.own import Course, Own, with_plain_pytorch, with_the_harness
from tests.distributed.ranks import run_ranks

DOCUMENT = Path(__file__).parents[1] / "docs" / "rows.md"
TORCHVISION = Path(sys.prefix) / "torchvision"
NUM_ROWS, CPU = 40, torch.device("cpu")
IDS = datasets.Features({"ids": datasets.List(datasets.Value("int64")), "name": datasets.Value("string")})


@pytest.fixture(autouse=True)
def _quiet_and_cached_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows_of(make: Callable[..., Any], *, workers: int = 0, pad: Pad | None = None) -> DatasetRows:
    splits = own_splits(make, has_split=False, validation_fraction=0.25, seed=3, workers=workers, pad=pad)
    assert isinstance(splits.train, DatasetRows)
    return splits.train


def by_number(rows: DatasetRows, *, micro_batch: int = 5, first: int = 0, positions: int = 4) -> dict[Any, Any]:
    """What each row of some updates was, by its epoch and number."""
    rows.look()
    plan = BatchPlan(num_rows=len(rows), global_batch=10, world_size=1, micro_batch=micro_batch, seed=1)
    batches = TrainingBatches(rows, plan, rank=0, device=CPU, dtype=torch.float32)
    found = {}
    try:
        batches.start(first)
        for position in range(first, first + positions):
            for batch in batches.at(position):
                for place, number in enumerate(batch.ids.tolist()):
                    row = map_tree(lambda leaf, at=place: leaf[at] if isinstance(leaf, Tensor) else leaf, batch.data)
                    found[plan.epoch_of(position), number] = [
                        leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in leaves(row)
                    ]
    finally:
        batches.close()
    return found


# ---------------------------------------------------------------- Hugging Face's datasets


def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "x": [[float(i), i + 0.5] for i in range(NUM_ROWS)],
            "label": [i % 3 for i in range(NUM_ROWS)],
            "nested": [{"a": [i, i], "flag": i % 2 == 0} for i in range(NUM_ROWS)],
        }
    )


def ragged() -> datasets.Dataset:
    columns = {"ids": [list(range(i % 5)) for i in range(NUM_ROWS)], "name": [f"row {i}" for i in range(NUM_ROWS)]}
    return datasets.Dataset.from_dict(columns, features=IDS)


def pictures() -> datasets.Dataset:
    drawn = np.random.default_rng(0).integers(0, 255, (NUM_ROWS, 6, 7, 3), dtype=np.uint8)
    columns = {"image": [PIL.Image.fromarray(picture) for picture in drawn], "label": ["cat", "dog"] * 20}
    names = datasets.ClassLabel(names=["cat", "dog"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), "label": names}))


def with_numbers(rows: datasets.Dataset) -> datasets.Dataset:
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_dict({"i": list(range(NUM_ROWS))})], axis=1)


SETS: dict[str, Callable[[], datasets.Dataset]] = {
    "without a format": table,
    "torch": lambda: table().with_format("torch"),
    "numpy": lambda: table().with_format("numpy"),
    "a transform": lambda: table().with_transform(lambda batch: {"x": [torch.tensor(row) for row in batch["x"]]}),
    "mapped": lambda: table().map(lambda row: {"sum": sum(row["x"])}),
    "selected": lambda: table().shuffle(seed=1).select(range(3, 33)),
    "filtered": lambda: table().filter(lambda row: row["label"] != 1),
    "concatenated": lambda: datasets.concatenate_datasets([table().select(range(9)), table()]),
    "beside each other": lambda: with_numbers(table()),
    "ragged": ragged,
    "images": pictures,
}


@pytest.mark.parametrize("kind", SETS)
def test_rows_of_a_set_are_the_same_bits_one_by_one_at_once_and_in_workers(kind: str) -> None:
    pad = Pad(pad=-1) if kind == "ragged" else None
    alone = rows_of(SETS[kind], pad=pad)
    alone._comes_together = False
    together = rows_of(SETS[kind], pad=pad)
    wanted = by_number(alone)
    assert by_number(together) == wanted
    assert together._comes_together
    assert not together.draws
    assert by_number(rows_of(SETS[kind], workers=2, pad=pad)) == wanted
    values = table()["x"][:]
    for (_, number), leaves_of in wanted.items() if kind in ("without a format", "numpy") else ():
        assert leaves_of[0] == values[alone.numbers([number])[0]]


def noisy(batch: dict[str, Any]) -> dict[str, Any]:
    """A transform of a batch that draws from all three generators for each of its rows."""
    return {
        "x": [
            torch.tensor([*row, random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64)
            for row in batch["x"]
        ]
    }


def test_what_a_transform_draws_follows_from_the_row_whoever_reads_it_with_which() -> None:
    make = lambda: table().with_transform(noisy)  # noqa: E731
    rows = rows_of(make)
    wanted = by_number(rows, positions=6)
    assert rows.draws
    assert by_number(rows_of(make, workers=2), positions=6) == wanted
    assert by_number(rows_of(make), micro_batch=1, positions=6) == wanted
    later = by_number(rows_of(make, workers=2), first=4, positions=2)
    assert later == {key: wanted[key] for key in later}
    epochs: dict[int, list[Any]] = {}
    for (_, number), row in wanted.items():
        epochs.setdefault(number, []).append(row)
    of_both = [rows for rows in epochs.values() if len(rows) == 2]
    assert len(of_both) > 5
    assert all(first != second for first, second in of_both)


def test_a_transform_whose_rows_depend_on_those_beside_them_has_one_row_at_a_time() -> None:
    def to_the_longest(batch: dict[str, Any]) -> dict[str, Any]:
        longest = max(map(len, batch["ids"]))
        return {"ids": [torch.tensor([*ids, *[0] * (longest - len(ids))]) for ids in batch["ids"]]}

    def seldom_longer() -> datasets.Dataset:  # of eight rows that are evenly spread none is
        columns = {"ids": [[1, 2, 3] if i % 16 == 3 else [1, 2] for i in range(320)]}
        return datasets.Dataset.from_dict(columns).with_transform(to_the_longest)

    rows = rows_of(seldom_longer, pad=Pad(pad=-1))
    rows.look()
    three, two = (
        next(i for i in range(len(rows)) if (rows.numbers([i])[0] % 16 == 3) == want) for want in (True, False)
    )
    assert rows.take(np.array([three, two]), epoch=0)["ids"].tolist() == [[1, 2, 3], [1, 2, -1]]


def test_rows_that_cannot_be_had_at_once_come_one_by_one() -> None:
    def of_one(batch: dict[str, Any]) -> dict[str, Any]:
        (row,) = batch["x"]
        return {"x": [torch.tensor(row)]}

    rows = rows_of(lambda: table().with_transform(of_one))
    assert rows.look() == []
    assert rows.take(np.arange(2), epoch=0)["x"].tolist() == [[float(i), i + 0.5] for i in rows.numbers([0, 1])]


def files(folder: Path) -> dict[str, Callable[[], datasets.Dataset]]:
    """The same table in files of every kind."""
    flat = datasets.Dataset.from_dict({"x": [i / 8 for i in range(NUM_ROWS)], "y": list(range(NUM_ROWS))})
    flat.save_to_disk(folder / "disk")
    flat.to_parquet(folder / "a.parquet")
    flat.to_csv(folder / "a.csv")
    flat.to_json(folder / "a.json")
    return {
        "disk": partial(datasets.load_from_disk, folder / "disk"),
        "mapped": lambda: datasets.load_from_disk(folder / "disk").map(lambda row: {"x": row["x"], "y": row["y"]}),
        **{
            kind: partial(datasets.load_dataset, kind, data_files=str(folder / f"a.{kind}"), split="train")
            for kind in ("parquet", "csv", "json")
        },
    }


def test_a_set_of_files_is_shared_with_the_workers_and_not_made_again(tmp_path: Path) -> None:
    found = []
    for make in files(tmp_path).values():
        made: list[int] = []

        def counted(make: Callable[[], Any] = make, made: list[int] = made) -> Any:
            made.append(os.getpid())
            assert made == [os.getpid()], "a worker has made it again"
            return make()

        rows = rows_of(counted, workers=1)
        found.append(by_number(rows))
        assert rows.opened.names() == []
    assert all(each == found[0] for each in found)
    assert len(found[0]) == 40, "with those of the second epoch"


COMPARED = """
import json, datasets
from tests.test_adapters import *
datasets.disable_progress_bars()
print(json.dumps([rows_of(SETS[kind]).compared for kind in {kinds}]))
"""


def test_what_a_resumed_run_compares_is_the_same_in_every_process() -> None:
    kinds = ["mapped", "images", "a transform"]
    here = [rows_of(SETS[kind]).compared for kind in kinds]
    process = start_python(COMPARED.format(kinds=kinds))
    stdout, _ = process.communicate(timeout=120)
    assert json.loads(stdout) == here
    assert all(len(each["rows"]) == 30 for each in here)


@pytest.mark.parametrize(
    "leaf",
    [
        torch.zeros(0, 4),
        np.zeros(0),
        np.broadcast_to(np.float32(1), (2, 2)),
        np.array(["a", "bc"]),
        np.str_("a"),
        np.array([[1000, 2.5], None], dtype=object),
        PIL.Image.new("RGB", (2, 2), "red"),
        object(),
        SimpleNamespace(a=1),
    ],
)
def test_the_digest_of_a_row_is_that_of_its_values(leaf: Any) -> None:
    class Rows:
        def __init__(self, leaf: Any) -> None:
            self.leaf = leaf

        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            return {"x": i, "leaf": self.leaf}

    copied = object() if type(leaf) is object else copy.deepcopy(leaf)
    one, other = (DatasetRows(Rows(each), seed=0).compared for each in (leaf, copied))
    assert one == other
    changed = PIL.Image.new("RGB", (2, 2), "blue") if isinstance(leaf, PIL.Image.Image) else "another"
    assert DatasetRows(Rows(changed), seed=0).compared != one


def test_a_part_that_returns_all_splits_is_told_to_return_one_and_a_part_with_split_gets_it() -> None:
    splits = table().train_test_split(0.25, seed=0)
    with pytest.raises(DataError, match=r"a DatasetDict has splits \(train, test\) and no rows; return one, such as"):
        rows_of(lambda: splits)
    make = lambda split: splits  # noqa: E731
    with pytest.raises(DataError, match=r"split validation: a DatasetDict has splits .*splits\['train'\], where split"):
        own_splits(make, has_split=True, validation_fraction=0.2, seed=0)
    splits = datasets.DatasetDict(train=table(), validation=table().select(range(7)), test=table())
    found = own_splits(make, has_split=True, validation_fraction=0.2, seed=0)
    assert (len(found.train), len(found.validation)) == (NUM_ROWS, 7)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: table().to_iterable_dataset(), r"IterableDataset has no length.*load_dataset\(\.\.\.\) without str"),
        (lambda: datasets.IterableDatasetDict(train=table().to_iterable_dataset()), r"has splits \(train\) and no"),
        (lambda: table().with_format("pandas"), r"rows come in the format pandas.*return it after with_format\(\"to"),
        (lambda: table().select([]), "has not one row"),
        (lambda: ragged().select_columns("name"), "row 0 has no tensor in it"),
        (lambda: pictures().with_transform(lambda batch: batch), r"row \d+ has a PIL image at image: end the transf"),
    ],
)
def test_what_is_no_set_of_rows_with_tensors_is_refused_with_what_to_type(make: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rows_of(make).look()


def column(values: list[Any], **features: Any) -> datasets.Dataset:
    kinds = datasets.Features(features) if features else None
    return datasets.Dataset.from_dict({"a": values * 8, "b": [0.5] * 8 * len(values)}, features=kinds)


MATRIX = {"a": datasets.Array2D((1, 2), "int64"), "b": datasets.Value("float32")}


@pytest.mark.parametrize(
    ("values", "features"),
    [
        ([1, 2, None], {}),
        ([True, False, None], {}),
        ([[1], [2, 3], [4, None]], {}),
        ([[[1]], [], [[2], [None]]], {}),
        ([{"u": [1], "v": 1.0}, {"u": [], "v": None}, {"u": [None], "v": 1.0}], {}),
        ([[{"u": 1}], [], [{"u": 2}, {"u": None}]], {}),
        ([[[1, 2]], [[3, 4]], [[5, None]]], MATRIX),
    ],
)
def test_missing_whole_numbers_are_refused_with_the_first_row_that_lacks_one(
    values: list[Any], features: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="row 2 has None among the whole numbers of a, which would make floats of"):
        rows_of(lambda: column(values, **features))
    with pytest.raises(DataError, match="row 3 has None"):
        rows_of(lambda: column(values, **features).select([0, 1, 3, 5, 4]).with_format("numpy"))
    whole = lambda: column(values, **features).select([0, 1, 3, 4, 6, 7])  # noqa: E731
    rows_of(whole, pad=Pad(pad=0) if isinstance(values[0], list) else None)
    rows_of(lambda: column(values, **features).with_format("torch", columns=["b"]))
    rows_of(lambda: column(values, **features).with_transform(lambda batch: {"b": batch["b"]}))  # may fill them in


def test_missing_floats_are_nan_and_missing_texts_none() -> None:
    rows = rows_of(lambda: datasets.Dataset.from_dict({"a": [0.5, None] * 8, "t": ["x", None] * 8}))
    tree = rows.take(np.arange(4), epoch=0)
    is_odd = [number % 2 == 1 for number in rows.numbers(range(4))]
    assert tree["a"].isnan().tolist() == is_odd
    assert tree["t"] == [None if odd else "x" for odd in is_odd]


def test_only_the_columns_of_a_set_that_was_told_which_come() -> None:
    rows = rows_of(lambda: table().with_format(None, columns=["x"]))
    assert list(rows.take(np.arange(2), epoch=0)) == ["x"]


def test_a_class_label_says_how_many_classes_there_are_and_what_is_set_on_the_set_is_kept() -> None:
    splits = own_splits(pictures, has_split=False, validation_fraction=0.2, seed=0)
    assert splits.own_facts == {"classes": 2}
    two = lambda: pictures().add_column("other", [0] * 40).cast_column("other", datasets.ClassLabel(5))  # noqa: E731
    assert rows_of(two).facts == {}

    def with_lengths() -> datasets.Dataset:
        rows = ragged()
        rows.lengths = [len(ids) + 1 for ids in rows["ids"]]
        rows.facts = {"vocabulary": 5}
        rows.digest = lambda: "as it was"
        return rows

    rows = rows_of(with_lengths, pad=Pad(pad=0))
    assert rows.lengths().tolist() == [number % 5 + 1 for number in rows.numbers(range(len(rows)))]
    assert (rows.facts, rows.compared["digest"]) == ({"vocabulary": 5}, "as it was")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((torch.zeros(2), 1), "rows have a tuple of 2, where the task wants the keys inputs and targets: return {"),
        (torch.zeros(2), "rows have one Tensor, where"),
        ({"image": torch.zeros(2), "label": 1}, "rows have the keys image, label, where the task wants"),
        ({"inputs": torch.zeros(2), "label": 1}, "rows have the keys inputs, label, where"),
    ],
)
def test_rows_without_the_keys_of_our_tasks_are_refused_with_what_they_have(row: Any, said: str) -> None:
    class Rows:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> Any:
            return row

    settings: dict[str, Any] = {"has_split": False, "validation_fraction": 0.25, "seed": 0}
    own_splits(Rows, **settings)  # a task of one's own takes what there is
    with pytest.raises(DataError, match=re.escape(said)):
        own_splits(Rows, **settings, keys=("inputs", "targets"))


# ---------------------------------------------------------------- torchvision


@pytest.fixture(scope="module")
def vision() -> Iterator[ModuleType]:
    """The real torchvision, forgotten afterwards: what else is tested is to find none.

    Its compiled part is of a torch with CUDA and does not load beside one without. Then two of its operators, for which
    it registers shapes when it is imported, are not there, and the import fails. So they are declared here. They are of
    boxes that networks detect; transforms and data sets are Python and use none of them.
    """
    if not TORCHVISION.exists():
        assert "HARNESS_REQUIRE_TORCHVISION" not in os.environ, ".ci/run installs torchvision, yet there is none"
        pytest.skip("no torchvision in .venv/torchvision: `make .venv/torchvision` puts it there")
    library = torch.library.Library("torchvision", "DEF")
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(TORCHVISION))
    try:
        import torchvision
        import torchvision.transforms.v2
        import torchvision.tv_tensors
    finally:
        sys.path.remove(str(TORCHVISION))
    yield torchvision
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    del library


def write_photos(folder: Path, *, size: int = 24, num_each: int = 20) -> Path:
    draw = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for number in range(num_each):
            picture = draw.integers(0, 255, (size, size + number % 3, 3), dtype=np.uint8)
            PIL.Image.fromarray(picture).save(folder / name / f"{number:02}.png")
    return folder


TRANSFORMS: dict[str, Callable[[Any], list[Any]]] = {
    "crops, flips and colours": lambda v2: [
        v2.RandomResizedCrop(12),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    ],
    "RandAugment": lambda v2: [v2.Resize((12, 12)), v2.RandAugment()],
    "AutoAugment": lambda v2: [v2.Resize((12, 12)), v2.AutoAugment()],
    "some of several": lambda v2: [
        v2.Resize((12, 12)),
        v2.RandomApply([v2.GaussianBlur(3)]),
        v2.RandomChoice([v2.RandomRotation(20), v2.RandomInvert(0.5)]),
        v2.RandomOrder([v2.RandomVerticalFlip(), v2.RandomPosterize(3)]),
    ],
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_of_torchvision_give_the_same_bits_whoever_reads_the_images(
    vision: Any, tmp_path: Path, kind: str
) -> None:
    v2 = vision.transforms.v2
    folder = write_photos(tmp_path / "photos")

    def make() -> Any:
        tensors = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        return vision.datasets.ImageFolder(folder, transform=v2.Compose([*TRANSFORMS[kind](v2), *tensors]))

    rows = rows_of(make)
    before = draws.state()
    wanted = by_number(rows, positions=5)
    assert rows.draws
    assert not draws.drew(before, draws.state())
    assert len(wanted) == 50, "with those of the second epoch"
    for workers, micro_batch in ((0, 3), (1, 10), (2, 5)):
        assert by_number(rows_of(make, workers=workers), micro_batch=micro_batch, positions=5) == wanted
    later = by_number(rows_of(make, workers=2), first=3, positions=2)
    assert later == {key: wanted[key] for key in later}
    again = [number for epoch, number in wanted if epoch == 1 and (0, number) in wanted]
    assert again
    assert any(wanted[0, number] != wanted[1, number] for number in again)


def test_torchvision_draws_from_the_generator_of_torch_alone(vision: Any, tmp_path: Path) -> None:
    v2 = vision.transforms.v2
    image = PIL.Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))
    moved = []
    for make in TRANSFORMS.values():
        for transform in make(v2):
            with draws.kept():
                draws.seed(5)
                before = draws.state()
                for _ in range(20):
                    transform(image)
                after = draws.state()
            assert (before.python, before.python_spare) == (after.python, after.python_spare)
            assert not draws.drew(before, after._replace(torch=before.torch))
            moved.append(before.torch != after.torch)
    assert moved.count(False) == 3, "those that resize"


class Scenes:
    """Images with a mask and a number of boxes, all of which say where the left half of the image has gone."""

    def __init__(self, vision: Any, *, size: int) -> None:
        self.tensors, self.size = vision.tv_tensors, size
        v2 = vision.transforms.v2
        self.transform = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomCrop(size - 8),
                v2.SanitizeBoundingBoxes(),
                v2.ToDtype({self.tensors.Image: torch.float32, "others": None}, scale=True),
            ]
        )

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, i: int) -> Any:
        size, half = self.size, self.size // 2
        is_left = torch.zeros(size, size, dtype=torch.uint8)
        is_left[:, :half] = 1
        boxes = [[0.0, 0.0, half, size]] * (i % 3)  # none in every third
        return self.transform(
            {
                "image": self.tensors.Image(is_left.expand(3, -1, -1) * 255),
                "mask": self.tensors.Mask(is_left),
                "boxes": self.tensors.BoundingBoxes(
                    torch.tensor(boxes).view(-1, 4), format="XYXY", canvas_size=(size, size)
                ),
                "labels": torch.ones(i % 3, dtype=torch.int64),
            }
        )


@pytest.mark.parametrize("size", [24, 136])  # which goes as numbers, and through shared memory
def test_image_mask_and_boxes_are_changed_together_and_padded(vision: Any, size: int) -> None:
    pad = Pad(pad={"boxes": 0, "labels": -1})
    make = lambda: Scenes(vision, size=size)  # noqa: E731
    rows = rows_of(make, pad=pad)
    rows.look()
    tree = rows.take(np.arange(12), epoch=0)
    assert {path: type(leaf) for path, leaf in paths(tree)} == dict.fromkeys(tree, Tensor)
    assert torch.equal(tree["image"], tree["mask"].unsqueeze(1).expand(-1, 3, -1, -1).float())
    counts = [number % 3 for number in rows.numbers(range(12))]
    assert (tree["labels"] == 1).sum(1).tolist() == counts
    assert set(counts) == {0, 1, 2}
    for mask, boxes, count in zip(tree["mask"], tree["boxes"], counts, strict=True):
        for left, top, right, bottom in boxes[:count].long().tolist():
            assert mask[top:bottom, left:right].all()
            assert mask.sum() == (bottom - top) * (right - left)
    assert by_number(rows_of(make, pad=pad, workers=2)) == by_number(rows)


def test_images_that_no_transform_makes_tensors_of_are_told_what_to_end_it_with(vision: Any, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", num_each=4)
    ends = re.escape("has a PIL image at 0: end the transform with v2.ToImage() and v2.ToDtype(torch.float32, scale=")
    with pytest.raises(DataError, match=rf"row \d {ends}"):
        rows_of(lambda: vision.datasets.ImageFolder(folder, transform=vision.transforms.v2.RandomResizedCrop(8)))


# ---------------------------------------------------------------- docs/rows.md


def written(name: str, folder: Path) -> Path:
    """Write the file and the configuration that docs/rows.md shows; return the path of the latter."""
    text = DOCUMENT.read_text().partition("\n## Rows of other libraries")[2].partition("\n## ")[0]
    pairs = re.findall(r"```python\n# (\w+)\.py\n(.*?)```\n\n```yaml\n(.*?)```", text, re.DOTALL)
    assert [pair[0] for pair in pairs] == ["sensor_parts", "photo_parts", "story_parts"]
    code, config = {file: (code, config) for file, code, config in pairs}[name]
    (folder / f"{name}.py").write_text(code)
    (folder / "run.yaml").write_text(config)
    return folder / "run.yaml"


def write_sensors(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for split, num_rows in (("train", 200), ("validation", 40)):
        folder.mkdir(exist_ok=True)
        columns = {"readings": draw.normal(size=(num_rows, 4)).tolist(), "state": draw.integers(0, 3, num_rows)}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")


def write_stories(folder: Path) -> None:
    """Lines of 4 to 24 words out of 40."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(40)}" for _ in range(draw.randint(4, 24))) for _ in range(120)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=["?"]))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "train.txt").write_text("\n".join(texts[:100]))
    (folder / "validation.txt").write_text("\n".join(texts[100:]))


def write_photo_splits(folder: Path) -> None:
    for split in ("train", "validation"):
        write_photos(folder / split, size=40, num_each=40)


@pytest.mark.parametrize(
    ("name", "write", "draws_at_random"),
    [("sensor", write_sensors, True), ("photo", write_photo_splits, True), ("story", write_stories, False)],
)
def test_the_examples_of_the_document_make_a_loss_of_their_first_batch(
    name: str, write: Any, draws_at_random: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "photo":
        request.getfixturevalue("vision")
    path = tmp_path / f"{name}s"
    write(path)
    try:
        config = load_config(written(f"{name}_parts", tmp_path), [f"data.path={path}"]).config
        splits = config.data.open(config.task, seed=config.run.seed)
        network = config.model.build(splits.facts)
        assert isinstance(splits.train, DatasetRows)
        splits.train.look()
        assert splits.train.draws is draws_at_random
        task = config.task.build(splits, device=CPU, dtype=torch.float32)
        plan = BatchPlan(num_rows=len(splits.train), global_batch=24, world_size=1, micro_batch=None, seed=0)
        batches = TrainingBatches(splits.train, plan, rank=0, device=CPU, dtype=torch.float32)
        (batch,) = batches.at(0)
        loss = task.loss_sums(task.forward(network, batch.data), batch)["loss"]
        loss.backward()
    finally:
        use.unload()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in network.parameters())


# ---------------------------------------------------------------- tokenised text, trained


def assert_alike(found: Course, wanted: Course) -> None:
    for here, there in zip(found.terms, wanted.terms, strict=True):
        assert here == pytest.approx(there, rel=1e-12)
    assert found.norms == pytest.approx(wanted.norms, rel=1e-12)
    for name, weights in wanted.weights.items():
        torch.testing.assert_close(found.weights[name], weights, rtol=0, atol=1e-12)
    assert found.scores == pytest.approx(wanted.scores, rel=1e-12)


def test_tokenised_text_by_length_and_by_tokens_trains_as_plain_pytorch_does(tmp_path: Path) -> None:
    write_stories(tmp_path / "stories")
    written("story_parts", tmp_path)
    own = Own(
        str(tmp_path),
        precision="fp64",
        micro_batch_tokens=128,
        num_rows=None,
        padding=(("input_ids", 0), ("labels", -100)),
        overrides=(f"data.path={tmp_path / 'stories'}",),
    )
    (wanted,) = run_ranks(1, with_plain_pytorch, own)
    for world_size in (1, 2):
        courses = [of_rank[0] for of_rank in run_ranks(world_size, with_the_harness, [own])]
        assert_alike(courses[0], wanted)
        assert max(courses[0].micro_batches) > 1
        assert len({tuple(course.micro_batches) for course in courses}) == 1

"""Tables before the network sees them: everything that is learned is learned from the training rows, and saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.regression.section import RegressionTask
from harness.catalogue.table.section import TableData
from harness.config.data import DataSection
from harness.errors import DataError
from harness.export import main as export
from harness.rows.splits import DataSplits, split_rows
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main, train_main_and_listen
from tests.sections import load

REGRESSION = RegressionTask(kind="regression")


def parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()}), path)
    return path


def data(path: Path, *, targets: tuple[str, ...] = ("y",), **options: Any) -> TableData:
    return TableData(source="parquet", path=str(path), targets=targets, global_batch=2, **options)


def classes(count: int) -> ClassificationTask:
    return ClassificationTask(kind="classification", num_classes=count)


def about_columns(splits: DataSplits) -> list[str]:
    """The notices, without those about which rows judge."""
    return [notice for notice in splits.notices if "column" in notice]


def by_a_stranger(preprocessing: Mapping[str, Any], row: Mapping[str, Any]) -> list[float]:
    """The formula of the saved numbers in plain Python, from what JSON kept of them."""
    result: list[float] = []
    for feature in json.loads(json.dumps(preprocessing))["features"]:
        value = row[feature["name"]]
        if isinstance(value, float) and math.isnan(value):
            value = None
        if "categories" in feature:
            result += [float(value == category) for category in feature["categories"]]
        else:
            value = feature["fill"] if value is None else value
            result.append((value - feature["mean"]) / feature["scale"])
    return result


# ---------------------------------------------------------------- numbers


def two_files(tmp_path: Path, train: list[float | None], validation: list[float | None], **options: Any) -> DataSplits:
    paths = [
        parquet(tmp_path / f"{name}.parquet", {"a": pyarrow.array(values, pyarrow.float64()), "y": [0.0] * len(values)})
        for name, values in (("train", train), ("validation", validation))
    ]
    return load(data(paths[0], validation_path=str(paths[1]), **options), REGRESSION, seed=0)


def test_standardised_training_rows_have_mean_0_and_deviation_1_and_validation_rows_follow_them(tmp_path: Path) -> None:
    splits = two_files(tmp_path, [1.0, 2.0, 6.0], [100.0], standardize=True)
    train = splits.train.inputs[:, 0]
    assert train.mean().item() == pytest.approx(0, abs=1e-12)
    assert train.std(correction=0).item() == pytest.approx(1)
    scale = math.sqrt((4 + 1 + 9) / 3)  # about their mean, 3
    assert splits.validation.inputs.tolist() == [[pytest.approx(97 / scale)]]


@pytest.mark.parametrize(("impute", "fill"), [("mean", 4.0), ("median", 2.0)])
def test_a_missing_number_becomes_the_mean_or_median_of_the_training_rows(
    tmp_path: Path, impute: str, fill: float
) -> None:
    splits = two_files(tmp_path, [1.0, None, 9.0, 2.0, float("nan")], [None, 50.0], impute=impute)
    assert splits.train.inputs[:, 0].tolist() == [1, fill, 9, 2, fill]
    assert splits.validation.inputs[:, 0].tolist() == [fill, 50]
    (notice,) = about_columns(splits)
    assert "column 'a' has no number in 2 of 5 training rows and 1 of 2 validation rows" in notice
    assert f"; {fill:g} stands there" in notice


def test_nothing_is_said_of_filling_in_where_nothing_was_missing(tmp_path: Path) -> None:
    assert about_columns(two_files(tmp_path, [1.0, 2.0], [3.0], impute="mean")) == []
    (notice,) = about_columns(two_files(tmp_path, [1.0, 3.0], [None, 4.0], impute="mean"))
    assert notice == "column 'a' has no number in 1 of 2 validation rows; 2 stands there (data.impute)"


def test_a_column_that_never_changes_is_centred_and_not_divided_by_zero(tmp_path: Path) -> None:
    splits = two_files(tmp_path, [5.0, 5.0], [7.0], standardize=True)
    assert splits.train.inputs.tolist() == [[0], [0]]
    assert splits.validation.inputs.tolist() == [[2]]


@pytest.mark.parametrize("impute", ["none", "mean"])
def test_the_rounding_of_a_mean_is_not_taken_for_the_scale_of_a_column(tmp_path: Path, impute: str) -> None:
    assert np.full(1000, 0.1).std() > 0, "numpy's mean of a thousand times 0.1 is not 0.1"
    column = [0.1] * 1000 + ([None] if impute == "mean" else [])
    splits = two_files(tmp_path, column, [0.2], standardize=True, impute=impute)
    assert not splits.train.inputs.any()
    assert splits.validation.inputs.tolist() == [[pytest.approx(0.1)]]


def test_a_missing_number_is_refused_unless_imputing_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'a' has 1 of 2 rows .* set data\.impute"):
        two_files(tmp_path, [1.0, None], [1.0], standardize=True)
    with pytest.raises(DataError, match=r"column 'a' has no value in any of the 2 training rows"):
        two_files(tmp_path, [None, None], [1.0], impute="mean")


def test_a_missing_target_is_refused_whatever_is_imputed(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"a": [1, 2, 3], "y": [0.0, None, 1.0]})
    with pytest.raises(DataError, match=r"column 'y' has 1 of 3 rows"):
        load(data(path, impute="mean"), REGRESSION, seed=0)


# ---------------------------------------------------------------- categories


def test_each_value_of_the_training_rows_is_a_column_and_no_value_is_one_too(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"n": [5, 6, 7], "c": ["red", None, "blue"], "y": [0.0, 1.0, 2.0]})
    splits = load(data(path, categorical=("c",), validation_path=str(path)), REGRESSION, seed=0)
    assert splits.train.inputs.tolist() == [[5, 0, 1, 0], [6, 0, 0, 1], [7, 1, 0, 0]]  # n, blue, red, none
    assert splits.input_shape == (4,)
    assert about_columns(splits) == []


def test_a_value_that_only_validation_rows_have_is_all_zeros_and_told(tmp_path: Path) -> None:
    paths = [
        parquet(tmp_path / f"{number}.parquet", {"c": values, "y": [0.0] * len(values)})
        for number, values in enumerate((["a", "b"], ["b", "z", "z", None]))
    ]
    splits = load(data(paths[0], categorical=("c",), validation_path=str(paths[1])), REGRESSION, seed=0)
    assert splits.validation.inputs.tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]
    (notice,) = about_columns(splits)
    assert "column 'c' has in 3 of 4 validation rows a value that no training row has, such as 'z'" in notice


@pytest.mark.parametrize(
    ("train", "validation", "is_refused"),
    [
        (("1", "2", "3"), ("1.0", "2.0", "3.0"), True),  # as pandas writes them where one is missing
        (("1", "2", "3"), ("1.0", "", "3.0"), True),
        (("01", "02"), ("1", "2"), True),
        (("1", "2", "3"), ("1.0", "2", "3.0"), False),  # some are known
        (("1.1", "1.10"), ("1.1", "1.10"), False),
        (("1", "2"), ("4.0", "1.0"), False),  # no number of the training rows
        (("1", "2"), ("", ""), False),
        (("a", "b"), ("c", "d"), False),
    ],
)
def test_the_same_numbers_spelled_otherwise_in_the_whole_other_file_are_refused(
    train: tuple[str, ...], validation: tuple[str, ...], is_refused: bool, tmp_path: Path
) -> None:
    paths = [tmp_path / "train.csv", tmp_path / "validation.csv"]
    for path, values in zip(paths, (train, validation), strict=True):
        path.write_text("c,y\n" + "".join(f'"{value}",{row}.5\n' for row, value in enumerate(values)))
    config = data(paths[0], categorical=("c",), validation_path=str(paths[1])).model_copy(update={"source": "csv"})
    if is_refused:
        with pytest.raises(DataError, match=r"the same numbers, spelled otherwise\. Write both files alike"):
            load(config, REGRESSION, seed=0)
    else:
        load(config, REGRESSION, seed=0)


def test_categories_come_from_the_training_rows_of_a_split_file_only(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"c": list(range(10)), "y": [0.0] * 10})
    splits = load(data(path, categorical=("c",), validation_fraction=0.3), REGRESSION, seed=0)
    assert splits.train.inputs.shape == (7, 7)
    assert sorted(splits.train.inputs.argmax(dim=1).tolist()) == list(range(7))
    assert splits.validation.inputs.tolist() == [[0] * 7] * 3
    assert "in 3 of 3 validation rows" in about_columns(splits)[0]


def test_a_column_with_a_thousand_categories_or_of_lists_is_refused(tmp_path: Path) -> None:
    many = parquet(tmp_path / "many.parquet", {"c": [f"id {i}" for i in range(1500)], "y": [0.0] * 1500})
    lists = parquet(tmp_path / "lists.parquet", {"c": [[1], [2]], "y": [0.0] * 2})
    with pytest.raises(DataError, match=r"column 'c' has 1,200 different values .* stops at 1,000"):
        load(data(many, categorical=("c",)), REGRESSION, seed=0)
    with pytest.raises(DataError, match=r"column 'c' holds .*list.*, but texts, numbers or true and false"):
        load(data(lists, categorical=("c",), validation_fraction=0.5), REGRESSION, seed=0)


def test_a_text_column_that_is_not_declared_says_where_to_name_it(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"c": ["a", "b"], "y": [0.0, 1.0]})
    with pytest.raises(DataError, match=r"row 0 has 'a' .* Name it in data\.categorical"):
        load(data(path, validation_path=str(path)), REGRESSION, seed=0)


# ---------------------------------------------------------------- labels


def test_labels_that_are_texts_are_numbered_by_the_alphabet_and_saved(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"a": [1, 2, 3, 4], "y": ["no", "yes", "maybe", "no"]})
    splits = load(data(path, validation_path=str(path)), classes(3), seed=0)
    assert splits.preprocessing["classes"] == ["maybe", "no", "yes"]
    assert splits.train.targets.tolist() == [1, 2, 0, 1]


def test_a_label_that_only_the_validation_file_has_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"a": [1, 2], "y": ["no", "yes"]})
    other = parquet(tmp_path / "o.parquet", {"a": [1, 2], "y": ["no", "so"]})
    with pytest.raises(DataError, match=r"o\.parquet: column 'y' has 1 of 2 rows .* 'so', but .* 'no', 'yes' only"):
        load(data(path, validation_path=str(other)), classes(2), seed=0)


# ---------------------------------------------------------------- the stratified split


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=200),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
def test_each_class_has_its_share_of_the_validation_rows_to_within_one_row(
    labels: list[int], fraction: float, seed: int
) -> None:
    wanted = round(fraction * len(labels))
    if not 0 < wanted < len(labels):
        return
    section = DataSection(global_batch=1, validation_fraction=fraction)
    train, validation = split_rows(np.array(labels), section, seed=seed)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert len(validation) == wanted
    for label in set(labels):
        share = wanted * labels.count(label) / len(labels)
        assert abs(sum(labels[row] == label for row in validation) - share) < 1
    again = split_rows(np.array(labels), section, seed=seed)
    assert (again[0].tolist(), again[1].tolist()) == (train.tolist(), validation.tolist())


def test_without_stratify_a_rare_class_can_miss_the_validation_rows_and_with_it_cannot() -> None:
    labels = np.zeros(1000, np.int64)
    labels[:10] = 1
    found: dict[bool, set[int]] = {}
    for stratify in (False, True):
        section = DataSection(global_batch=1, validation_fraction=0.1, stratify=stratify)
        rare = [int(labels[split_rows(labels, section, seed=seed)[1]].sum()) for seed in range(30)]
        found[stratify] = set(rare)
    assert found[True] == {1}
    assert 0 in found[False]
    assert len(found[False]) > 2


def test_the_seed_decides_which_rows_of_a_class_validate() -> None:
    labels = np.arange(100) % 2
    section = DataSection(global_batch=1)
    seen = [set(split_rows(labels, section, seed=seed)[1].tolist()) for seed in range(3)]
    assert seen[0] != seen[1] != seen[2]


# ---------------------------------------------------------------- saved, exported, resumed


def mixed_rows(count: int) -> dict[str, list[Any]]:
    generator = np.random.default_rng(0)
    return {
        "age": [None if i % 11 == 3 else float(v) for i, v in enumerate(generator.normal(40, 9, count))],
        "colour": [["red", "blue", None][v] for v in generator.integers(0, 3, count)],
        "flag": [bool(v) for v in generator.integers(0, 2, count)],
        "y": [["no", "yes"][v] for v in generator.integers(0, 2, count)],
    }


def write_config(folder: Path, rows: Mapping[str, Any]) -> Path:
    path = folder / "run.json"
    config = {
        "run": {"name": "run", "output_root": str(folder), "max_steps": 8},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": data(
            parquet(folder / "rows.parquet", rows), categorical=("colour",), impute="median", standardize=True
        ).model_dump(mode="json")
        | {"global_batch": 16},
        "task": {"kind": "classification", "num_classes": 2},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
        "checkpoint": {"every_steps": 4},
    }
    path.write_text(json.dumps(config))
    return path


def test_a_stranger_can_apply_what_was_exported_and_a_resumed_run_learned_the_same(tmp_path: Path) -> None:
    rows = mixed_rows(80)
    config = write_config(tmp_path, rows)
    assert run_ranks(2, train_main, str(config)) == [0, 0]
    assert run_ranks(1, train_main, str(config), "run.max_steps=12") == [0]
    trainers = [
        json.loads((tmp_path / f"run/checkpoints/step-{step:08d}/trainer.json").read_bytes()) for step in (8, 12)
    ]
    assert trainers[0]["preprocessing"] == trainers[1]["preprocessing"]
    assert export([str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--from", "latest"]) == 0
    exported = json.loads((tmp_path / "out/config.json").read_bytes())["preprocessing"]
    assert exported == trainers[0]["preprocessing"]
    assert exported["classes"] == ["no", "yes"]
    table = data(tmp_path / "rows.parquet", categorical=("colour",), impute="median", standardize=True)
    splits = load(table, classes(2), seed=42)
    assert splits.train.inputs[:, 0].mean().item() == pytest.approx(0, abs=1e-12)  # of the training rows only
    ours = sorted([*splits.train.inputs.tolist(), *splits.validation.inputs.tolist()])
    theirs = sorted(by_a_stranger(exported, {name: rows[name][row] for name in rows}) for row in range(80))
    assert np.array(ours) == pytest.approx(np.array(theirs), abs=1e-12)


def test_a_resumed_run_on_rows_that_teach_other_numbers_is_refused(tmp_path: Path) -> None:
    rows = mixed_rows(80)
    config = write_config(tmp_path, rows)
    assert run_ranks(1, train_main, str(config)) == [0]
    write_config(tmp_path, {**rows, "age": [None if age is None else age + 1 + i for i, age in enumerate(rows["age"])]})
    ((code, said),) = run_ranks(1, train_main_and_listen, str(config), "run.max_steps=12")
    assert code == 3
    assert "the data are not those that" in said

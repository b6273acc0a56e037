"""`harness verify`: whoever asks hears of every checkpoint, and nothing is changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.launch import cli
from harness.launch.verify import checkpoint_lines
from harness.record import manifest
from tests.distributed.scenarios import Spec, assemble_spec, save_now

MODEL = "model-00000.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3, of which 2 is the best."""
    folder = tmp_path_factory.mktemp("run")
    run = assemble_spec(Spec(), str(folder))
    run.checkpoints._config = run.checkpoints._config.model_copy(update={"keep_last": 9})
    for step in (1, 2, 3):
        save_now(run.checkpoints, step, is_best=step == 2)
    return folder


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    code = cli.main(["verify", *arguments])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def test_whole_checkpoints_are_listed_newest_first_with_their_marks(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, _ = told(capsys, str(run))
    assert code == 0
    assert [line[:13] for line in lines] == ["step-00000003", "step-00000002", "step-00000001"]
    assert all("whole: 4 files" in line for line in lines)
    assert [line.split("  ")[2:] for line in lines] == [["LATEST"], ["BEST"], []]


def test_a_flipped_bit_is_told_with_its_file_and_exit_code_4_and_left_where_it_is(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints/step-00000003" / MODEL
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = sorted(run.rglob("*"))
    code, lines, error = told(capsys, str(run))
    assert code == 4
    assert lines[0] == f"step-00000003  {MODEL} is not what was written: its SHA-256 differs"
    assert "1 of 3 checkpoints are broken" in error
    assert "goes on from the newest whole one" in error
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("name", ["", "COMMIT.json", MODEL])
def test_a_link_is_told_as_one_and_not_as_a_save_that_was_cut_off(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints/step-00000003" / name
    path.symlink_to(path.rename(tmp_path / path.name))
    code, lines, _ = told(capsys, str(run))
    assert code == 4
    assert lines[0].startswith(f"step-00000003  {path.name} is a link, which may lead anywhere")


def test_beside_a_checkpoint_of_another_version_the_others_are_told_all_the_same(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "checkpoints/step-00000003"
    foreign = manifest.read_manifest(path)
    monkeypatch.setattr(manifest, "SCHEMA", manifest.SCHEMA + 1)
    (path / "COMMIT.json").write_bytes(foreign.to_bytes())
    monkeypatch.undo()
    code, lines, error = told(capsys, str(run))
    assert code == 4
    assert [line.split("  ")[1][:16] for line in lines] == ["of another versi", "whole: 4 files, ", "whole: 4 files, "]
    assert error.count("CheckpointError") == 1
    assert f"has schema {manifest.SCHEMA + 1}, this harness reads {manifest.SCHEMA}" in error


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_called_broken(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = checkpoint_lines(run)
    assert next(lines).startswith("step-00000003  whole")
    shutil.rmtree(run / "checkpoints/step-00000002")
    assert [line.split("  ")[1][:5] for line in lines] == ["delet", "whole"]


def test_checkpoints_that_were_set_aside_earlier_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, num_whole, wanted in ((3, 2, 0), (2, 1, 0), (1, 0, 4)):
        path = run / f"checkpoints/step-{step:08d}"
        (run / "checkpoints/quarantine").mkdir(exist_ok=True)
        path.rename(run / f"checkpoints/quarantine/{path.name}-0123abcd")
        code, lines, error = told(capsys, str(run))
        assert code == wanted
        assert len(lines) == num_whole + 1
        assert lines[-1] == f"quarantine/  {4 - step} set aside at earlier starts; why: {run}/events.jsonl"
    assert "there is no checkpoint" in error


def test_a_folder_that_is_no_run_and_a_run_without_checkpoints_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = told(capsys, str(tmp_path))
    assert code == 2
    assert "is not a run directory" in error
    (tmp_path / "checkpoints").mkdir()
    code, _, error = told(capsys, str(tmp_path))
    assert code == 4
    assert "there is no checkpoint" in error

"""`harness export`: the network of any strategy's checkpoint, on one process, without the engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import harness.export
from harness.config.io import load_config
from harness.export import find_checkpoint, load_exported, main
from tests import helpers
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main
from tests.distributed.test_checkpoints import seal_trainer
from tests.sections import load


def write_config(folder: Path, strategy: str) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 3, generator=generator).tolist()
    (folder / "rows.csv").write_text("a,b,y\n" + "\n".join(",".join(map(str, row)) for row in rows))
    values: dict[str, Any] = {
        "run": {"name": "run", "output_root": str(folder), "max_steps": 20},
        "model": {"kind": "mlp", "hidden": [16], "norm": "batch", "dropout": 0.2},
        "data": {"source": "csv", "path": str(folder / "rows.csv"), "targets": ["y"], "global_batch": 16},
        "task": {"kind": "regression"},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
        "evaluation": {"every_steps": 10},
        "checkpoint": {"every_steps": 5, "keep_last": 9},
        "strategy": {"kind": strategy},
    }
    return helpers.write_config(folder / "run.yaml", values)


def saved_model(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/model-00000.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_the_exported_network_is_the_one_that_was_evaluated(strategy: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, strategy)
    assert run_ranks(2, train_main, str(config)) == [0, 0]
    arguments = [str(tmp_path / "run"), "--to", str(tmp_path / "out")]
    if strategy == "ddp":
        command = [sys.executable, "-m", "harness.launch.cli", "export", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        assert main(arguments) == 0
    described = json.loads((tmp_path / "out/config.json").read_bytes())
    exported, saved = load_file(tmp_path / "out/model.safetensors"), saved_model(tmp_path / "run", described["step"])
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    # The scores of the checkpoint are those of the exported network on the rows that validated.
    loaded = load_config(str(config)).config
    rows = load(loaded.data, loaded.task, seed=loaded.run.seed).validation
    network = load_exported(tmp_path / "out")
    with torch.no_grad():
        loss = torch.nn.functional.mse_loss(network(rows.inputs.float()), rows.targets.float()).item()
    assert loss == pytest.approx(described["metrics"]["val/loss"], rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    assert run_ranks(1, train_main, str(write_config(folder, "ddp"))) == [0]
    return folder / "run"


@pytest.mark.parametrize(("which", "step"), [("latest", 20), ("5", 5), ("15", 15)])
def test_any_checkpoint_can_be_asked_for(run: Path, which: str, step: int, tmp_path: Path) -> None:
    assert main([str(run), "--to", str(tmp_path / "out"), "--from", which]) == 0
    assert json.loads((tmp_path / "out/config.json").read_bytes())["step"] == step
    exported, saved = load_file(tmp_path / "out/model.safetensors"), saved_model(run, step)
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_the_latest_is_the_newest_also_where_a_kill_came_before_the_pointer(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints/step-00000020")
    assert find_checkpoint(copy, "latest").name == "step-00000015"
    (copy / "checkpoints/LATEST").unlink()
    assert find_checkpoint(copy, "latest").name == "step-00000015"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{run}", "--to", "{tmp}/out", "--from", "newest"], 4, "has no newest checkpoint; there are steps 20"),
        (["{run}", "--to", "{tmp}/out", "--from", "7"], 4, "there are steps 20, 15, 10, 5 (--from STEP)"),
        (["{tmp}", "--to", "{tmp}/out"], 2, "is not a run directory"),
        (["{run}", "--to", "{run}"], 2, "is there already; give the name of a new folder"),
    ],
)
def test_what_cannot_be_exported_says_what_to_type(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, arguments: list[str], code: int, words: str
) -> None:
    assert main([argument.format(run=run, tmp=tmp_path) for argument in arguments]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sealed_checkpoint_of_nonsense_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(run, tmp_path / "copy")) / "checkpoints/step-00000010"
    trainer = json.loads((checkpoint / "trainer.json").read_bytes())
    seal_trainer(checkpoint, json.dumps({**trainer, "input_shape": None}))
    assert main([str(tmp_path / "copy"), "--to", str(tmp_path / "out"), "--from", "10"]) == 4
    assert f"{checkpoint}/trainer.json is not what this harness writes" in (said := capsys.readouterr().err)
    assert "input_shape: null is not a list" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "model: {"])
def test_a_run_without_its_config_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    config = Path(shutil.copytree(run, tmp_path / "copy")) / "config.yaml"
    config.unlink()
    if content:
        config.write_text(content)
    assert main([str(tmp_path / "copy"), "--to", str(tmp_path / "out")]) == 2
    assert "start the run's command again, which writes it anew" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    path = copy / "checkpoints/step-00000010/model-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert main([str(copy), "--to", str(tmp_path / "out"), "--from", "10"]) == 4
    assert "its SHA-256 differs. Choose another with --from STEP" in capsys.readouterr().err


@pytest.mark.parametrize("before", ["checkpoint_problems", "read_manifest", "check_trainer"])
def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_called_broken(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    go_on = getattr(harness.export, before)

    def delete_first(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(find_checkpoint(copy, "latest"), ignore_errors=True)
        return go_on(*arguments, **options)

    monkeypatch.setattr(harness.export, before, delete_first)
    assert main([str(copy), "--to", str(tmp_path / "out"), "--from", "latest"]) == 4
    assert "was deleted by the run meanwhile. Start the same command again" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [copy]

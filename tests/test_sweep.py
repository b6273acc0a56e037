"""Runs that the agent of a wandb sweep starts."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from harness.config.io import load_config
from harness.config.sweep import swept
from harness.errors import ConfigError
from tests.distributed.ranks import run_ranks

MNIST = Path(__file__).parents[1] / "configs/mnist_cnn.yaml"


@pytest.fixture(autouse=True)
def wandb_leaves_its_temporary_files_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def asked_for(folder: Path, values: dict[str, Any]) -> dict[str, str]:
    """The environment that an agent gives a run; its file is written by wandb's own function, as the agent does it."""
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    path = folder / "wandb/sweep-s1/config-r1.yaml"
    save_config_file_from_dict(str(path), {key: {"value": value} for key, value in values.items()})
    return {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1", "WANDB_SWEEP_PARAM_PATH": str(path)}


def test_the_values_of_a_sweep_go_before_the_command_line_and_are_validated_like_it(tmp_path: Path) -> None:
    environment = asked_for(tmp_path, {"optim.peak_lr": 1e-5, "model": {"hidden": [8, 4]}, "clip": {"max_norm": 0.5}})
    overrides = swept(["optim.peak_lr=1", "run.seed=7"], name="a", environment=environment)
    config = load_config(MNIST, overrides).config
    assert config.optim.peak_lr == 1e-5
    assert config.model.hidden == (8, 4)
    assert (config.run.seed, config.run.name) == (7, "a-r1")
    assert swept(overrides, name="a-r1", environment=environment)[-4:] == overrides[-4:]  # the launcher was here
    wrong = asked_for(tmp_path, {"optim.peak_lrr": 1})
    with pytest.raises(ConfigError, match=r"optim\.peak_lrr: unknown key \(nearest: peak_lr"):
        load_config(MNIST, swept([], name="a", environment=wrong))


def test_without_an_agent_nothing_is_changed(tmp_path: Path) -> None:
    assert swept(["a=1"], name="a", environment={"WANDB_RUN_ID": "r1"}) == ["a=1"]
    environment = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "none.yaml")}
    with pytest.raises(ConfigError, match=r"WANDB_SWEEP_PARAM_PATH: \S+/none\.yaml cannot be read"):
        swept([], name="a", environment=environment)
    (tmp_path / "none.yaml").write_text("optim.peak_lr: 0.1")
    with pytest.raises(ConfigError, match="is not what an agent of wandb writes: a parameter has no value"):
        swept([], name="a", environment=environment)


def train_where_only_rank_zero_hears(environment: dict[str, str], *arguments: str) -> int:
    from harness.train import main

    if os.environ["RANK"] == "0":
        os.environ.update(environment)
    return main(list(arguments))


@pytest.mark.slow
def test_what_rank_zero_is_asked_for_is_what_all_ranks_train(tmp_path: Path) -> None:
    config = {
        "run": {"name": "a", "output_root": str(tmp_path), "max_steps": 3},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "mnist_5k", "global_batch": 8},
        "task": {"kind": "classification", "num_classes": 10},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
        "tracking": {"wandb": {}, "report": False},
    }
    (tmp_path / "a.yaml").write_text(json.dumps(config))
    asked = asked_for(tmp_path, {"model.hidden": [6], "optim.peak_lr": 0.25})
    environment = {**asked, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    arguments = (environment, str(tmp_path / "a.yaml"))
    assert run_ranks(2, train_where_only_rank_zero_hears, *arguments, deadline_seconds=120) == [0, 0]
    stored = load_config(tmp_path / "a-r1/config.yaml").config
    assert (stored.model.hidden, stored.optim.peak_lr) == ((6,), 0.25)
    assert json.loads((tmp_path / "a-r1/run.json").read_text())["id"] == "r1"
    assert len(list((tmp_path / "a-r1").glob("wandb/offline-run-*-r1/run-r1.wandb"))) == 1

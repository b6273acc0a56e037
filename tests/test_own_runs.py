"""Whole runs with parts of a user's file: what is taken from the data, stored, compared, exported and tracked."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.config import use
from harness.export import load_exported
from harness.parts import registered
from harness.record.json_lines import read_events
from tests.helpers import wait_until, write_small_table

PARTS = """\
from torch import nn
import harness
from harness.tracking.tracker import Opened, Tracker

@harness.model("tower")
class Tower(nn.Module):
    def __init__(self, features: int, classes: int, hidden: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, rows):
        return self.layers(rows)

@harness.tracker("lines")
class Lines(Tracker):
    def open(self, *, offline):
        (self.run.directory / "lines.txt").write_text(self.run.config.model.kind)
        return Opened(text="")

    def describe(self, facts): ...
    def log(self, row): ...
    def close(self, *, exit_code): return ""
"""

pytestmark = pytest.mark.slow
Train = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Train a configuration with a network of `my_parts.py`, in a process of its own."""
    (tmp_path / "my_parts.py").write_text(PARTS)

    def trained(*overrides: str, **sections: Any) -> subprocess.CompletedProcess[str]:
        own = {"use": ["my_parts.py"], "run": {"name": "a", "max_steps": 2}, "model": {"kind": "tower"}}
        path = write_small_table(tmp_path, name="a", **{**own, **sections})
        command = [sys.executable, "-m", "harness.train", path.name, "tracking.report=false", *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment())

    return trained


def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def succeeded(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_a_network_takes_of_the_data_is_said_stored_and_compared_when_the_run_goes_on(
    train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    lines = succeeded(train())
    assert {"model.features: 2, from the data", "model.classes: 2, from the data"} <= set(lines)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["model"] == {"kind": "tower", "features": 2, "classes": 2, "hidden": 8}
    identity = json.loads((run / "run.json").read_text())
    assert [Path(file["file"]).name for file in identity["use"]] == ["my_parts.py"]
    assert identity["facts"]["features"] == 2

    assert "model.features: 2, from the data" in succeeded(train("run.max_steps=3"))
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == stored["model"]

    other = train("run.max_steps=4", "data.features=[a]")  # which is told first, since it is another key
    assert "data.features: stored null" in other.stderr

    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("features: 2\n", "features: 3\n"))  # as if the rows had been wider
    refused = train("run.max_steps=4")
    assert refused.returncode == 2
    assert "holds another run: model.features was 3, and the data say 2 now" in refused.stderr
    assert "features: 3\n" in (run / "config.yaml").read_text(), "what was refused changes nothing"


def test_a_value_that_the_data_do_not_say_is_refused(train: Train) -> None:
    refused = train("model.features=3")
    assert refused.returncode == 2
    assert "model.features: 3, but the data say 2; leave it out, or mend the data" in refused.stderr


def test_code_that_has_changed_is_told_and_refused_by_the_names_of_its_tensors(train: Train, tmp_path: Path) -> None:
    succeeded(train())
    parts = tmp_path / "my_parts.py"
    told = (
        "the code of my_parts.py is not what it was when the run was last started; a network whose tensors have other"
    )
    parts.write_text(PARTS.replace("ReLU", "GELU"))
    assert any(line.startswith(told) for line in succeeded(train("run.max_steps=3")))
    assert not any(line.startswith(told) for line in succeeded(train("run.max_steps=4"))), "it is told once"
    parts.write_text(PARTS.replace("self.layers", "self.stack"))
    refused = train("run.max_steps=5")
    assert refused.returncode != 0
    assert "model/stack.0" in refused.stderr or "model/layers.0" in refused.stderr
    parts.write_text(PARTS.replace("hidden: int = 8", "hidden: int = 8, depth: int = 2"))  # a key with a default
    succeeded(train("run.max_steps=5"))


def test_a_run_is_exported_and_loaded_with_the_file_that_brings_its_network(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded(train())
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "harness.export", "runs/a", "--to", "exported"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert (
        "model.kind: 'tower' is not built in; my_parts.py has brought it. Type: harness export runs/a --to exported "
        in (refused.stderr)
    )
    subprocess.run([*command, "--use", "my_parts.py"], check=True, capture_output=True)
    assert not registered().of("model").get("tower")
    with pytest.raises(Exception, match=r"'tower' is not built in; my_parts.py has brought it"):
        load_exported("exported")
    try:
        network = load_exported("exported", use=["my_parts.py"])
        assert network(torch.zeros(3, 2)).shape == (3, 2)
    finally:
        use.unload()


def test_a_tracker_of_the_file_runs_in_its_own_process_and_a_strangers_run_directory_is_plain_data(
    train: Train, tmp_path: Path
) -> None:
    succeeded(train("tracking.own=[lines]"))
    run = tmp_path / "runs" / "a"
    wait_until((run / "lines.txt").exists, "the tracker")
    assert (run / "lines.txt").read_text() == "tower"
    (tmp_path / "my_parts.py").write_text("raise SystemExit('it ran')")
    for command in (["status", "runs/a"], ["runs", "runs"], ["verify", "runs/a"], ["report", "runs/a"]):
        done = subprocess.run(
            [sys.executable, "-m", "harness.launch.cli", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "it ran" not in done.stdout + done.stderr
    assert not any("it ran" in str(event) for event in read_events(run))
    refused = subprocess.run(
        [sys.executable, "-m", "harness.launch.cli", "train", "runs/a/config.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "whose `use` is not followed: it may be somebody else's" in refused.stderr


def test_the_command_of_the_report_brings_the_file_that_a_stored_configuration_may_not(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "beside.py").write_text("WIDTH = 8\n")  # in run.json as well, and registers nothing
    (tmp_path / "my_parts.py").write_text(PARTS.replace("import harness\n", "import beside\nimport harness\n", 1))
    succeeded(train())
    report = [sys.executable, "-m", "harness.launch.cli", "report", "runs/a"]
    subprocess.run(report, cwd=tmp_path, check=True, capture_output=True)
    page = (tmp_path / "runs" / "a" / "report.html").read_text()
    commands = [html.unescape(found) for found in re.findall(r"<pre>(harness launch .*?)</pre>", page)]
    (command,) = [found for found in commands if "run.name=a-again" in found]
    _, _, config, _, _, *overrides = shlex.split(command)
    again = [sys.executable, "-m", "harness.train", config, *overrides]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

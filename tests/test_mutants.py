"""The mutants of `make mutants`, and that what runs them can tell what a test has seen."""

from __future__ import annotations

import ast
import os
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import wait_until
from tests.mutants.mutant import Mutant
from tests.mutants.runner import REPOSITORY, Runner, Stopped
from tests.mutants.table import MUTANTS, ROOMS


def test_every_mutant_is_one_mistake_in_a_text_that_stands_once_in_its_file() -> None:
    for mutant in MUTANTS:
        text = (REPOSITORY / mutant.path).read_text()
        mutated = mutant.mutated(text)
        assert mutated != text, mutant.name
        ast.parse(mutated, filename=mutant.name)


def test_every_room_has_its_mutants() -> None:
    assert len(MUTANTS) >= 60
    assert min(map(len, ROOMS.values())) >= 4
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


def test_the_tests_that_should_see_a_mutant_are_there() -> None:
    for mutant in MUTANTS:
        assert mutant.tests, mutant.name
        for file, _, name in (test.partition("::") for test in mutant.tests):
            assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text() or not name, (mutant.name, name)


# ---------------------------------------------------------------- on a repository of its own

PRODUCT = """
def total(a, b):
    return a + b


def half(a):
    return a / 2


WAITS = False
"""
NEAR = """
import os, subprocess
from harness import sums


def test_that_fails_anyway():
    assert sums.total(1, 1) == 3


def test_a_total():
    assert sums.total(1, 2) == 3


def test_that_waits():
    if sums.WAITS:
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        with open(os.environ["CHILD_OF_A_MUTANT"], "w") as file:
            file.write(str(child.pid))
        child.wait()
"""
FAR = """
from harness import sums


def test_a_half():
    assert sums.half(4) == 2
"""
WRONG_TOTAL = Mutant("wrong_total", "harness/sums.py", "a + b", "a - b", ("test_near.py",))
WRONG_HALF = Mutant("wrong_half", "harness/sums.py", "a / 2", "a * 2", ("test_near.py::test_a_total",))
WAITING = Mutant("waiting", "harness/sums.py", "WAITS = False", "WAITS = True", ("test_near.py",))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository whose last commit has a test of a half only."""
    root = tmp_path / "checkout"
    for path in ("harness/__init__.py", "launch/__init__.py", "tests/__init__.py"):
        (root / path).parent.mkdir(parents=True)
        (root / path).touch()
    (root / "harness/launch").symlink_to("../launch")
    (root / "harness/sums.py").write_text(PRODUCT)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (root / "tests/test_near.py").write_text("def test_of_nothing():\n    pass\n")
    (root / "tests/test_far.py").write_text(FAR)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *identity, *command], cwd=root, check=True)
    (root / "tests/test_near.py").write_text(NEAR)
    return root


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    folder = tmp_path / "copies"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_a_mutant_is_killed_by_the_first_test_that_fails_with_it_and_not_without_it(
    checkout: Path, copies: Path
) -> None:
    outcome = Runner(checkout, copies).try_mutant(WRONG_TOTAL)
    assert (outcome.end, outcome.killed_by) == ("killed", "tests/test_near.py::test_a_total")
    assert outcome.red_anyway == ["tests/test_near.py::test_that_fails_anyway"]
    assert (checkout / "harness/sums.py").read_text() == PRODUCT
    assert [path.name for path in copies.iterdir()] == ["whole"]


@pytest.mark.slow
def test_with_the_tests_of_a_commit_a_mutant_survives_that_only_a_test_elsewhere_saw(
    checkout: Path, copies: Path
) -> None:
    runner = Runner(checkout, copies, tests_from="HEAD")
    assert runner.try_mutant(WRONG_HALF).end == "survived"
    assert runner.try_mutant(WRONG_HALF, rest=True).killed_by == "tests/test_far.py::test_a_half"


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True])
def test_nothing_is_left_of_a_mutant_that_hangs(
    checkout: Path, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    told = tmp_path / "child"
    monkeypatch.setenv("CHILD_OF_A_MUTANT", str(told))
    runner = Runner(checkout, copies, deadline_seconds=120 if is_stopped else 10)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(runner.try_mutant, WAITING)
        wait_until(lambda: told.exists() and told.read_text(), "the test that waits has begun")
        if is_stopped:
            runner.stop()
            with pytest.raises(Stopped):
                future.result()
        else:
            assert future.result().end == "ran out of time"
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
    assert [path.name for path in copies.iterdir()] == ["whole"]


def test_tests_that_would_import_another_product_than_the_copy_are_refused(checkout: Path, copies: Path) -> None:
    (checkout / "launch/__init__.py").unlink()
    with pytest.raises(RuntimeError, match="in the place of the copy"):
        Runner(checkout, copies)

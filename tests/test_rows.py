"""The rows of a tracker, from a ledger's lines."""

import contextlib
import inspect
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from harness.config.io import dump_config, load_config
from harness.errors import ConfigError
from harness.record.json_lines import read_lines
from harness.tracking.build import TRACKERS, build_tracker
from harness.tracking.points import Row, Rows
from harness.tracking.tensorboard import TensorBoardTracker
from harness.tracking.track import Projection, Silence, exit_code_of
from harness.tracking.tracker import Opened, TrackedRun, Tracker
from tests.children import start_python
from tests.distributed.ranks import run_ranks

REPOSITORY = Path(__file__).parents[1]
MNIST = REPOSITORY / "configs/mnist_cnn.yaml"


def update(step: int, **changes: Any) -> dict[str, Any]:
    line = {"event": "update", "step": step, "loss": 1 / step, "grad_norm": 4.0, "clip_coefficient": 0.25}
    return {**line, "learning_rate": 0.1, "num_targets": 8, "samples_seen": 8 * step, "applied": True, **changes}


def evaluation(step: int, loss: float | None) -> dict[str, Any]:
    return {"event": "evaluation", "step": step, "metrics": {"val/loss": loss}}


def rows_of(lines: list[dict[str, Any]], *, every_steps: int = 5) -> list[Row]:
    rows = Rows(load_config(MNIST).config, every_steps=every_steps)
    return [row for line in lines for row in rows.take(line)] + list(rows.rest())


def test_a_row_has_its_update_and_its_evaluation_and_the_best_so_far() -> None:
    lines = [update(step) for step in range(1, 11)]
    lines[7:7] = [evaluation(7, 0.5)]
    rows = rows_of([*lines, evaluation(10, 0.75)])
    assert [row.step for row in rows] == [5, 7, 10]
    assert [row.figures["trainer/global_step"] for row in rows] == [5, 7, 10]
    assert rows[0].figures["train/loss"] == 0.2
    assert rows[0].figures["train/grad_norm_clipped"] == 1.0
    assert "val/loss" not in rows[0].figures
    assert (rows[1].figures["val/loss"], rows[1].figures["best/val/loss"]) == (0.5, 0.5)
    assert (rows[2].figures["val/loss"], rows[2].figures["best/val/loss"], rows[2].figures["best/step"]) == (
        0.75,
        0.5,
        7,
    )


def test_the_share_of_clipped_updates_is_that_since_the_row_before() -> None:
    lines = [update(step, clip_coefficient=1.0 if step in (1, 2, 6) else 0.5) for step in range(1, 11)]
    assert [row.figures["train/clipped_fraction"] for row in rows_of(lines)] == [3 / 5, 4 / 5]


def test_a_skipped_update_is_counted_and_is_no_row() -> None:
    skipped = update(5, applied=False, loss=None, grad_norm=None, clip_coefficient=None)
    rows = rows_of([*(update(step) for step in range(1, 5)), skipped, skipped, update(5), update(6)])
    assert [(row.step, row.figures["trainer/skipped_updates"]) for row in rows] == [(5, 2)]
    assert rows[0].figures["train/loss"] == 0.2


def test_an_evaluation_after_a_skipped_update_is_in_the_row_of_the_last_applied_one() -> None:
    skipped = update(6, applied=False, loss=None, grad_norm=None, clip_coefficient=None)
    rows = rows_of([*(update(step) for step in range(1, 6)), skipped, evaluation(5, 0.5), update(6)])
    assert [(row.step, row.figures["val/loss"], row.figures["train/loss"]) for row in rows] == [(5, 0.5, 0.2)]


def test_what_was_not_finite_is_left_out_of_a_row_and_is_never_the_best() -> None:
    (row,) = rows_of([*(update(step) for step in range(1, 6)), evaluation(5, None)])
    assert "val/loss" not in row.figures
    assert "best/step" not in row.figures
    assert all(math.isfinite(value) for value in row.figures.values())


def test_a_matrix_of_an_evaluation_is_no_figure() -> None:
    scores = {"val/loss": 0.5, "val/confusion_matrix": [[3, 1], [0, 4]]}
    (row,) = rows_of([update(5), {"event": "evaluation", "step": 5, "metrics": scores}])
    assert row.matrices == {"val/confusion_matrix": [[3, 1], [0, 4]]}
    assert row.figures["val/loss"] == 0.5
    assert "val/confusion_matrix" not in row.figures


def test_validation_rows_come_in_the_row_of_their_evaluation() -> None:
    rows = Rows(load_config(MNIST).config, every_steps=5)
    rows.take_event({"event": "samples", "step": 7, "columns": ["row", "target"], "rows": [[0, 3]]})
    lines = [*(update(step) for step in range(1, 8)), evaluation(7, 0.5), *(update(step) for step in range(8, 12))]
    found = [row for line in lines for row in rows.take(line)]
    assert [(row.step, row.tables) for row in found] == [
        (5, {}),
        (7, {"val/samples": (["row", "target"], [[0, 3]])}),
        (10, {}),
    ]


def test_what_is_told_once_an_interval_is_in_every_row() -> None:
    lines = [update(step) for step in range(1, 11)]
    lines[2] |= {"samples_per_second": 80.0, "data_wait_fraction": 0.5, "memory_bytes": 7}
    for row in rows_of(lines):
        assert row.figures["throughput/samples_per_second"] == 80.0
        assert row.figures["time/data_wait_fraction"] == 0.5
        assert row.figures["memory/max_bytes_over_ranks"] == 7


def test_norms_of_parameters_come_in_the_row_of_their_step() -> None:
    rows = Rows(load_config(MNIST).config, every_steps=5)
    rows.take_event({"event": "gradients", "step": 3, "norms": {"a.weight": 2.0}})
    found = [row for step in range(1, 7) for row in rows.take(update(step))]
    assert [row.step for row in found] == [3, 5]
    assert found[0].figures["gradient_norm/a.weight"] == 2.0
    assert "gradient_norm/a.weight" not in found[1].figures


# ---------------------------------------------------------------- from files to a tracker


class Memory(Tracker):
    """A tracker that keeps what it hears."""

    every_steps = 2

    def open(self, *, offline: bool) -> Opened:
        self.steps: list[int] = []
        self.alerts: list[str] = []
        self.exit_code: int | None = None
        return Opened("in memory")

    def describe(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def log(self, row: Row) -> None:
        self.steps.append(row.step)

    def alert(self, title: str, text: str) -> None:
        self.alerts.append(title)

    def close(self, *, exit_code: int) -> str:
        self.exit_code = exit_code
        return ""


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    config = load_config(MNIST, ["tracking.tensorboard={log_every_steps: 2}"]).config
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return TrackedRun(tmp_path, config, "abc")


def add(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_ledger_that_grows_is_told_line_by_line_and_a_half_line_waits(run: TrackedRun) -> None:
    tracker = Memory(run)
    tracker.open(offline=True)
    ledger = run.directory / "ledger.jsonl"
    projection = Projection(tracker, opened=Opened("", last_step=0), on_problem=pytest.fail)
    projection.advance()  # there is nothing yet
    add(ledger, update(1), update(2))
    whole = json.dumps(update(3))
    with ledger.open("a") as file:
        file.write(whole[:20])
    projection.advance()
    assert tracker.steps == []  # an evaluation may follow the second update
    with ledger.open("a") as file:
        file.write(whole[20:] + "\n")
    projection.advance()
    assert tracker.steps == [2]
    add(ledger, update(4))
    add(run.directory / "events.jsonl", {"event": "ended", "reason": "budget", "step": 4})
    projection.advance()
    projection.end()
    assert (tracker.steps, tracker.exit_code) == ([2, 4], 0)


def test_the_last_row_of_a_killed_run_waits_for_the_run_to_come_to_it_again(run: TrackedRun) -> None:
    tracker = Memory(run)
    tracker.open(offline=True)
    projection = Projection(tracker, opened=Opened("", last_step=0), on_problem=pytest.fail)
    add(run.directory / "ledger.jsonl", *(update(step) for step in range(1, 5)))
    projection.advance()
    projection.end()
    assert (tracker.steps, tracker.exit_code) == ([2], 255)


def test_nobody_is_alerted_twice_and_rows_that_are_there_are_not_logged(run: TrackedRun) -> None:
    events = run.directory / "events.jsonl"
    add(
        events,
        {"event": "nonfinite", "step": 1, "parameter": "a"},
        {"event": "ended", "step": 1, "reason": "interrupted"},
    )
    of_this_launch = events.stat().st_size
    add(events, {"event": "started", "num_parameters": 7, "strategy": "ddp"})
    add(events, {"event": "failed", "step": 9, "code": 6, "reason": "NaN"})
    add(run.directory / "ledger.jsonl", *(update(step) for step in range(1, 8)))
    tracker = Memory(run)
    tracker.open(offline=True)
    told: list[int] = []
    projection = Projection(
        tracker,
        opened=Opened("", last_step=4),
        events_from=of_this_launch,
        alerts_from=of_this_launch,
        on_alert=told.append,
        on_problem=pytest.fail,
    )
    projection.advance()
    projection.end()
    assert (tracker.steps, tracker.alerts, tracker.exit_code) == ([6], ["failed"], 6)
    assert events.read_bytes()[told[0] :].startswith(b'{"event": "failed"')
    assert tracker.facts == {"num_parameters": 7}  # "strategy" is a section of the configuration


@pytest.mark.parametrize("broken", ["{broken", "[1]", '{"event": "update", "step": 2}', '{"step": 2}'])
def test_a_broken_line_is_named_with_its_place_and_the_others_are_shown(run: TrackedRun, broken: str) -> None:
    lines = [json.dumps(update(1)), broken, *(json.dumps(update(step)) for step in (2, 3))]
    (run.directory / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    tracker = Memory(run)
    tracker.open(offline=True)
    told: list[str] = []
    projection = Projection(tracker, opened=Opened("", last_step=0), on_problem=told.append)
    projection.advance()
    projection.end()
    assert told == [f"{run.directory / 'ledger.jsonl'}: the line at byte {len(lines[0]) + 1} is broken and left out"]
    assert tracker.steps == [2]


def test_a_silent_run_is_told_of_once_until_it_speaks_again() -> None:
    silence = Silence(10)
    told = [silence.is_too_long(now=now, has_news=now in (0, 5, 40)) for now in range(60)]
    assert [now for now, is_told in enumerate(told) if is_told] == [15, 50]
    assert not any(Silence(None).is_too_long(now=now, has_news=False) for now in (0, 1e9))


def test_how_a_run_ended_is_told_by_its_last_events() -> None:
    assert exit_code_of({"event": "ended", "reason": "early_stopping"}, before=None) == 0
    assert exit_code_of({"event": "ended", "reason": "interrupted"}, before=None) == 75
    assert exit_code_of({"event": "saved"}, before=75) == 75
    assert exit_code_of({"event": "started"}, before=75) is None


# ---------------------------------------------------------------- a process of its own


def test_what_libraries_print_does_not_reach_the_training_and_a_training_that_is_gone_ends_nothing() -> None:
    script = """
import sys
from harness.tracking.track import _take_standard_output
tell = _take_standard_output()
print("noise")
tell({"text": "heard"})
sys.stdin.readline()
tell({"text": "by nobody"})
tell({"text": "by nobody"})
print("still here", flush=True)
"""
    child = start_python(script)
    assert child.stdout is not None
    assert json.loads(child.stdout.readline()) == {"text": "heard"}
    child.stdout.close()
    _, log = child.communicate("go\n", timeout=60)
    assert (child.returncode, log) == (0, "noise\nstill here\n")


OWN = """
import json
from harness.tracking.tracker import Opened, Tracker

class Lines(Tracker):
    def open(self, *, offline):
        self.file = open(self.run.directory / "lines.jsonl", "w")
        return Opened("lines: in lines.jsonl")

    def describe(self, facts):
        print(json.dumps({"world_size": facts["world_size"]}), file=self.file)

    def log(self, row):
        print(json.dumps([row.step, row.figures["train/loss"]]), file=self.file)

    def close(self, *, exit_code):
        print(json.dumps(exit_code), file=self.file)
        return "lines: closed"
"""


def train_in(folder: str, *arguments: str) -> tuple[int, str]:
    """Train in a folder, as `python -m harness.train` there; return the exit code and what was said on stdout."""
    from harness.train import main

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return main(list(arguments)), said.getvalue()


@pytest.mark.slow
def test_a_tracker_of_ones_own_is_one_file_and_a_word_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    config = {
        "run": {"name": "a", "output_root": "runs", "max_steps": 20},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "mnist_5k", "global_batch": 8},
        "task": {"kind": "classification", "num_classes": 10},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
    }
    (tmp_path / "a.yaml").write_text(json.dumps(config))
    ((code, said),) = run_ranks(1, train_in, str(tmp_path), "a.yaml", "tracking={own: [mine.Lines], report: false}")
    assert code == 0
    lines = (tmp_path / "runs/a/lines.jsonl").read_text().splitlines()
    losses = {line["step"]: line["loss"] for line in read_lines(tmp_path / "runs/a/ledger.jsonl") if "loss" in line}
    assert list(map(json.loads, lines)) == [{"world_size": 1}, [10, losses[10]], [20, losses[20]], 0]
    assert "lines: closed" in said


@pytest.mark.parametrize(
    ("name", "problem"),
    [("nowhere.Lines", "cannot be imp"), ("json.Lines", "cannot be imp"), ("json.JSONEncoder", "is no subclass")],
)
def test_a_name_that_is_no_tracker_is_told(run: TrackedRun, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"tracking\.own: {name} .*{problem}"):
        build_tracker(name, run)


# ---------------------------------------------------------------- TensorBoard


def test_a_tracker_is_one_file_of_under_120_lines() -> None:
    for tracker in TRACKERS.values():
        assert len(Path(inspect.getfile(tracker)).read_text().splitlines()) < 120
        assert tracker.__module__ == f"harness.tracking.{tracker.name}"


def test_tensorboard_has_the_ledger_once_however_often_it_was_opened(run: TrackedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    add(run.directory / "ledger.jsonl", *(update(step) for step in range(1, 7)), evaluation(6, 0.5))
    add(run.directory / "events.jsonl", {"event": "ended", "reason": "budget", "step": 6})
    for _ in range(2):
        tracker = TensorBoardTracker(run)
        projection = Projection(tracker, opened=tracker.open(offline=False), on_problem=pytest.fail)
        projection.advance()
        projection.end()
    found = EventAccumulator(str(run.directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    losses = found.Scalars("train/loss")
    assert [event.step for event in losses] == [2, 4, 6]
    assert [event.value for event in losses] == pytest.approx([1 / 2, 1 / 4, 1 / 6])
    assert [event.step for event in found.Scalars("val/loss")] == [6]
    assert b"peak_lr" in found.Tensors("config")[0].tensor_proto.string_val[0]

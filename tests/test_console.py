"""What a person reads, on a terminal and in a pipe."""

import contextlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from harness.agenda import Agenda
from harness.config.io import load_config
from harness.config.run import Best
from harness.config.run_config import RunConfig
from harness.launch.torchrun import stop_notice
from harness.observers.console import Console
from harness.observers.ledger import read_lines
from harness.observers.pace import Pace
from harness.state import FitResult, TrainState
from harness.stopping import Standings
from tests.children import start_python
from tests.conftest import run_to_the_end
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main

REPOSITORY = Path(__file__).parent.parent
CONFIG = """\
run: {name: a, max_steps: 100}
model: {kind: mlp, hidden: [8]}
data: {source: mnist_5k, global_batch: 64}
task: {kind: classification, num_classes: 10}
optim: {kind: sgd, peak_lr: 0.1}
"""


def without_escapes(text: str) -> str:
    """What is left of a terminal's text without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def update(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "event": "update",
        "step": step,
        "loss": 0.25,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "samples_seen": 64 * step,
        "seconds": 0.5,
    }
    return {**line, **changes}


BATCHES = 20
"""Updates an epoch, and between two evaluations."""


def config_of(tmp_path: Path, *, schedule: str = "{kind: constant}", stopping: str = "null") -> RunConfig:
    (tmp_path / "a.yaml").write_text(f"{CONFIG}schedule: {schedule}\nearly_stopping: {stopping}\n")
    return load_config(tmp_path / "a.yaml").config


CONSOLE_OF_ITS_OWN = """
import pathlib, sys
from harness.agenda import Agenda
from harness.config.io import load_config
from harness.observers.console import Console
from harness.state import FitResult, TrainState
agenda = Agenda(load_config(pathlib.Path("{}")).config, 9)
console = Console(pathlib.Path("a"), agenda=agenda, state=TrainState(), samples_seen=0, command="again")
"""
"""The beginning of a script, without what takes seconds to import."""


def best_of(loss: float, *, step: int, **others: float) -> Standings:
    """What a run says that has made one evaluation."""
    found = Standings(Best(metric="val/loss", mode="min"))
    found.observe({"val/loss": loss, **others}, step=step)
    return found


class Told:
    """A console of a run of 100 updates that has made `step` of them, and what it wrote."""

    def __init__(self, folder: Path, *, is_terminal: bool, width: int = 80, step: int = 0, **sections: str) -> None:
        self.text = io.StringIO()
        self.state = TrainState(position=step, step=step, evaluated_step=step)
        terminal = RichConsole(
            file=self.text, force_terminal=is_terminal, width=width, highlight=False, soft_wrap=not is_terminal
        )
        self.console = Console(
            Path("runs/a"),
            agenda=Agenda(config_of(folder, **sections), BATCHES),
            state=self.state,
            samples_seen=64 * step,
            command="harness launch a.yaml --gpus 2",
            report=Path("runs/a/report.html"),
            links=lambda: [("tracker", "https://tracker/run")],
            terminal=terminal,
        )

    def settle(self, step: int, **changes: Any) -> str:
        """Tell of one update as an interval; return what was written."""
        before = len(self.text.getvalue())
        self.console.on_update(update(step, **changes))
        self.state.step = self.state.position = step
        self.console.on_settled()
        return self.text.getvalue()[before:]

    @property
    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()


Tell = Callable[..., Told]


@pytest.fixture
def told(tmp_path: Path) -> Tell:
    return partial(Told, tmp_path)


# ---------------------------------------------------------------- how far it is


def test_the_first_line_in_a_pipe_has_step_and_throughput(told: Tell) -> None:
    (line,) = told(is_terminal=False).settle(1).splitlines()
    assert line.startswith("update 1/100  ETA 0:00:")
    assert "loss 0.2500  norm 1.500  rate 1.0e-03" in line
    rows_a_second = float(line.split(" samples/s")[0].split()[-1].replace(",", ""))
    assert 100 < rows_a_second <= 128  # 64 rows in half a second


def test_a_language_model_is_told_in_tokens(told: Tell) -> None:
    line = told(is_terminal=False).settle(1, samples_per_second=100.0, tokens_per_second=1600.0)
    assert 16 * 100 < float(line.split(" tokens/s")[0].split()[-1].replace(",", "")) <= 16 * 128


def test_throughput_and_eta_of_a_resumed_run_count_its_own_updates(told: Tell) -> None:
    assert "ETA 0:00:2" in told(is_terminal=False, step=50).settle(51)  # 49 updates of half a second


def test_the_time_to_the_next_evaluation_is_that_of_the_updates_before_it(told: Tell) -> None:
    assert "evaluation in 0:00:04" in told(is_terminal=False).settle(12)  # 8 of half a second before update 20
    assert "evaluation in 0:00:00" in told(is_terminal=False).settle(20)  # due, and about to begin


def test_lines_in_a_pipe_come_at_most_every_five_seconds(told: Tell) -> None:
    run = told(is_terminal=False)
    for step in range(1, 60):
        run.settle(step)
    assert len(run.lines) == 1


def test_a_nan_is_shown_and_leaves_the_curve_alone(told: Tell) -> None:
    run = told(is_terminal=True, width=140)
    run.settle(1, loss=math.nan)
    run.console._shown_at = -math.inf
    assert "loss nan  norm" in run.settle(2, loss=math.nan)


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_has_a_bar_both_times_a_curve_and_the_best_score_and_no_line_is_cut(told: Tell, width: int) -> None:
    run = told(is_terminal=True, width=width)
    run.settle(1, loss=29.0, seconds=60.0)  # a minute ago
    for step in range(2, 30):
        run.settle(step, loss=30.0 - step)
    best = best_of(0.5, step=20)
    run.console.on_evaluation({"event": "evaluation", "step": 20, "metrics": {"val/loss": 0.5}}, best)
    run.console._shown_at = -math.inf  # the next frame is due
    shown = without_escapes(run.settle(30, loss=0.25)).splitlines()[-3:]
    assert shown[0].startswith("update 30/100 ")
    assert "━" in shown[0]
    assert re.search(r"0:02:[2-5]\d left, evaluation in 0:00:05$", shown[0].rstrip())  # 70 of 2 s; 10 of 0.5 s
    assert re.match(r"loss 0\.2500  █[▁-█]*▁  norm 1\.500  rate 1\.0e-03  [\d,]+ samples/s$", shown[1].rstrip())
    assert shown[2].strip() == "best val/loss 0.5000 at 20"
    assert all(len(line.rstrip()) <= width for line in shown)


def on_screen(text: str) -> list[str]:
    """What a terminal shows that was sent this text, line by line; for the few movements that rich makes."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part  # rich goes to a line's beginning only to erase it
    return [line.rstrip() for line in lines]


def test_progress_is_gone_at_the_end_and_what_was_told_stays(told: Tell) -> None:
    run = told(is_terminal=True)
    best = best_of(0.5, step=2)
    for step in (1, 2, 3):
        run.console._shown_at = -math.inf
        run.settle(step)
        run.console.on_evaluation({"event": "evaluation", "step": step, "metrics": {"val/loss": 0.5}}, best)
    assert any("━" in line for line in on_screen(run.text.getvalue()))
    run.console.on_end(FitResult("budget", 3, {"val/loss": 0.5}))
    screen = on_screen(run.text.getvalue())
    assert [line.split(":")[0] for line in screen[:3]] == [f"evaluation at update {step}" for step in (1, 2, 3)]
    assert not any("━" in line or line.startswith("update") for line in screen)


@pytest.mark.parametrize("has_best", [False, True])
def test_what_a_launcher_says_about_stopping_is_not_overwritten_by_progress(told: Tell, has_best: bool) -> None:
    run = told(is_terminal=True)
    if has_best:  # the third line of progress
        best = best_of(0.5, step=2)
        run.console.on_evaluation({"event": "evaluation", "step": 2, "metrics": {"val/loss": 0.5}}, best)
    run.settle(3)
    run.text.write("^C" + stop_notice(is_terminal=True))
    for step in (4, 5):
        run.console._shown_at = -math.inf
        run.settle(step)
    run.console.on_end(FitResult("interrupted", 5, {}))
    screen = on_screen(run.text.getvalue())
    assert "Stopping: the ranks save and end. Ctrl-C again kills them at once." in screen
    assert "interrupted after update 5 of 100, already saved; the same command goes on from there" in screen


@pytest.mark.parametrize("frames_before", [0, 1])
def test_a_terminal_that_is_gone_ends_nothing(tmp_path: Path, frames_before: int) -> None:
    run = Told(tmp_path, is_terminal=True)
    ours, theirs = os.openpty()
    run.console._out.file = os.fdopen(theirs, "w", closefd=False)
    for step in range(1, 1 + frames_before):
        run.settle(step)
    os.close(ours)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(theirs, b"x")
    run.console._shown_at = -math.inf
    run.settle(2)
    run.console.on_event({"event": "started"})
    run.console.on_end(FitResult("budget", 2, {}))
    os.close(theirs)


def test_lines_in_a_pipe_have_no_escapes_even_where_colours_are_forced(tmp_path: Path) -> None:
    script = f"""{CONSOLE_OF_ITS_OWN.format(tmp_path / "a.yaml")}
console.on_event({{"event": "started"}})
console.on_end(FitResult("budget", 1, {{}}))
"""
    config_of(tmp_path)
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True, cwd=REPOSITORY
    )
    assert "\x1b" not in done.stdout
    assert "run directory: a\n" in done.stdout


def test_the_curve_is_as_wide_as_it_may_be_and_goes_from_least_to_most() -> None:
    pace = Pace(Agenda.__new__(Agenda), TrainState(), samples_seen=0)
    assert pace.sparkline(8) == ""
    for loss in (1.0, 2.0, 3.0, math.inf, 8.0):
        pace.hear(update(1, loss=loss))
        pace.settle()
    assert pace.sparkline(8) == "▁▂▃█"
    assert pace.sparkline(2) == "▁█"  # means of 1 and 2, of 3 and 8


# ---------------------------------------------------------------- what happens


def test_a_start_says_where_the_run_is_where_it_can_be_seen_and_how_to_resume_it(told: Tell) -> None:
    run = told(is_terminal=False)
    run.console.on_event({"event": "started"})
    assert run.lines == [
        "run directory: runs/a",
        "report: harness report runs/a (drawn at the end anyway)",
        "tracker: https://tracker/run",
        "to resume: harness launch a.yaml --gpus 2",
    ]
    run = told(is_terminal=True)
    run.console.on_event({"event": "started"})
    assert "to resume      harness launch a.yaml --gpus 2" in without_escapes(run.text.getvalue())


def test_an_evaluation_says_whether_it_is_the_best(told: Tell) -> None:
    run = told(is_terminal=False)
    best = best_of(0.5, step=10)
    run.console.on_evaluation({"event": "evaluation", "step": 10, "metrics": {"val/loss": 0.5}}, best)
    run.console.on_evaluation({"event": "evaluation", "step": 20, "metrics": {"val/loss": 0.7}}, best)
    first, second = run.lines
    assert first == "evaluation at update 10: val/loss 0.5000  best so far"
    assert second == "evaluation at update 20: val/loss 0.7000"


def test_an_evaluation_says_that_every_answer_is_the_same(told: Tell) -> None:
    run = told(is_terminal=False)
    best = best_of(0.5, step=10)
    run.console.on_event({"event": "one answer", "step": 10, "answer": "good"})
    run.console.on_evaluation({"event": "evaluation", "step": 10, "metrics": {"val/loss": 0.5}}, best)
    run.console.on_evaluation({"event": "evaluation", "step": 20, "metrics": {"val/loss": 0.7}}, best)
    assert run.lines == [
        "evaluation at update 10: val/loss 0.5000  best so far  every answer is 'good'",
        "evaluation at update 20: val/loss 0.7000",
    ]


def test_an_interrupted_run_says_what_was_saved_and_how_to_go_on(told: Tell) -> None:
    run = told(is_terminal=False)
    run.console.on_event({"event": "saved", "directory": "step-00000007", "step": 7, "is_best": False})
    run.console.on_end(FitResult("interrupted", 7, {}))
    assert run.lines[0] == (
        "interrupted after update 7 of 100, saved as runs/a/checkpoints/step-00000007; "
        "the same command goes on from there"
    )
    assert run.lines[-1] == "to resume: harness launch a.yaml --gpus 2"


def test_a_finished_run_says_why_how_good_and_where(told: Tell) -> None:
    run = told(is_terminal=False)
    run.console.on_end(FitResult("early_stopping", 30, {"val/loss": 0.5}))
    assert run.lines == [
        "done after update 30 of 100, no better evaluation within the patience: val/loss 0.5000; no best",
        "run directory: runs/a",
        "report: runs/a/report.html",
        "tracker: https://tracker/run",
        "to train longer: harness launch a.yaml --gpus 2 early_stopping=null",
    ]


def test_without_early_stopping_the_command_leaves_best_what_it_was(told: Tell, tmp_path: Path) -> None:
    run = told(is_terminal=False, stopping="{metric: val/macro_f1, mode: max, patience_evaluations: 3}")
    run.console.on_end(FitResult("early_stopping", 30, {"val/loss": 0.5}))
    overrides = shlex.split(run.lines[-1])[-2:]
    assert overrides == ["early_stopping=null", "checkpoint.best={metric: val/macro_f1, mode: max}"]
    stopped, longer = (load_config(tmp_path / "a.yaml", words).config.best_rule for words in ([], overrides))
    assert longer == stopped == Best(metric="val/macro_f1", mode="max")


def test_a_finished_run_says_the_other_scores_of_its_best_and_what_better_one_cannot_be_had_back(told: Tell) -> None:
    run = told(is_terminal=False)
    best = best_of(0.4, step=10, **{"val/accuracy": 0.75})
    best.observe({"val/loss": 0.3, "val/accuracy": 0.8}, step=20)
    best.forget(20)  # its save failed
    run.console.on_evaluation({"event": "evaluation", "step": 30, "metrics": {"val/loss": 0.5}}, best)
    run.console.on_end(FitResult("budget", 30, {"val/loss": 0.5, "val/accuracy": 0.7}))
    assert (
        "done after update 30 of 100, the budget is spent: val/loss 0.5000, val/accuracy 0.7000; best val/loss 0.4000 "
        "at 10 (val/accuracy 0.7500 there); val/loss 0.3000 at 20 is better, but its checkpoint is not there"
    ) in run.lines


def test_a_finished_run_whose_rate_has_fallen_says_to_what_a_longer_one_would_lift_it(told: Tell) -> None:
    run = told(is_terminal=False, schedule="{kind: linear, final_lr_fraction: 0.1}")
    run.console.on_end(FitResult("budget", 100, {"val/loss": 0.5}))
    # After 100 of 200 updates 1 - 0.9 x 100 / 200 of the peak is left.
    assert run.lines[-1] == "its learning rate: would go from 0.011 to 0.055 (with schedule.total_steps=100 to 0.01)"


def test_a_finished_run_whose_rate_would_stay_zero_says_so(told: Tell) -> None:
    run = told(is_terminal=False, schedule="{kind: linear, total_steps: 50}")
    run.console.on_end(FitResult("budget", 100, {"val/loss": 0.5}))
    assert run.lines[-1].startswith("its learning rate: would stay 0, since schedule.total_steps=50 is over")


def train_and_listen(*arguments: str) -> str:
    """Train to the end; return what was said on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert train_main(*arguments) == 0
    return said.getvalue()


def test_a_run_that_is_past_its_budget_says_what_goes_beyond_it_and_which_earlier_evaluation_is_best(
    tmp_path: Path,
) -> None:
    words = [f"run.output_root={tmp_path}", "evaluation.every_steps=4"]
    config = tmp_path / "a.yaml"
    config.write_text(CONFIG)
    run_to_the_end(config, *words, "run.max_steps=9")
    (said,) = run_ranks(1, train_and_listen, str(config), *words, "run.max_steps=4")
    score = json.loads((tmp_path / "a/checkpoints/step-00000009/trainer.json").read_text())["judge"]["score"]
    assert f"best val/loss {score['best']:.4f} at {score['best_step']}" in said
    (longer,) = re.findall(r"^to train longer: .*$", said, flags=re.MULTILINE)
    run_to_the_end(config, *words, *shlex.split(longer)[-1:])
    assert json.loads((tmp_path / "a/exit.json").read_text())["step"] == 24


def test_a_failed_run_says_with_what_code_and_how_to_go_on(told: Tell) -> None:
    run = told(is_terminal=False)
    run.console.on_event({"event": "failed", "step": 7, "code": 6, "reason": "NaN"})
    assert run.lines[0] == "failed after update 7: exit code 6"
    assert run.lines[-1] == "to resume: harness launch a.yaml --gpus 2"


@pytest.mark.parametrize(
    ("words", "reason", "steps"),
    [("run.max_steps=4", "budget", 8), ("run.max_steps=9 early_stopping.patience_evaluations=1", "early_stopping", 9)],
)
def test_the_command_that_trains_longer_does_so(
    told: Tell, tmp_path: Path, words: str, reason: Any, steps: int
) -> None:
    config = tmp_path / "a.yaml"
    given = [f"run.output_root={tmp_path}", *words.split(), "evaluation.every_steps=2", "early_stopping.min_delta=9"]
    run = told(is_terminal=False)
    run.console._pace._agenda.config = load_config(config, given).config
    run.console._command = shlex.join(["harness", "train", str(config), *given])
    run_to_the_end(config, *given)
    assert read_lines(tmp_path / "a/events.jsonl")[-1]["reason"] == reason
    run.console.on_end(FitResult(reason, 4, {}))
    label, _, command = run.lines[-1].partition(": ")
    program, verb, path, *overrides = shlex.split(command)
    assert (label, program, verb) == ("to train longer", "harness", "train")
    run_to_the_end(Path(path), *overrides)
    last = json.loads((tmp_path / "a/exit.json").read_text())
    assert (last["step"], last["reason"]) == (steps, "budget")


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    script = f"""{CONSOLE_OF_ITS_OWN.format(tmp_path / "a.yaml")}
sys.stdin.readline()  # until nobody reads any more
for _ in range(3):
    console.on_event({{"event": "notice", "text": "x" * 100_000}})
print("still here", file=sys.stderr)
"""
    config_of(tmp_path)
    child = start_python(script)
    assert child.stdout is not None
    child.stdout.close()
    _, said = child.communicate("go\n", timeout=20)
    assert "still here" in said
    assert child.returncode == 0

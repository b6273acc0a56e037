"""What a person reads, on a terminal and in a pipe."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from harness.observers.console import Console
from harness.state import FitResult
from harness.stopping import Patience


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


def told(*, is_terminal: bool, width: int = 80, step: int = 0) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    terminal = RichConsole(
        file=text, force_terminal=is_terminal, width=width, highlight=False, soft_wrap=not is_terminal
    )
    return Console(Path("runs/a"), total_updates=100, step=step, samples_seen=64 * step, terminal=terminal), text


def test_the_first_line_in_a_pipe_has_step_and_throughput() -> None:
    console, text = told(is_terminal=False)
    console.on_update(update(1))
    console.on_settled()
    (line,) = text.getvalue().splitlines()
    assert line.startswith("update 1/100  ETA 0:00:")
    assert "loss 0.2500  norm 1.500  rate 1.0e-03" in line
    rows_a_second = float(line.split(" samples/s")[0].split()[-1].replace(",", ""))
    assert 100 < rows_a_second <= 128  # 64 rows in half a second


def test_throughput_and_eta_of_a_resumed_run_count_its_own_updates() -> None:
    console, text = told(is_terminal=False, step=50)
    console.on_update(update(51))
    console.on_settled()
    assert "ETA 0:00:2" in text.getvalue()  # 49 updates of half a second


def test_a_terminal_of_eighty_columns_shows_step_eta_and_loss() -> None:
    console, text = told(is_terminal=True)
    console.on_update(update(40))
    console.on_settled()
    console.close()
    shown = text.getvalue().split("\r")[-1]
    assert "update 40/100  ETA " in shown
    assert "loss 0.2500" in shown


def test_an_evaluation_says_whether_it_is_the_best() -> None:
    console, text = told(is_terminal=False)
    best = Patience("val/loss", "min", 0.0, best=0.5, best_step=10)
    console.on_evaluation({"event": "evaluation", "step": 10, "metrics": {"val/loss": 0.5}}, best)
    console.on_evaluation({"event": "evaluation", "step": 20, "metrics": {"val/loss": 0.7}}, best)
    first, second = text.getvalue().splitlines()
    assert first == "evaluation at update 10: val/loss 0.5000  best so far"
    assert second == "evaluation at update 20: val/loss 0.7000"


def test_an_interrupted_run_says_what_was_saved_and_how_to_go_on() -> None:
    console, text = told(is_terminal=False)
    console.on_event({"event": "saved", "directory": "step-00000007", "step": 7, "is_best": False})
    console.on_end(FitResult("interrupted", 7, {}))
    assert text.getvalue() == (
        "interrupted after update 7 of 100, saved as runs/a/checkpoints/step-00000007; "
        "the same command goes on from there\n"
    )


def test_a_finished_run_says_why_how_good_and_where() -> None:
    console, text = told(is_terminal=False)
    console.on_end(FitResult("early_stopping", 30, {"val/loss": 0.5}))
    first, second = text.getvalue().splitlines()
    assert first == "done after update 30 of 100, no better evaluation within the patience: val/loss 0.5000; no best"
    assert second == "run directory runs/a"


def test_a_reader_that_goes_away_ends_nothing() -> None:
    script = """
import pathlib, sys
from harness.observers.console import Console
console = Console(pathlib.Path("a"), total_updates=9)
sys.stdin.readline()  # until nobody reads any more
for _ in range(3):
    console.on_event({"event": "notice", "text": "x" * 100_000})
print("still here", file=sys.stderr)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert child.stdout is not None
    child.stdout.close()
    _, said = child.communicate("go\n", timeout=20)
    assert "still here" in said
    assert child.returncode == 0

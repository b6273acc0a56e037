"""A job whose time runs out stops while there is room for a save, also if nobody sends a signal."""

import json
import os
import time
from pathlib import Path

import pytest

from harness.observers.ledger import read_lines
from harness.stopping import MARGIN_SECONDS
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main
from tests.test_end_to_end import GOOD, table


def train_with_little_time(seconds: float, *arguments: str) -> tuple[int, float]:
    """Train as one rank of a job that has so many seconds; return the exit code and how many were left."""
    end_time = time.time() + seconds
    if os.environ["RANK"] == "1":  # what one rank knows is enough
        os.environ["HARNESS_END_TIME"] = str(end_time)
    return train_main(*arguments), end_time - time.time()


@pytest.mark.slow
def test_two_ranks_save_and_end_with_75_before_their_time_is_over(tmp_path: Path) -> None:
    arguments = (table(tmp_path, GOOD), "run.max_steps=10000000")
    answers = run_ranks(2, train_with_little_time, MARGIN_SECONDS + 5, *arguments, deadline_seconds=120)
    assert [code for code, _ in answers] == [75, 75]
    assert min(left for _, left in answers) > MARGIN_SECONDS / 2
    directory = tmp_path / "runs/bad"
    ended = [line for line in read_lines(directory / "events.jsonl") if line["event"] == "ended"]
    assert ended[0]["signal"] == "TIME_LIMIT"
    step = json.loads((directory / "exit.json").read_text())["step"]
    assert step > 0
    assert (directory / "checkpoints" / f"step-{step:08d}").is_dir()

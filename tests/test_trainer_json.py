"""trainer.json: whatever a stranger has sealed there is told by its field, or could be ours."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness.errors import CheckpointError
from harness.record.progress import check_trainer, trainer_problems

SCORE = {
    "metric": "val/loss",
    "mode": "min",
    "min_delta": 0.0,
    "best": 0.5,
    "best_step": 25,
    "evaluations_without_improvement": 1,
}
GOOD: dict[str, Any] = {
    "harness": "0.1.0",
    "position": 31,
    "step": 30,
    "samples_seen": 480,
    "evaluated_step": 30,
    "nonfinite_in_a_row": 0,
    "metrics": {"val/loss": 0.6, "val/auc": math.nan, "val/confusion": [[1, 2], [3, 4]]},
    "judge": {"score": SCORE, "rate": None, "lr_factor": 1.0},
    "ledger_bytes": 9000,
    "data_digest": "0-1",
    "order": {"seed": 5, "global_batch": 16},
    "world_size": 2,
    "strategy": "ddp",
    "optimizer": [{"weight_decay": 0.1, "betas": [0.9, 0.999], "parameters": ["weight"]}],
    "loss_scale": None,
    "input_shape": [6],
    "num_outputs": 3,
    "preprocessing": {},
    "tokenizer": None,
    "run_id": "0123abcd",
    "best_step": 25,
}
MISSING = object()


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good one with another value at a dotted path."""
    trainer = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = trainer
    for parent in parents:
        place = place[parent]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return trainer


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loss_scale", {"scale": 65536.0, "applied_in_a_row": 7}),
        ("judge.rate", SCORE),
        ("judge.score", {**SCORE, "best": None, "best_step": None}),
        ("metrics", {}),
        ("run_id", MISSING),  # a store without a run
        ("best_step", None),
        ("best_step", MISSING),  # an earlier version
        ("what a later version adds", [1]),
        ("nonfinite_in_a_row", 2**53),
    ],
)
def test_what_a_run_of_ours_may_write_is_taken(path: str, value: Any) -> None:
    assert trainer_problems(changed(path, value), step=30) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("position", -1, "position: -1 is not a whole number"),
        ("position", True, "position: true is not a whole number"),
        ("position", 30.0, "position: 30.0 is not a whole number"),
        ("position", 10**30, "position: 10000"),
        ("position", 29, "step: 30 is refused: position is 29"),
        ("step", 5, "evaluated_step: 30 is refused: step is 5"),
        ("step", 31, "step: 31 is not 30, that of the checkpoint"),
        ("step", 10**30, "step: 10000"),
        ("step", MISSING, "step: missing; wanted: a whole number"),
        ("evaluated_step", 31, "evaluated_step: 31 is refused: step is 30"),
        ("ledger_bytes", 10**30, "ledger_bytes: 10000"),
        ("ledger_bytes", "0", "ledger_bytes: '0' is not a whole number"),
        ("nonfinite_in_a_row", None, "nonfinite_in_a_row: null is not a whole number"),
        ("world_size", 0, "world_size: 0 is not a whole number, at most 9007199254740992, at least 1"),
        ("judge", {}, "judge.score: missing"),
        ("judge", [], "judge: [] is not a section with score, rate, lr_factor"),
        ("judge.score", {**SCORE, "more": 1}, "judge.score.more: unknown key"),
        ("judge.score.best", "x", "judge.score.best: 'x' is not a finite number, or null"),
        ("judge.score.best", math.inf, "judge.score.best: inf is not a finite number"),
        ("judge.score.best", None, "judge.score.best: null is refused: best and best_step are both there"),
        ("judge.score.mode", "least", "judge.score.mode: 'least' is not one of min, max"),
        ("judge.rate", {}, "judge.rate.metric: missing"),
        ("judge.lr_factor", math.nan, "judge.lr_factor: nan is not a finite number"),
        ("loss_scale", {}, "loss_scale.scale: missing"),
        ("loss_scale", {"scale": 0.0, "applied_in_a_row": 0}, "loss_scale.scale: 0.0 is not a finite number, above 0"),
        ("optimizer", [1], "optimizer.0: 1 is not a section with parameters"),
        ("optimizer", {}, "optimizer: {} is not a list"),
        ("optimizer", [{}], "optimizer.0.parameters: missing; wanted: a list, each a text"),
        ("order", None, "order: null is not an object"),
        ("metrics", [], "metrics: [] is not an object"),
        ("metrics", {"val/loss": "x"}, "'val/loss' is neither a number nor a table"),
        ("data_digest", 1, "data_digest: 1 is not a text"),
        ("run_id", "a/b", "run_id: 'a/b' is not a text"),
        ("run_id", "", "run_id: '' is not a text"),
        ("input_shape", [-1], "input_shape.0: -1 is not a whole number"),
        ("num_outputs", "3", "num_outputs: '3' is not a whole number"),
        ("tokenizer", 1, "tokenizer: 1 is not a text"),
        ("tokenizer", "\ud800", "tokenizer: '\\ud800' is refused: 'utf-8' codec can't encode"),
        ("best_step", 10**300, "best_step: 10000"),
    ],
)
def test_what_no_run_of_ours_would_write_is_refused_by_its_field(path: str, value: Any, told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_trainer(changed(path, value), Path("runs/a/checkpoints/step-00000030"), step=30)
    said = str(caught.value)
    assert "runs/a/checkpoints/step-00000030/trainer.json is not what this harness writes" in said
    assert told in said
    assert "\n" not in said


def test_a_sentence_about_a_trainer_of_nonsense_stays_a_sentence() -> None:
    nonsense = json.loads('{"optimizer": [' + ",".join(["0"] * 10_000) + '], "order": "' + "x" * 10**6 + '"}')
    assert len(trainer_problems(nonsense, step=30)) <= len(GOOD)
    with pytest.raises(CheckpointError, match=r"; and \d+ more\. Take another checkpoint") as caught:
        check_trainer(nonsense, Path("step-00000030"), step=30)
    assert len(str(caught.value)) < 1000

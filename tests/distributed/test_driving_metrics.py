"""Each score of each task can decide which checkpoint is the best and when to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.catalogue.causal_lm.section import CausalLmTask
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.regression.section import RegressionTask
from harness.observers.ledger import read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main

PATIENCE = 2
METRICS = [
    *(("classification", metric) for metric in ClassificationTask(kind="classification", num_classes=2).metric_names),
    *(("regression", metric) for metric in RegressionTask(kind="regression").metric_names),
    *(("causal_lm", metric) for metric in CausalLmTask(kind="causal_lm").metric_names),
]


def sections(folder: Path, task: str) -> dict[str, Any]:
    """Noisy data and a high rate, so that scores go up and down."""
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(90, 3, generator=generator)
    label = (numbers[:, 0] + torch.randn(90, generator=generator) > 0).long()
    lines = [f"{a:.4f},{b:.4f},{c:.4f},{y}" for (a, b, c), y in zip(numbers.tolist(), label.tolist(), strict=True)]
    (folder / "rows.csv").write_text("\n".join(["a,b,c,y", *lines]))
    (folder / "text.txt").write_text("".join(f"{n} and {3 * n % 17}, " for n in range(300)))
    table = {"source": "csv", "path": str(folder / "rows.csv"), "targets": ["y"], "global_batch": 16}
    mlp = {"kind": "mlp", "hidden": [16]}
    match task:
        case "classification":
            return {"model": mlp, "data": table, "task": {"kind": task, "num_classes": 2}}
        case "regression":
            return {"model": mlp, "data": {**table, "targets": ["c"], "features": ["a", "b"]}, "task": {"kind": task}}
    text = {"source": "text", "path": str(folder / "text.txt"), "split": "tail", "block": 16, "global_batch": 16}
    return {"model": {"kind": "gpt", "layers": 1, "width": 16, "heads": 2}, "data": text, "task": {"kind": task}}


@pytest.mark.parametrize(
    ("task", "metric"),
    [pair if pair[1] == "val/auc" else pytest.param(*pair, marks=pytest.mark.slow) for pair in METRICS],
)
def test_the_best_checkpoint_and_the_end_follow_the_score_that_was_named(
    tmp_path: Path, task: str, metric: str
) -> None:
    mode = "max" if metric in (*ClassificationTask.higher_is_better, *RegressionTask.higher_is_better) else "min"
    config = {
        "run": {"name": "run", "output_root": str(tmp_path), "max_steps": 120},
        **sections(tmp_path, task),
        "optim": {"kind": "adamw", "peak_lr": 0.05},
        "early_stopping": {"metric": metric, "mode": mode, "patience_evaluations": PATIENCE},
        "evaluation": {"every_steps": 2},
        "tracking": {"report": False},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert run_ranks(1, train_main, str(tmp_path / "run.yaml")) == [0]
    lines = [line for line in read_lines(tmp_path / "run/ledger.jsonl") if line["event"] == "evaluation"]
    scores = [line["metrics"][metric] for line in lines]
    wanted = max(scores) if mode == "max" else min(scores)
    best = json.loads((tmp_path / "run/checkpoints/BEST").read_text())["step"]
    assert best == lines[scores.index(wanted)]["step"]
    assert json.loads((tmp_path / "run/exit.json").read_text())["reason"] == "early_stopping"
    assert len(scores) == scores.index(wanted) + 1 + PATIENCE

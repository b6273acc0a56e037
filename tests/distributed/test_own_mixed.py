"""Parts of a user's own beside ours: his rows under our networks and tasks, his network on our rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.starts import train_on_standing_ranks
from tests.helpers import write_config

PARTS = """
from typing import Literal

import torch
from torch import nn

import harness


def columns(num_rows=60, fault=""):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 6, generator=draw)
    if fault == "nan":
        x[0] = torch.nan
    return {"inputs": x, "targets": (x[:, 0] > 0.8).long()}  # a fifth is of class 1


@harness.data("columns")
def in_memory(num_rows: int = 60, fault: str = ""):
    return columns(num_rows, fault)


@harness.data("by_row")
class ByRow(torch.utils.data.Dataset):
    facts = {"features": 6, "classes": 2}

    def __init__(self, num_rows: int = 60, fault: str = ""):
        self.columns = columns(num_rows, fault)

    def __len__(self):
        return len(self.columns["inputs"])

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


@harness.model("net")
class Net(nn.Module):
    def __init__(self, features: int, classes: int, fault: str = "", blocks: int = 2):
        super().__init__()
        self.fault = fault
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(features, features), nn.Tanh()) for _ in range(blocks))
        self.head = nn.Linear(features, classes)

    def forward(self, rows):
        for block in self.blocks:
            rows = block(rows)
        logits = self.head(rows)
        if self.fault == "masked":
            return torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], dim=1)
        if self.fault == "mixes":
            return logits - logits.mean(dim=0)
        return {"": logits, "flat": logits.sum(0), "tuple": (logits, rows), "dict": {"logits": logits}}[self.fault]
"""


def start(folder: Path, *overrides: str, ranks: int = 1, **sections: dict[str, Any]) -> list[tuple[int, str]]:
    (folder / "mixed.py").write_text(PARTS)
    values = {
        "use": ["mixed.py"],
        "run": {"name": "a", "max_steps": 3, "output_root": str(folder / "runs")},
        "model": {"kind": "mlp", "hidden": [8]},
        "data": {"source": "columns", "global_batch": 12},
        "task": {"kind": "classification", "num_classes": 2},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
        "tracking": {"report": False},
    }
    config = write_config(folder / "run.yaml", values, **sections)
    return train_on_standing_ranks(ranks, str(config), *overrides)


def lines(folder: Path, run: str = "a") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"runs/{run}/ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("source", ["columns", "by_row"])
def test_our_network_and_task_train_on_rows_of_a_users(source: str, tmp_path: Path) -> None:
    ((code, said),) = start(tmp_path, f"data.source={source}")
    assert code == 0, said
    assert {"val/accuracy", "val/f1", "val/auc"} <= lines(tmp_path)[-1]["metrics"].keys()


def test_a_users_network_takes_the_facts_of_a_users_rows(tmp_path: Path) -> None:
    ((code, said),) = start(tmp_path, data={"source": "by_row", "global_batch": 12}, model={"kind": "net"})
    assert code == 0, said
    ((code, said),) = start(tmp_path, "run.name=b", model={"kind": "net"})
    assert code == 2
    assert "model.features" in said


def test_rows_in_memory_can_be_weighted_and_balanced_by_their_labels(tmp_path: Path) -> None:
    weighted = {"kind": "classification", "num_classes": 2, "class_weights": "balanced"}
    assert start(tmp_path, "run.name=w", task=weighted)[0][0] == 0
    assert start(tmp_path, "run.name=s", "data.sampling=balanced")[0][0] == 0
    plain, drawn = (len([line for line in lines(tmp_path, run)]) for run in ("w", "s"))
    assert plain == drawn


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.class_weights=balanced", "task.class_weights: balanced wants a label of every row, in memory"),
        ("data.sampling=balanced", "data.sampling: balanced wants a label of every row, in memory"),
    ],
)
def test_rows_that_are_asked_for_one_by_one_have_no_labels_beforehand(override: str, said: str, tmp_path: Path) -> None:
    ((code, found),) = start(tmp_path, "data.source=by_row", override)
    assert code in (2, 3)
    assert said in found


def test_a_network_that_mixes_rows_under_our_task_loses_a_promise_and_trains(tmp_path: Path) -> None:
    data = {"source": "by_row", "global_batch": 12}
    ((code, _),) = start(tmp_path, data=data, model={"kind": "net", "fault": "mixes"})
    assert code == 0
    promises = json.loads((tmp_path / "runs/a/run.json").read_bytes())["promises"]
    (found,) = [promise for promise in promises if promise["name"] == "any number of ranks"]
    assert found["verdict"] == "not"
    assert "in eval mode" in found["reason"]


@pytest.mark.parametrize("fault", ["flat", "tuple", "dict"])
def test_outputs_that_our_task_cannot_take_are_told_with_their_shape(fault: str, tmp_path: Path) -> None:
    data = {"source": "by_row", "global_batch": 12}
    ((code, found),) = start(tmp_path, data=data, model={"kind": "net", "fault": fault})
    assert code == 2
    assert "task Classification cannot take what the model returns" in found
    assert "Traceback" not in found


def test_blocks_of_a_users_network_are_computed_again_to_the_same_bits(tmp_path: Path) -> None:
    data = {"source": "by_row", "global_batch": 12}
    kept = start(tmp_path, "run.name=kept", data=data, model={"kind": "net"}, ranks=2)
    again = start(
        tmp_path,
        "run.name=again",
        "strategy={kind: ddp, activation_checkpointing: true}",
        data=data,
        model={"kind": "net"},
        ranks=2,
    )
    assert [code for code, _ in kept] == [code for code, _ in again] == [0, 0]
    for one, other in zip(lines(tmp_path, "kept"), lines(tmp_path, "again"), strict=True):
        assert (one.get("loss"), one.get("grad_norm")) == (other.get("loss"), other.get("grad_norm"))


@pytest.mark.parametrize("source", ["columns", "by_row"])
def test_a_row_without_a_loss_that_only_keeps_other_ranks_company_spoils_no_update(source: str, tmp_path: Path) -> None:
    # 49 rows train; the fifth batch has one row, so one of two ranks runs row 0 of the split instead, which is NaN.
    data = {"source": source, "global_batch": 12, "num_rows": 61, "fault": "nan", "validation_fraction": 0.2}
    answers = start(tmp_path, "run.max_steps=10", ranks=2, data=data)
    assert [code for code, _ in answers] == [0, 0]
    updates = [line for line in lines(tmp_path) if line["event"] == "update"]
    assert len([line for line in updates if not line["applied"]]) == len(updates) // 5, (
        "once an epoch, by the row itself"
    )


def test_an_output_that_is_masked_with_minus_infinity_spoils_no_update_of_a_rank_without_rows(tmp_path: Path) -> None:
    data = {"source": "by_row", "global_batch": 12, "num_rows": 61, "validation_fraction": 0.2}
    task = {"kind": "classification", "num_classes": 3}
    losses = {}
    for ranks in (1, 2):
        model = {"kind": "net", "fault": "masked"}
        names = (f"run.name=of{ranks}", "run.max_steps=10")
        answers = start(tmp_path, *names, ranks=ranks, data=data, task=task, model=model)
        assert [code for code, _ in answers] == [0] * ranks
        losses[ranks] = [line["loss"] for line in lines(tmp_path, f"of{ranks}") if line["event"] == "update"]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)

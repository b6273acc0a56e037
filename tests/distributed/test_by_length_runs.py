"""Whole runs with rows in the order of their lengths, in micro-batches by tokens, resumed, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from harness.observers.ledger import read_lines
from harness.rows.splits import set_aside
from tests.distributed.starts import train_on_standing_ranks
from tests.helpers import write_config

PARTS = """
import os

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import harness

CHANGED, FAULT = 0, ""


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.sizes = torch.randint(1, 13, (130,), generator=draw).tolist()
        self.rows = [torch.randn(size, generator=draw) for size in self.sizes]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"x": self.rows[i], "weight": torch.ones(len(self.rows[i]))}

    def collate(self, rows):
        return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in ("x", "weight")}

    def digest(self):  # which does not know of lengths
        return "the same"


@harness.data("mute")
class Mute(Rows):
    pass


@harness.data("rows")
class Told(Rows):
    def lengths(self):
        if FAULT == "raises":
            raise OSError("no such index")
        if FAULT == "other on a rank":
            self.sizes[3] += int(os.environ.get("RANK", 0))
        return [size + (i % 9 == 5) * CHANGED for i, size in enumerate(self.sizes)]


@harness.data("columns")
def columns():
    return {"x": torch.randn(130, 4), "weight": torch.ones(130, 4)}


@harness.model("line")
class Line(nn.Module):
    def __init__(self, norm: bool = False, head: bool = False):
        super().__init__()
        self.line = nn.Linear(1, 4)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.out = nn.Linear(4, 1)
        self.aside = nn.Linear(1, 1) if head else None

    def forward(self, x):
        found = self.out(self.norm(self.line(x[:, :1]))) + x * self.out.weight.sum()
        return found + self.aside(x[..., None])[..., 0] if self.aside is not None and self.training else found


@harness.task("fit")
class Fit:
    def forward(self, network, batch):
        return network(batch["x"])

    def loss(self, outputs, batch):
        return (outputs - batch["x"].sin() - 1) ** 2

    def weights(self, batch):
        return batch["weight"]
"""
BY_LENGTH, TOKENS = "data.sampling=by_length", "strategy.micro_batch_tokens=24"


def start(folder: Path, *overrides: str, ranks: int = 1, parts: str = PARTS, **sections: Any) -> list[tuple[int, str]]:
    (folder / "lengths_parts.py").write_text(parts)
    values = {
        "use": ["lengths_parts.py"],
        "run": {"name": "a", "max_steps": 16, "output_root": str(folder / "runs")},
        "model": {"kind": "line"},
        "data": {"source": "rows", "global_batch": 12},
        "task": {"kind": "fit"},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
        "tracking": {"report": False},
    }
    return train_on_standing_ranks(ranks, str(write_config(folder / "run.yaml", values, **sections)), *overrides)


def lines(folder: Path, run: str, event: str = "update") -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / f"runs/{run}/ledger.jsonl") if line["event"] == event]


def losses(folder: Path, run: str) -> list[float]:
    return [line["loss"] for line in lines(folder, run)]


def test_a_run_by_length_goes_on_with_the_same_rows_on_other_ranks_with_other_limits(tmp_path: Path) -> None:
    for name, sampling in (("whole", BY_LENGTH), ("uniform", "data.sampling=uniform")):
        ((code, said),) = start(tmp_path, f"run.name={name}", sampling)
        assert code == 0, said
    stages = (
        (1, 4, "strategy.micro_batch_tokens=20"),
        (2, 9, "strategy.micro_batch_tokens=31"),
        (3, 13, "strategy.micro_batch=2"),
        (2, 16, "strategy={kind: zero1, micro_batch_tokens: 12}"),
    )
    for ranks, steps, strategy in stages:
        answers = start(tmp_path, BY_LENGTH, "run.name=parts", f"run.max_steps={steps}", strategy, ranks=ranks)
        assert [code for code, _ in answers] == [0] * ranks, answers
    assert losses(tmp_path, "parts") == pytest.approx(losses(tmp_path, "whole"), rel=1e-5)
    assert losses(tmp_path, "whole") != pytest.approx(losses(tmp_path, "uniform"), rel=1e-3)
    whole, parts = (lines(tmp_path, name, "evaluation")[-1]["metrics"]["val/loss"] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-5), "validation is in micro-batches by tokens too"


def test_the_same_run_again_on_one_rank_has_the_same_bits_after_a_resume(tmp_path: Path) -> None:
    assert start(tmp_path, BY_LENGTH, TOKENS, "run.name=whole")[0][0] == 0
    for steps in (5, 16):
        assert start(tmp_path, BY_LENGTH, TOKENS, "run.name=parts", f"run.max_steps={steps}")[0][0] == 0
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


def test_other_lengths_of_the_same_rows_are_refused_on_resume_where_the_order_follows_from_them(tmp_path: Path) -> None:
    changed = PARTS.replace("CHANGED, FAULT = 0", "CHANGED, FAULT = 1")
    assert start(tmp_path, BY_LENGTH, "run.max_steps=3")[0][0] == 0
    ((code, said),) = start(tmp_path, BY_LENGTH, parts=changed)
    assert code == 3, said
    assert "the lengths of the training rows are not those that" in said
    assert start(tmp_path, BY_LENGTH)[0][0] == 0
    assert start(tmp_path, TOKENS, "run.name=b", "run.max_steps=3")[0][0] == 0
    assert start(tmp_path, TOKENS, "run.name=b", parts=changed)[0][0] == 0, "there they divide a rank's share, no more"


def test_sampling_may_not_change_on_resume_even_where_the_stored_config_is_lost(tmp_path: Path) -> None:
    assert start(tmp_path, BY_LENGTH, "run.max_steps=3")[0][0] == 0
    ((code, said),) = start(tmp_path)
    assert code == 2
    assert 'data.sampling: stored "by_length", given "uniform"' in said
    (tmp_path / "runs/a/config.yaml").unlink()
    ((code, said),) = start(tmp_path)
    assert code == 2
    assert "stands in the order of rows of" in said
    assert "data.sampling" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("data.source=mute", BY_LENGTH),
            "data.sampling: by_length wants the length of every row beforehand, and the train split does not say it; "
            "give the Dataset an attribute or a method `lengths`",
        ),
        (("data.source=columns", BY_LENGTH), "by_length wants the length of every row beforehand"),
        (("data.source=columns", TOKENS), "strategy.micro_batch_tokens: 24 wants the length of every row beforehand"),
        (
            ("strategy.micro_batch_tokens=11",),
            "of the train split has length 12, and a micro-batch of it alone would have more than 11 tokens",
        ),
        ((TOKENS, "model.norm=true"), "micro_batch_tokens: what is left of a rank's share may be a micro-batch of one"),
        (("strategy={kind: ddp, micro_batch: 2, micro_batch_tokens: 24}",), "24 tokens at most or 2 rows, not both"),
    ],
)
def test_what_cannot_be_sorted_or_measured_is_refused_with_what_to_do(
    overrides: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    ((code, found),) = start(tmp_path, *overrides)
    assert code == 2, found
    assert said in found
    assert "Traceback" not in found


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_row_that_is_larger_than_a_micro_batch_is_named_by_its_number_in_the_dataset(
    split: str, tmp_path: Path
) -> None:
    number = dict(zip(("train", "validation"), set_aside(130, 0.2, seed=0), strict=True))[split][5]
    one_long = PARTS.replace("size + (i % 9 == 5) * CHANGED", f"99 if i == {number} else size")
    ((code, found),) = start(tmp_path, TOKENS, "run.seed=0", parts=one_long)
    assert code == 2
    assert f"row {number} of the {split} split has length 99" in found
    assert re.search(r"1 of \d+ rows are longer than that\. Use 99 or more", found)


def test_batch_norm_and_tokens_go_together_where_a_share_is_always_one_micro_batch(tmp_path: Path) -> None:
    assert start(tmp_path, "strategy.micro_batch_tokens=144", "model.norm=true")[0][0] == 0


def test_a_norm_over_time_is_refused_by_tokens_for_the_shortest_row_wherever_it_stands(tmp_path: Path) -> None:
    over_time = PARTS.replace(
        "self.norm(self.line(x[:, :1]))", "self.norm(self.line(x[..., None]).transpose(1, 2)).mean(2)"
    )
    for shortest, said in ((1, "BatchNorm (layer norm) wants two or more"), (2, "")):
        parts = over_time.replace("(1, 13, (130,)", f"({shortest}, 13, (130,)")
        ((_, found),) = start(tmp_path, TOKENS, "run.name=b", "model.norm=true", parts=parts)
        assert ("what is left of a rank's share may be a micro-batch of one row" in found) == bool(said), found
        assert said in found


def test_a_head_of_training_alone_trains_by_tokens_on_one_rank_and_is_refused_on_two(tmp_path: Path) -> None:
    assert start(tmp_path, TOKENS, "model.head=true")[0][0] == 0
    answers = start(tmp_path, TOKENS, "run.name=b", "model.head=true", ranks=2)
    assert [code for code, _ in answers] == [2, 2]
    assert "in any update a rank may have fewer micro-batches than another, and aside." in answers[0][1]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("raises", 3, "lengths of Told raised OSError: no such index"),
        ("other on a rank", 2, "wants the same lengths on every rank, and rank 1 has others than rank 0"),
    ],
)
def test_lengths_that_fail_or_differ_on_a_rank_end_all_ranks_before_one_waits(
    fault: str, code: int, said: str, tmp_path: Path
) -> None:
    answers = start(tmp_path, TOKENS, parts=PARTS.replace('FAULT = 0, ""', f'FAULT = 0, "{fault}"'), ranks=2)
    assert [found for found, _ in answers] == [code] * 2, answers
    assert said in answers[0][1]

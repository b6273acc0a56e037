"""Padding that reaches the loss of a row is found before the first update, and told as what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.starts import train_on_standing_ranks
from tests.helpers import write_config

PARTS = '''
"""Which way a walk of any length has gone, by networks that see the padding or mask it."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import harness


@harness.data("walks")
class Walks(torch.utils.data.Dataset):
    def __init__(self, alike: bool = False):
        draw = torch.Generator().manual_seed(0)
        self.walks = [torch.randn(5 if alike else 3 + i % 7, 4, generator=draw) for i in range(24)]

    def __len__(self):
        return len(self.walks)

    def __getitem__(self, i):
        return {"steps": self.walks[i], "length": len(self.walks[i]), "way": self.walks[i].sum()}


@harness.model("reader")
class Reader(nn.Module):
    def __init__(self, reads: str, masks: bool):
        super().__init__()
        self.reads, self.masks = reads, masks
        self.lstm = nn.LSTM(4, 8, batch_first=True, bidirectional=True)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(16, 1)

    def forward(self, steps, length):
        is_padding = torch.arange(steps.shape[1]) >= length.unsqueeze(1)  # (B, T)
        match self.reads:
            case "both ways":
                if self.masks:
                    steps = pack_padded_sequence(steps, length, batch_first=True, enforce_sorted=False)
                _, (found, _) = self.lstm(steps)
                found = torch.cat([found[0], found[1]], dim=1)
            case "mean":
                counts = ~is_padding.unsqueeze(2) if self.masks else torch.ones_like(steps[..., :1])
                found = F.pad((steps * counts).sum(1) / counts.sum(1), (0, 12))
            case "attention":
                mask = is_padding if self.masks else None
                found, _ = self.attention(steps[:, :1], steps, steps, key_padding_mask=mask)
                found = F.pad(found.squeeze(1), (0, 12))
        return self.head(found).squeeze(1)


@harness.task("way")
class Way:
    def forward(self, network, batch):
        return network(batch["steps"], batch["length"])

    def loss(self, outputs, batch):
        return F.mse_loss(outputs, batch["way"], reduction="none")
'''
READS = ("both ways", "mean", "attention")


def start(folder: Path, *, data: dict[str, Any], parts: str = PARTS, **model: Any) -> tuple[int, str]:
    (folder / "padded_walks.py").write_text(parts)
    config = write_config(
        folder / "run.yaml",
        {
            "use": ["padded_walks.py"],
            "run": {"name": "a", "max_steps": 1, "output_root": str(folder / "runs")},
            "model": {"kind": "reader", **model},
            "data": {"source": "walks", "global_batch": 8, **data},
            "task": {"kind": "way"},
            "optim": {"kind": "adamw", "peak_lr": 0.01},
            "tracking": {"report": False},
        },
    )
    (answer,) = train_on_standing_ranks(1, str(config))
    return answer


@pytest.mark.parametrize("reads", READS)
def test_a_network_that_reads_padding_is_refused_with_what_to_look_for(reads: str, tmp_path: Path) -> None:
    code, said = start(tmp_path, data={"collate": {"pad": {"steps": 0}}}, reads=reads, masks=False)
    assert code == 2
    assert "beside 3 other rows and" in said
    assert "Rows are padded to the longest beside them, and the padding may reach the result" in said
    assert "mask it, or use pack_padded_sequence" in said


@pytest.mark.parametrize("reads", READS)
def test_a_network_that_masks_padding_is_promised_any_number_of_ranks(reads: str, tmp_path: Path) -> None:
    code, said = start(tmp_path, data={"collate": {"pad": 0, "multiple_of": 4}}, reads=reads, masks=True)
    assert code == 0, said
    promises = json.loads((tmp_path / "runs/a/run.json").read_bytes())["promises"]
    assert {promise["verdict"] for promise in promises} == {"held"}


def test_a_collate_that_draws_at_random_is_named_in_the_promises(tmp_path: Path) -> None:
    for line, verdict in (("pass", "held"), ("torch.rand(1)", "not")):
        method = f"def collate(self, rows):\n        {line}\n        return torch.utils.data.default_collate(rows)"
        parts = PARTS.replace("    def __len__(self)", f"    {method}\n\n    def __len__(self)")
        code, said = start(tmp_path, data={"alike": True}, parts=parts, reads="mean", masks=True)
        assert code == 0, said
        promises = json.loads((tmp_path / "runs/a/run.json").read_bytes())["promises"]
        found = {promise["name"]: promise for promise in promises}["any number of ranks"]
        assert found["verdict"] == verdict
        assert ("collate draws at random" in found["reason"]) == (verdict == "not")
        shutil.rmtree(tmp_path / "runs")


def test_where_nothing_is_padded_padding_is_not_blamed(tmp_path: Path) -> None:
    mixing = PARTS.replace("self.head(found)", "self.head(found - found.mean(0))")
    code, said = start(tmp_path, data={"alike": True}, parts=mixing, reads="mean", masks=True)
    assert code == 2
    assert "look for a mean or a norm over dimension 0" in said
    assert "padded" not in said.replace("padded_walks", "")

"""Rows of different lengths: padded by the data, told by the loss, left out by the weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

import harness

PADDING = -100


@harness.model("tagger")
class Tagger(nn.Module):
    """A class for each step of a sequence: (B, T) numbers to (B, T, 2) logits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.gru(steps.unsqueeze(-1))[0])


@harness.data("walks")
class Walks(Dataset):
    """Walks of 3 to 24 steps; the class of a step is the side of the start that the walker is on after it."""

    def __init__(self, split: Literal["train", "validation"], num_rows: int = 1000) -> None:
        draw = torch.Generator().manual_seed(1 if split == "train" else 2)
        self.lengths = torch.randint(3, 25, (num_rows,), generator=draw).tolist()  # data.sampling=by_length asks for it
        self.walks = [torch.randn(length, generator=draw) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.walks)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"steps": self.walks[i], "side": (self.walks[i].cumsum(0) > 0).long()}

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        steps = pad_sequence([row["steps"] for row in rows], batch_first=True)
        sides = pad_sequence([row["side"] for row in rows], batch_first=True, padding_value=PADDING)
        return {"steps": steps, "side": sides}


@harness.task("tag")
class Tag:
    """One class a step; padding weighs nothing, so that a step counts alike in a long and in a short row."""

    def forward(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return network(batch["steps"])

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), batch["side"], ignore_index=PADDING, reduction="none")

    def weights(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["side"] != PADDING).float()

    def metrics(self) -> dict[str, "Accuracy"]:
        return {"accuracy": Accuracy()}

    def scored(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return logits.argmax(dim=-1), batch["side"]


class Accuracy:
    def __init__(self) -> None:
        self.right, self.all = torch.zeros(()), torch.zeros(())

    def update(self, predicted: Tensor, side: Tensor) -> None:
        self.right += (predicted == side).sum()
        self.all += (side != PADDING).sum()

    def compute(self) -> Tensor:
        return self.right / self.all

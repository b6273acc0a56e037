"""Two towers, for a query and a document: a batch is a dict, and the network takes two of its columns."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import harness

FEATURES = 16


@harness.model("two_towers")
class TwoTowers(nn.Module):
    """The product of what each tower makes of its input: (B, 16) and (B, 16) to (B,) logits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.query, self.document = nn.Linear(FEATURES, width), nn.Linear(FEATURES, width)

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        return (self.query(query) * self.document(document)).sum(dim=-1)


@harness.data("clicks")
class Clicks(Dataset):
    """Pairs of points; who looks at one clicks on the other if a fixed rotation of it points the same way."""

    def __init__(self, split: Literal["train", "validation"], num_rows: int = 2000) -> None:
        draw = torch.Generator().manual_seed(1 if split == "train" else 2)
        self.query, self.document = torch.randn(2, num_rows, FEATURES, generator=draw)
        rotation = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0))
        self.clicked = ((self.query @ rotation) * self.document).sum(dim=-1) > 0

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"query": self.query[i], "document": self.document[i], "clicked": self.clicked[i].float()}


class Accuracy:
    """A metric: sums that are added up over ranks, and what follows from them."""

    def __init__(self) -> None:
        self.right, self.all = torch.zeros(()), torch.zeros(())

    def update(self, logits: Tensor, clicked: Tensor) -> None:
        self.right += ((logits > 0) == (clicked > 0)).sum()
        self.all += len(clicked)

    def compute(self) -> Tensor:
        return self.right / self.all


@harness.task("click")
class Click:
    """Whether there is a click; one value a row, and the mean over rows and ranks is the harness's business."""

    def forward(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return network(batch["query"], document=batch["document"])

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, batch["clicked"], reduction="none")

    def metrics(self) -> dict[str, Accuracy]:
        return {"accuracy": Accuracy()}

    def scored(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return logits, batch["clicked"]

"""One network with two heads and two losses; its rows come as columns in memory, or one by one from a Dataset."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

import harness

KINDS, POINTS = 3, 24


@harness.model("two_heads")
class TwoHeads(nn.Module):
    """Which kind of curve the points are of, and how high it is: (B, 24) to a dict of (B, 3) and (B,)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(POINTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.kind, self.height = nn.Linear(width, KINDS), nn.Linear(width, 1)

    def forward(self, points: Tensor) -> dict[str, Tensor]:
        found = self.body(points)
        return {"kind": self.kind(found), "height": self.height(found).squeeze(-1)}


@harness.data("curves")
def curves(num_rows: int = 3000) -> dict[str, Tensor]:
    """Noisy points of sines, triangles and squares of any height; a fraction of them validates."""
    draw = torch.Generator().manual_seed(0)
    kind = torch.randint(KINDS, (num_rows,), generator=draw)
    height, phase = 0.5 + torch.rand(2, num_rows, 1, generator=draw)
    angle = 6.28 * (torch.linspace(0, 1, POINTS) + phase)
    shapes = torch.stack([angle.sin(), 2 / 3.14 * angle.sin().asin(), angle.sin().sign()])  # (kinds, rows, points)
    points = height * shapes[kind, torch.arange(num_rows)] + 0.05 * torch.randn(num_rows, POINTS, generator=draw)
    return {"points": points, "kind": kind, "height": height.squeeze(-1)}


@harness.data("curves_by_row")
class CurvesByRow(Dataset):
    """The same rows, asked for one by one."""

    def __init__(self, num_rows: int = 3000) -> None:
        self.columns = curves(num_rows)

    def __len__(self) -> int:
        return len(self.columns["kind"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


@harness.task("kind_and_height")
class KindAndHeight:
    """`loss` is trained on; the others are columns of the ledger."""

    def __init__(self, height_counts: float = 1.0) -> None:
        self.height_counts = height_counts

    def forward(self, network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return network(batch["points"])

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        kind = F.cross_entropy(outputs["kind"], batch["kind"], reduction="none")
        height = F.mse_loss(outputs["height"], batch["height"], reduction="none")
        return {"loss": kind + self.height_counts * height, "kind": kind, "height": height}

    def metrics(self) -> dict[str, MulticlassAccuracy]:
        return {"accuracy": MulticlassAccuracy(KINDS, average="micro")}

    def scored(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return outputs["kind"], batch["kind"]

"""Pictures of discs and bars: a U-Net on random crops and flips, and pixels on borders that weigh nothing."""

import random
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import harness

CLASSES, IGNORED = 3, 255  # ground, disc, bar
SIDE, CROP = 40, 32


def layers(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(2, width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(2, width), nn.ReLU()),
    )


@harness.model("unet")
class UNet(nn.Module):
    """A class for each pixel: (B, 1, H, W) to (B, classes, H, W) logits, of even H and W."""

    def __init__(self, classes: int, hidden: int = 8) -> None:
        super().__init__()
        self.fine, self.coarse, self.join = layers(1, hidden), layers(hidden, 2 * hidden), layers(2 * hidden, hidden)
        self.up = nn.ConvTranspose2d(2 * hidden, hidden, 2, stride=2)
        self.head = nn.Conv2d(hidden, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.fine(image)  # (B, hidden, H, W)
        coarse = self.coarse(F.max_pool2d(fine, 2))  # (B, 2 hidden, H / 2, W / 2)
        return self.head(self.join(torch.cat([fine, self.up(coarse)], dim=1)))


@harness.data("shapes")
class Shapes(Dataset):
    """Discs and bars in noise, drawn from the number of the row; in training cropped and flipped at random."""

    def __init__(self, split: Literal["train", "validation"], num_rows: int = 1000) -> None:
        self.is_training, self.num_rows = split == "train", num_rows
        self.facts = {"classes": CLASSES}

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image, mask = drawn(i, of=0 if self.is_training else 1)
        top = left = (SIDE - CROP) // 2
        if self.is_training:  # with any of these generators: all are seeded for each row of each epoch
            top, left = torch.randint(SIDE - CROP + 1, (2,)).tolist()
            flipped = [axis for axis, coin in ((0, random.random()), (1, np.random.rand())) if coin < 0.5]
            image, mask = image.flip(flipped), mask.flip(flipped)
        window = (slice(top, top + CROP), slice(left, left + CROP))
        return {"image": image[window].unsqueeze(0), "mask": mask[window]}


def drawn(number: int, of: int) -> tuple[Tensor, Tensor]:
    """Return a picture, (SIDE, SIDE), and the class of each pixel, IGNORED on borders."""
    draw = np.random.default_rng([number, of])
    mask = np.zeros((SIDE, SIDE), np.int64)
    for _ in range(4):
        kind, size = draw.integers(1, CLASSES), draw.uniform(4, 8)
        down, across = np.abs(np.mgrid[:SIDE, :SIDE] - draw.uniform(0, SIDE, (2, 1, 1)))
        distance = np.hypot(down, across) if kind == 1 else np.maximum(3 * down, across / 1.5)
        mask[distance < size + 1.5] = IGNORED
        mask[distance < size] = kind
    image = (mask > 0) + draw.normal(0, 0.5, mask.shape)
    return torch.from_numpy(image).float(), torch.from_numpy(mask)


@harness.task("segment")
class Segment:
    """One class a pixel; what is IGNORED weighs nothing."""

    def forward(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return network(batch["image"])

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits, batch["mask"], ignore_index=IGNORED, reduction="none")  # (B, H, W)

    def weights(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["mask"] != IGNORED).float()

    def metrics(self) -> dict[str, "MeanIoU"]:
        return {"iou": MeanIoU()}

    def scored(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return logits.argmax(dim=1), batch["mask"]


class MeanIoU:
    """The mean over classes of pixels in both by pixels in either; these are added up over ranks."""

    def __init__(self) -> None:
        self.both, self.either = torch.zeros(CLASSES), torch.zeros(CLASSES)

    def update(self, predicted: Tensor, mask: Tensor) -> None:
        for kind in range(CLASSES):
            here, there = (predicted == kind) & (mask != IGNORED), mask == kind
            self.both[kind] += (here & there).sum()
            self.either[kind] += (here | there).sum()

    def compute(self) -> Tensor:
        return (self.both / self.either).mean()

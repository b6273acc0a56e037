"""Small random changes of training images that follow from the seed and the place in training alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.rows.order import permutation_key, random_bits


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Which way each image of an epoch is shifted and whether it is mirrored: the same at any number of ranks."""

    shift_pixels: int
    horizontal_flip: bool
    seed: int

    def draw(self, places: NDArray[np.int64], *, epoch: int) -> Tensor:
        """Return (n, 3) int64, rows down, columns right, 1 where mirrored, for places in an epoch.

        A place has the same row of the data at any number of ranks; a row that comes twice in an epoch, as balanced
        sampling has it, is changed in another way each time.
        """
        bits = random_bits(places, key=permutation_key(self.seed, epoch, "augment"))
        choices = np.uint64(2 * self.shift_pixels + 1)
        down, right, mirrored = ((bits >> np.uint64(20 * part)) % np.uint64(2**20) for part in range(3))
        shifts = [(part % choices).astype(np.int64) - self.shift_pixels for part in (down, right)]
        is_mirrored = (mirrored % np.uint64(2)).astype(np.int64) * self.horizontal_flip
        return torch.from_numpy(np.stack([*shifts, is_mirrored], axis=1))

    def changed(self, data: Any, draws: Tensor) -> Any:
        """Return a batch whose `inputs` are changed as they were drawn."""
        return {**data, "inputs": augment(data["inputs"], draws)}


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Return images mirrored, then shifted, with 0 where nothing was.

    Args:
        images: (B, C, H, W).
        draws: (B, 3) on the same device, as of `Augmentation.draw`.
    """
    height, width = images.shape[2:]
    down, right, is_mirrored = draws.unsqueeze(-1).unbind(dim=1)  # each (B, 1)
    rows = torch.arange(height, device=images.device) - down  # (B, H): which row of the image comes here
    columns = torch.arange(width, device=images.device) - right  # (B, W)
    has_row, has_column = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    columns = torch.where(is_mirrored.bool(), width - 1 - columns, columns)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    moved = moved.gather(3, columns[:, None, None, :].expand_as(images))
    return moved * (has_row[:, None, :, None] & has_column[:, None, None, :])

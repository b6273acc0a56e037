"""Batches of inputs and targets, as the catalogue's tasks have them."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.rows.batches import Batch


def pair(inputs: Tensor, targets: Tensor | None = None) -> Batch:
    """Return some rows as one batch; without targets they are zeros."""
    data = {"inputs": inputs, "targets": torch.zeros(len(inputs)) if targets is None else targets}
    return Batch(data, len(inputs), torch.arange(len(inputs)), is_padding=False)

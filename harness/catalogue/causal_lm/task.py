"""Predicting each token of a text from those before it."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from harness.rows.batches import Batch
from harness.tasks.base import PairTask

SHOWN_TOKENS = 48
"""How many of a row's last tokens an example has."""


class CausalLm(PairTask):
    """Cross-entropy of (B, T, V) logits against (B, T) ids of the tokens that follow; each token is a target.

    Args:
        block: tokens of a row.
        token_bytes: (V,) bytes of text that each token stands for.
        decode: from ids to the text they stand for.
    """

    counts_tokens = True

    def __init__(self, block: int, token_bytes: Tensor, *, decode: Callable[[list[int]], bytes]) -> None:
        self.targets_per_row = block
        self._token_bytes, self._decode = token_bytes, decode

    def loss_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": nats(outputs, batch.data["targets"])}

    def row_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), batch.data["targets"], reduction="none").sum(dim=1)

    def weight_sum(self, batch: Batch) -> int:
        ids: Tensor = batch.data["targets"]
        return ids.numel()

    def examples(self, outputs: Tensor, data: Any, places: Tensor) -> dict[str, list[Any]]:
        """Each token is predicted from the true ones before it."""

        def texts(ids: Tensor) -> list[str]:
            return [self._decode(row).decode(errors="replace") for row in ids[:, -SHOWN_TOKENS:].tolist()]

        return {"target": texts(data["targets"][places]), "prediction": texts(outputs[places].argmax(dim=-1))}

    def metrics(self) -> dict[str, Metric]:
        return {"perplexity": Perplexity(), "bits_per_byte": BitsPerByte(self._token_bytes)}


def nats(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the () sum of -ln p(target) over (B, T) targets from (B, T, V) logits."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")


class Perplexity(Metric):  # type: ignore[misc]
    """The exponential of the mean of -ln p over every target."""

    nats: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.nats += nats(outputs, targets)
        self.targets += targets.numel()

    def compute(self) -> Tensor:
        return (self.nats / self.targets).exp()


class BitsPerByte(Metric):  # type: ignore[misc]
    """The sum of -log2 p over every target, divided by the bytes of text that the targets stand for.

    So models with different tokenizers can be compared. The ends of documents stand for no byte, but predicting them
    costs bits.

    Args:
        token_bytes: (V,) bytes of each token.
    """

    nats: Tensor
    bytes: Tensor
    token_bytes: Tensor

    def __init__(self, token_bytes: Tensor) -> None:
        super().__init__()
        self.register_buffer("token_bytes", token_bytes)
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.nats += nats(outputs, targets)
        self.bytes += self.token_bytes[targets].sum()

    def compute(self) -> Tensor:
        return self.nats / (self.bytes * math.log(2))

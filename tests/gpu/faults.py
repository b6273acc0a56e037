"""Ways to break the harness, to see the check fail that protects from it: `python -m tests.gpu --fault NAME`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch


def clip_nothing() -> None:
    """Leave gradients as long as they are."""
    from harness.strategy.ddp import DdpStrategy

    DdpStrategy._clip_gradients = lambda self, gradients, norm: torch.ones_like(norm)  # type: ignore[method-assign]


def reduce_nothing() -> None:
    """Let every rank go its own way in the backward pass."""
    from harness.strategy.ddp import DdpStrategy

    DdpStrategy.accumulate = lambda self, *, is_last: self.model.no_sync()  # type: ignore


def average_nothing() -> None:
    """Let the average be the last weights."""
    from harness.strategy.average import WeightAverage

    def update(self: WeightAverage, applied: torch.Tensor) -> None:
        self.count += 1
        torch._foreach_copy_(self.values, self._weights)

    WeightAverage.update = update  # type: ignore[method-assign]


def autocast_nothing() -> None:
    """Compute in fp32 whatever is asked for."""
    from harness.strategy import build

    build.AUTOCAST.update(bf16=None, fp16=None)


def never_double_the_scale() -> None:
    """Let the scale of fp16 only fall."""
    from harness.strategy.loss_scale import LossScale

    def settle(self: LossScale, applied: torch.Tensor) -> None:
        self.scale = self.scale * torch.where(applied, 1.0, 0.5)

    LossScale.settle = settle  # type: ignore[method-assign]


def recompute_nothing() -> None:
    """Keep all activations."""
    from harness.strategy import build

    build.recompute_blocks = lambda module: None  # type: ignore


def restore_no_random_state() -> None:
    """Go on with whatever is drawn after a resume."""
    from harness.checkpoint import rng

    rng.restore = lambda state: None  # type: ignore


def copy_nothing_for_a_save() -> None:
    """Write the live weights, which training changes meanwhile."""
    from harness.checkpoint.snapshot import Snapshot

    def take(self: Snapshot, strategy: Any) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        return {key: tensor.detach() for key, tensor in strategy.state()}

    Snapshot.take = take  # type: ignore[method-assign]


def read_the_norm_in_every_update() -> None:
    """Wait for the device in each update."""
    from harness.strategy.ddp import DdpStrategy

    clip = DdpStrategy._clip_gradients

    def read(self: DdpStrategy, gradients: list[torch.Tensor], norm: torch.Tensor) -> torch.Tensor:
        norm.item()
        return clip(self, gradients, norm)

    DdpStrategy._clip_gradients = read  # type: ignore[method-assign]


def leave_validation_rows_on_the_host() -> None:
    """Forget to copy a batch to the device."""
    from harness.rows.batches import ValidationBatches

    iterate = ValidationBatches.__iter__

    def on_the_host(self: ValidationBatches) -> Any:
        for batch in iterate(self):
            yield batch._replace(data={**batch.data, "inputs": batch.data["inputs"].to("meta")})

    ValidationBatches.__iter__ = on_the_host  # type: ignore[method-assign]


def crash() -> None:
    """Die as of a fault in a kernel."""
    os.kill(os.getpid(), signal.SIGSEGV)


FAULTS: dict[str, Callable[[], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        clip_nothing,
        reduce_nothing,
        average_nothing,
        autocast_nothing,
        never_double_the_scale,
        recompute_nothing,
        restore_no_random_state,
        copy_nothing_for_a_save,
        read_the_norm_in_every_update,
        leave_validation_rows_on_the_host,
        crash,
    )
}

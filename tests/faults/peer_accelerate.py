"""Accelerate's `save_state` and `load_state` with automatic names, under DDP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint import rng
from tests.faults.jobs import COLLECTIVES_TIME_OUT, STEPS, PlainTraining, network


class Progress:
    """Where training stood, registered as objects of the user's own are."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class AccelerateState(PlainTraining):
    """Folders `checkpoint_0`, `checkpoint_1`, ...; keeping one is `total_limit=1`."""

    def __init__(self, directory: Path, *, keep_one: bool) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

        self.directory, self.keep_one = directory, keep_one
        project = ProjectConfiguration(
            project_dir=str(directory), automatic_checkpoint_naming=True, total_limit=1 if keep_one else None
        )
        in_time = InitProcessGroupKwargs(backend="gloo", timeout=COLLECTIVES_TIME_OUT)
        self.accelerator: Any = Accelerator(cpu=True, project_config=project, kwargs_handlers=[in_time])
        self.module, self.progress = network(), Progress()
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        self.accelerator.register_for_checkpointing(self.progress)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def write(self, step: int) -> None:
        self.progress.step = step
        self.accelerator.save_state()

    def load(self, step: int | None = None) -> int | None:
        self.accelerator.load_state(None if step is None else str(self.folder(self.directory, step)))
        return self.progress.step

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().state()
        yield from ((f"random/{name}", tensor) for name, tensor in rng.capture().items())

    @staticmethod
    def folder(directory: Path, step: int) -> Path:
        return directory / f"checkpoints/checkpoint_{STEPS.index(step)}"

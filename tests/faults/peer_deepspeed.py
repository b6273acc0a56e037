"""DeepSpeed's engine with ZeRO-1: `save_checkpoint` and `load_checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.faults.jobs import COLLECTIVES_TIME_OUT, ROWS, PlainTraining, network


class DeepSpeed(PlainTraining):
    """Its file `latest` names what is loaded; keeping one means the same tag every time, as it deletes none."""

    def __init__(self, directory: Path, *, keep_one: bool) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to build; gloo needs it not
        self.directory, self.keep_one = directory, keep_one
        deepspeed.init_distributed("gloo", timeout=COLLECTIVES_TIME_OUT)
        self.module = network()
        optimizer: Any = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        config = {
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
            "zero_optimization": {"stage": 1},
        }
        self.model, self.optimizer, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)
        self.engine: Any = self.model

    def train(self, positions: range) -> None:
        for position in positions:
            self.engine.backward(self.loss(position))
            self.engine.step()

    def write(self, step: int) -> None:
        self.engine.save_checkpoint(str(self.directory), tag=self.target(step).name, client_state={"step": step})

    def load(self, step: int | None = None) -> int | None:
        tag = None if step is None else self.target(step).name
        path, client_state = self.engine.load_checkpoint(str(self.directory), tag=tag)
        if path is None:
            return None
        found: int = client_state["step"]
        return found

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield f"model/{name}", parameter.detach()
        zero = self.engine.optimizer
        for partition in zero.single_partition_of_fp32_groups:
            yield "partition/master", partition.detach()
            moments = zero.optimizer.state[partition]
            yield from ((f"partition/{moment}", tensor) for moment, tensor in moments.items() if tensor.dim())

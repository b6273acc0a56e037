"""`torch.save` by rank zero, as in PyTorch's tutorial of DDP."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.faults.jobs import PlainTraining


class TorchSave(PlainTraining):
    """One file a checkpoint; keeping one means writing over it."""

    def write(self, step: int) -> None:
        if dist.get_rank() == 0:
            path = self.target(step) / "checkpoint.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}
            torch.save(state, path)
        dist.barrier()

    def load(self, step: int | None = None) -> int | None:
        step = self.newest("checkpoint.pt") if step is None else step
        if step is None:
            return None
        state = torch.load(self.target(step) / "checkpoint.pt")
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        found: int = state["step"]
        return found

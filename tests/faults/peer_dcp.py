"""`torch.distributed.checkpoint`, as in PyTorch's recipe; every rank writes a part."""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.faults.jobs import PlainTraining


class DistributedCheckpoint(PlainTraining):
    """One directory a checkpoint, which is whole once it has `.metadata`; keeping one means writing over it."""

    def _state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": step}

    def write(self, step: int) -> None:
        dcp.save(self._state(step), checkpoint_id=self.target(step))

    def load(self, step: int | None = None) -> int | None:
        step = self.newest(".metadata") if step is None else step
        if step is None:
            return None
        state = self._state(0)
        dcp.load(state, checkpoint_id=self.target(step))
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        found: int = state["step"]
        return found

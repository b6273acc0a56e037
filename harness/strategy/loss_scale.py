"""What the loss is multiplied by, so that small gradients do not vanish in fp16: on the device, alike on every rank."""

import torch
from torch import Tensor

LEAST, MOST = 1.0, 2.0**100
"""At the least scale there is nothing to halve: a gradient that is not finite there is not fp16's fault."""


class LossScale:
    """Halves after an update that was not applied, doubles after `growth_interval` applied ones in a row.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2. torch.amp.GradScaler does the same, down to any
    scale, and reads to the host once an update where the optimizer cannot skip.
    """

    def __init__(self, device: torch.device, *, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)  # ()
        self._applied_in_a_row = torch.tensor(0, device=device)  # () since the last change
        self._growth_interval = growth_interval

    def settle(self, applied: Tensor) -> None:
        """Hear of one update; () bool, the same on every rank."""
        in_a_row = (self._applied_in_a_row + 1) * applied
        grows = in_a_row == self._growth_interval
        self._applied_in_a_row = in_a_row * ~grows
        factor = torch.where(applied, 1.0 + grows, 0.5)
        self.scale = (self.scale * factor).clamp(LEAST, MOST)

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run must know, as plain JSON values; reads them to the host."""
        return {"scale": self.scale.item(), "applied_in_a_row": int(self._applied_in_a_row)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what `state_dict` has returned under any strategy."""
        self.scale = torch.full_like(self.scale, state["scale"]).clamp(LEAST, MOST)
        self._applied_in_a_row = torch.full_like(self._applied_in_a_row, state["applied_in_a_row"])

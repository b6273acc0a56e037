"""An exponential moving average of the weights, kept beside the optimizer's state."""

from collections.abc import Sequence

import torch
from torch import Tensor


class WeightAverage:
    """The mean of the weights after each applied update, in which each counts `decay` times as much as the next.

    After n updates it is sum_k decay^(n - k) w_k / sum_k decay^(n - k), k = 1 ... n. So the first weights of a run, of
    which nothing was learned, never count (the correction of arXiv:1412.6980, section 3). Buffers are not averaged:
    the live ones are evaluated and exported, since BatchNorm's statistics are averages themselves.

    Args:
        weights: what the optimizer changes, whole parameters or partitions of them; all of one type and device.
    """

    def __init__(self, weights: Sequence[Tensor], *, decay: float) -> None:
        self._weights, self._decay = list(weights), decay
        self.values = [weight.detach().clone() for weight in weights]
        """In the order of the weights."""
        self.count = torch.zeros((), dtype=torch.float64, device=self.values[0].device)
        """() updates in the average."""

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Take in the weights after an update, if it was applied, () bool. Reads nothing to the host."""
        is_applied = applied.to(self.count)
        self.count += is_applied
        share = is_applied * (1 - self._decay) / (1 - self._decay ** self.count.clamp(min=1))
        differences = torch._foreach_sub(self._weights, self.values)
        torch._foreach_mul_(differences, share.to(self.values[0].dtype))
        torch._foreach_add_(self.values, differences)

    @torch.no_grad()
    def start_again(self) -> None:
        """Forget what was averaged."""
        torch._foreach_copy_(self.values, self._weights)
        self.count.zero_()

"""Noise in the gradient, the same on every rank and in every launch."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from harness.config.training import GradientNoise
from harness.rows.order import permutation_key


class NoiseSource:
    """Gaussian noise whose variance falls with the updates: eta / (1 + position)^gamma.

    What is drawn follows from the seed and the position alone. So all ranks draw the same, and a resumed run what it
    would have drawn; CPUs and GPUs draw differently.
    Source: Neelakantan et al. 2015, arXiv:1511.06807, equation 1.
    """

    def __init__(self, config: GradientNoise, *, seed: int, device: torch.device) -> None:
        self._config, self._seed = config, seed
        self._generator = torch.Generator(device)

    def add(self, gradients: Sequence[Tensor], *, position: int) -> None:
        """Add the noise of an update to gradients that are reduced over ranks. Reads nothing to the host."""
        self._generator.manual_seed(permutation_key(self._seed, position, "gradient noise"))
        std = sqrt(self._config.eta / (1 + position) ** self._config.gamma)
        noise = [torch.empty_like(gradient).normal_(generator=self._generator) for gradient in gradients]
        torch._foreach_add_(list(gradients), noise, alpha=std)

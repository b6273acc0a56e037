"""Passes through a network that leave it as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def no_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have random states, buffers, modes and gradients afterwards as they were before."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    modes = {child: child.training for child in module.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        for child, mode in modes.items():
            child.training = mode
        module.zero_grad(set_to_none=True)

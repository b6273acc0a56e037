"""Passes through a network that leave it, and the random numbers of the process, as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def same_random_numbers(gpus: Sequence[torch.device] = ()) -> Iterator[None]:
    """Have the random states of Python, numpy, torch and these GPUs afterwards as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(gpus)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def no_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have random states, buffers, modes and gradients afterwards as they were before."""
    # A forward pass may put another tensor in the place of a buffer, also one of another shape.
    buffers = [
        (child, name, buffer, None if buffer is None else buffer.clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
    ]
    modes = {child: child.training for child in module.modules()}
    try:
        with same_random_numbers([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for child, name, buffer, values in buffers:
                child._buffers[name] = buffer
                if buffer is not None and values is not None:
                    buffer.copy_(values)
        for child, mode in modes.items():
            child.training = mode
        module.zero_grad(set_to_none=True)

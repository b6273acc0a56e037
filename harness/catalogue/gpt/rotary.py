"""Rotary positions: queries and keys are turned by an angle that grows with their place."""

import torch
from torch import Tensor

BASE = 10_000.0


def rotated(x: Tensor) -> Tensor:
    """Return (..., T, H) queries or keys, H even, each turned by its place, in fp32 or better.

    Features i and i + H / 2 are a point in a plane, turned by t / 10,000^(2 i / H) at place t, so the product of a
    query and a key depends on how far apart they are.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34, with the pairs of GPT-NeoX.
    """
    T, H = x.shape[-2:]
    frequencies = BASE ** -(torch.arange(0, H, 2, device=x.device, dtype=torch.float64) / H)  # (H / 2,)
    angles = torch.outer(torch.arange(T, device=x.device, dtype=torch.float64), frequencies)  # (T, H / 2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

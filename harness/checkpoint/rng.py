"""The random state of one rank, as tensors: torch, CUDA, numpy and python."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_BYTES = 2**14
"""About what the file of one rank takes."""


def seed_everything(seed: int) -> None:
    """Start every generator of this process from one number."""
    torch.manual_seed(seed)  # CUDA's too
    np.random.seed(seed % 2**32)
    random.seed(seed)


def capture() -> dict[str, Tensor]:
    """Return the state of every generator of this process."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy_state
    state = {
        "torch": torch.get_rng_state(),
        "python/words": torch.tensor([version, *words], dtype=torch.int64),
        "python/gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy/keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy/position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy/gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Tensor]) -> None:
    """Put every generator where `capture` found it.

    Raises:
        KeyError, OverflowError, RuntimeError, TypeError, ValueError: that is not what `capture` returns.
    """
    torch.set_rng_state(state["torch"])
    version, *words = state["python/words"].tolist()
    gauss = state["python/gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy/position"].tolist()
    keys = state["numpy/keys"].numpy().astype(np.uint32)
    if not 0 <= position <= len(keys):  # numpy would read whatever lies there
        raise ValueError(f"numpy's generator has {len(keys)} words and cannot stand at {position}")
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy/gauss"].item()))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])

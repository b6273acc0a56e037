"""The global random numbers of Python, numpy and torch, which transforms draw from: seeded, put back, looked at."""

from __future__ import annotations

import ctypes
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

_MT19937_BYTES = 625 * 4  # 624 words and the place among them


class GlobalState(NamedTuple):
    """Where the three generators stand."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: bytes


def seed(number: int) -> None:
    """Start the three generators from one number of 64 bits."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)


def restore(state: GlobalState) -> None:
    """Put the three generators where they were."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(torch.frombuffer(bytearray(state.torch), dtype=torch.uint8))


class Generators:
    """Reads where the three generators stand, at 9 us a time where nobody draws."""

    def __init__(self) -> None:
        self._numpy: dict[str, Any] = {}
        self._numpy_bytes = b""
        """What its state was when it was read; empty where a second number of `randn` was left over, which its words
        do not tell."""

    def state(self) -> GlobalState:
        """Return where they stand; equal to another if nothing was drawn between."""
        numpy = _numpy_bytes()
        if numpy != self._numpy_bytes or not numpy:
            self._numpy = np.random.get_state(legacy=False)
            self._numpy_bytes = b"" if self._numpy["has_gauss"] else numpy
        return GlobalState(random.getstate(), self._numpy, torch.get_rng_state().numpy().tobytes())

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put them back where they are now."""
        before = self.state()
        try:
            yield
        finally:
            restore(before)


def drew(before: GlobalState, after: GlobalState) -> bool:
    """Return whether anything was drawn between two states."""
    (_, words, spare), (_, now, spare_now) = before.python, after.python
    return (
        (words[-1], words[0], spare) != (now[-1], now[0], spare_now)  # the place moves with every draw
        or before.torch != after.torch
        or (before.numpy is not after.numpy and pickle.dumps(before.numpy) != pickle.dumps(after.numpy))
    )


def _numpy_bytes() -> bytes:
    """Return the words of numpy's generator, for 0.4 us instead of 28; nothing where it is of another kind."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # numpy has left it out of __all__
    if type(generator) is not np.random.MT19937:
        return b""
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)

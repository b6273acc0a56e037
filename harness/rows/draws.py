"""The global random numbers of Python, numpy and torch, which transforms draw from: seeded, put back, looked at."""

from __future__ import annotations

import ctypes
import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

_WORDS = 624  # of the Mersenne Twister, in Python and in numpy; beside them stands the place among them
_BYTES = 4 * (_WORDS + 1)


class GlobalState(NamedTuple):
    """Where the three generators stand."""

    python: bytes
    """The words, and the place among them."""
    python_spare: float | None
    """A second number of `gauss` that was not asked for yet."""
    numpy: dict[str, Any]
    torch: bytes


def seed(number: int) -> None:
    """Start the three generators from one number of 64 bits."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)


def state() -> GlobalState:
    """Return where the three generators stand, in 3 us where numpy's has not moved since it was read last."""
    python = _bytes_of_python() if _are_in_memory() else array("I", random.getstate()[1]).tobytes()
    spare = _INSTANCE.gauss_next  # type: ignore[attr-defined]
    return GlobalState(python, spare, _NUMPY.state(), torch.get_rng_state().numpy().tobytes())


def restore(state: GlobalState) -> None:
    """Put the three generators where they were."""
    random.setstate((random.Random.VERSION, tuple(array("I", state.python)), state.python_spare))
    _NUMPY.restore(state.numpy)
    torch.set_rng_state(torch.frombuffer(bytearray(state.torch), dtype=torch.uint8))


@contextmanager
def kept() -> Iterator[None]:
    """Put the three generators back where they are now."""
    before = state()
    try:
        yield
    finally:
        restore(before)


def drew(before: GlobalState, after: GlobalState) -> bool:
    """Return whether anything was drawn between two states."""
    return (
        before.python != after.python
        or before.python_spare != after.python_spare
        or before.torch != after.torch
        or (before.numpy is not after.numpy and _plain(before.numpy) != _plain(after.numpy))
    )


def _plain(state: dict[str, Any]) -> Any:
    """Return a state of numpy with its arrays as bytes, so that it can be compared."""
    values = state["state"].values()
    words = [value.tobytes() if isinstance(value, np.ndarray) else value for value in values]
    return state["bit_generator"], words, state["has_gauss"], state["gauss"]


_INSTANCE: random.Random = random.random.__self__  # type: ignore[attr-defined]  # whose methods the module offers


def _bytes_of_python() -> bytes:
    """Return the words of Python's generator and the place among them, for 0.4 us instead of 8."""
    found = ctypes.string_at(id(_INSTANCE) + object.__basicsize__, _BYTES)
    return found[4:] + found[:4]


@cache
def _are_in_memory() -> bool:
    """Return whether this Python's generator lies in memory as CPython's does."""
    is_large_enough = type(_INSTANCE).__basicsize__ >= object.__basicsize__ + _BYTES
    return is_large_enough and _bytes_of_python() == array("I", random.getstate()[1]).tobytes()


class _Numpy:
    """numpy's generator, whose state takes 28 us to read and its words alone 0.4."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._words = b""
        """Those of `_state`; nothing where a second number of `randn` is left over, which the words do not tell."""

    def state(self) -> dict[str, Any]:
        words = _numpy_words()
        if words != self._words or not words:
            self._state = np.random.get_state(legacy=False)
            self._words = b"" if self._state["has_gauss"] else words
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        np.random.set_state(state)
        self._words = b""


_NUMPY = _Numpy()


def _numpy_words() -> bytes:
    """Return the words of numpy's generator and the place among them; nothing where it is of another kind."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # numpy has left it out of __all__
    if type(generator) is not np.random.MT19937:
        return b""
    return ctypes.string_at(generator.ctypes.state_address, _BYTES)

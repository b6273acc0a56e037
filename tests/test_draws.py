"""The random numbers of Python, numpy and torch: what is drawn is seen, and put back to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from harness.rows import draws

DRAWS: list[Callable[[], object]] = [
    random.random,
    lambda: random.gauss(0, 1),
    lambda: random.sample(range(9), 3),
    np.random.rand,
    np.random.randn,
    lambda: np.random.shuffle([1, 2, 3]),
    lambda: torch.rand(()),
    lambda: torch.randperm(5),
]


def next_numbers() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.randn()),
        float(np.random.rand()),
        float(torch.rand(())),
    ]


@pytest.fixture(params=["nothing left over", "second numbers left over", "another generator of numpy"], autouse=True)
def before(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is where a row is asked for: `gauss` and `randn` make two numbers at once and keep one."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    draws.seed(11)
    if request.param == "second numbers left over":
        random.gauss(0, 1), np.random.randn()
    if request.param == "another generator of numpy":
        np.random.set_bit_generator(np.random.PCG64(3))  # type: ignore[attr-defined]
    yield
    np.random.set_bit_generator(generator)  # type: ignore[attr-defined]


@pytest.mark.parametrize("draw", DRAWS)
def test_whatever_is_drawn_is_seen_and_can_be_put_back(draw: Callable[[], object]) -> None:
    first = draws.state()
    assert not draws.drew(first, draws.state())
    draw()
    second = draws.state()
    assert draws.drew(first, second)
    wanted = next_numbers()
    draws.restore(second)
    assert not draws.drew(second, draws.state())
    assert next_numbers() == wanted
    draws.restore(first)
    assert not draws.drew(first, draws.state())
    draw()
    assert next_numbers() == wanted


def test_what_draws_nothing_is_not_seen() -> None:
    first = draws.state()
    random.Random(3).random(), np.random.default_rng(3).random(), torch.rand(3, generator=torch.Generator())
    assert not draws.drew(first, draws.state())


def test_the_words_of_pythons_generator_are_found_in_memory() -> None:
    assert draws._are_in_memory(), "or every batch takes 15 us more on this Python"


@pytest.mark.parametrize("is_error", [False, True])
def test_what_is_drawn_inside_is_put_back_also_after_an_error(is_error: bool) -> None:
    first = draws.state()
    wanted = next_numbers()
    draws.restore(first)
    with pytest.raises(ZeroDivisionError) if is_error else draws.kept(), draws.kept():
        next_numbers()
        1 / (not is_error)
    assert next_numbers() == wanted

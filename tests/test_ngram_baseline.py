"""The n-gram baselines: Kneser-Ney by its formula, one sum at a time, and probabilities that add up to one."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.ngram_baseline import KneserNey, bits_per_byte
from tests.test_order import unhurried

V = 4
texts = st.lists(st.integers(0, V - 1), min_size=8, max_size=60).map(np.array)


def by_the_formula(tokens: list[int], context: tuple[int, ...], word: int) -> float:
    """p_n(word | context) as the docstring of the script has it, with dictionaries."""

    def counts_of(n: int) -> Counter[tuple[int, ...]]:
        if n == order:
            return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        return Counter(gram[1:] for gram in counts_of(n + 1))

    order, p = len(context) + 1, 1 / V
    for n in range(1, order + 1):
        counts = counts_of(n)
        h = context[len(context) - n + 1 :]
        following = {gram: count for gram, count in counts.items() if gram[:-1] == h}
        if not following:
            continue
        ones, twos = (sum(count == times for count in counts.values()) for times in (1, 2))
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        total = sum(following.values())
        p = max(following.get((*h, word), 0) - discount, 0) / total + discount * len(following) / total * p
    return p


@unhurried
@given(texts, st.integers(1, 5), texts)
def test_each_probability_is_that_of_the_formula(train: np.ndarray, order: int, seen: np.ndarray) -> None:
    found = KneserNey(train, order=order, num_tokens=V).probabilities(seen)
    tokens = seen.tolist()
    wanted = [
        by_the_formula(train.tolist(), tuple(tokens[i : i + order - 1]), tokens[i + order - 1])
        for i in range(len(tokens) - order + 1)
    ]
    assert found == pytest.approx(wanted, rel=1e-12)


@unhurried
@given(texts, st.integers(1, 5), st.lists(st.integers(0, V - 1), min_size=4, max_size=4))
def test_the_probabilities_of_all_tokens_after_any_context_add_up_to_one(
    train: np.ndarray, order: int, context: list[int]
) -> None:
    model = KneserNey(train, order=order, num_tokens=V)
    total = sum(model.probabilities(np.array([*context[: order - 1], word]))[0] for word in range(V))
    assert total == pytest.approx(1, abs=1e-12)


def test_a_unigram_needs_as_many_bits_as_the_text_has_entropy() -> None:
    train = np.array([0] * 512 + [1] * 256 + [2] * 128 + [3] * 128)
    found = bits_per_byte(train, np.append(0, train), order=1, token_bytes=np.ones(V, np.int64))
    assert found == pytest.approx(1.75, abs=0.01)


def test_longer_contexts_know_a_text_that_shorter_ones_cannot() -> None:
    rng = np.random.default_rng(0)
    free = rng.integers(0, V, 4000)
    tokens = np.stack([free, (free + 1) % V], axis=1).ravel()  # every second token follows from the one before it
    bits = [bits_per_byte(tokens, tokens, order=order, token_bytes=np.ones(V, np.int64)) for order in (1, 2, 5)]
    assert bits[0] == pytest.approx(2, abs=0.01)
    assert all(later < earlier for earlier, later in pairwise(bits))
    assert bits[-1] == pytest.approx(1, abs=0.25)


def test_tokens_of_more_bytes_need_fewer_bits_per_byte() -> None:
    tokens = np.array([0, 1, 2, 3] * 10)
    one, three = (bits_per_byte(tokens, tokens, order=1, token_bytes=np.full(V, n)) for n in (1, 3))
    assert one == pytest.approx(3 * three)
    assert one == pytest.approx(math.log2(V), abs=0.01)

"""What counting can do on a config's text: `python -m tests.benchmarks.ngram_baseline configs/shakespeare_gpt.yaml`.

Prints the bits per byte of unigrams and of interpolated Kneser-Ney 5-grams on the very validation tokens that
`val/bits_per_byte` is of: once over the tokens of the config, once over the bytes of the same documents. Counts are of
the training tokens alone, and contexts go across blocks and documents, which is more than the model has.

The formula, for a context h of n - 1 tokens and h' the same without its first (Chen and Goodman 1999, eq. 29):
    p_n(w | h) = max(c(h w) - D_n, 0) / c(h .) + D_n N(h .) / c(h .) p_{n-1}(w | h')
c counts occurrences at the highest order, and different tokens to the left below it; N(h .) is how many different
tokens follow h; D_n = n_1 / (n_1 + 2 n_2), from how many c are 1 and 2, or 1/2 where there are none of either. A
context that was never seen has p_n = p_{n-1}, and p_0 = 1 / V. A unigram is n = 1 with c the occurrences.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from harness.catalogue.text.read import load_text, prepare_text
from harness.catalogue.text.section import ByteTokenizer, TextData
from harness.config.io import load_config
from harness.rows.rows import Columns

Ids = NDArray[np.int64]


class KneserNey:
    """Interpolated Kneser-Ney of one order over tokens 0 ... num_tokens - 1."""

    def __init__(self, tokens: Ids, *, order: int, num_tokens: int) -> None:
        assert num_tokens**order < 2**63, f"{order}-grams of {num_tokens:,} tokens do not fit 64 bits"
        self.order, self.num_tokens = order, num_tokens
        self._levels = []
        grams, counts = np.unique(_grams(tokens, order, num_tokens), return_counts=True)
        for n in range(order, 0, -1):
            self._levels.append(_Level(grams, counts, num_tokens))
            # Each different n-gram is one token to the left of the (n-1)-gram that it ends in.
            grams, counts = np.unique(grams % num_tokens ** (n - 1), return_counts=True)
        self._levels.reverse()

    def probabilities(self, tokens: Ids) -> NDArray[np.float64]:
        """Return the (n - order + 1,) probability of each of (n,) tokens that has order - 1 tokens before it."""
        whole = _grams(tokens, self.order, self.num_tokens)
        p = np.full(len(whole), 1 / self.num_tokens)
        for n, level in enumerate(self._levels, start=1):
            p = level.interpolate(whole % self.num_tokens**n, p)
        return p


class _Level:
    """The counts of the n-grams of one n."""

    def __init__(self, grams: Ids, counts: Ids, num_tokens: int) -> None:
        self._num_tokens, self._grams, self._counts = num_tokens, grams, counts
        ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
        self._discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        contexts, first, self._followers = np.unique(grams // num_tokens, return_index=True, return_counts=True)
        self._contexts, self._totals = contexts, np.add.reduceat(counts, first)

    def interpolate(self, grams: Ids, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return p_n of each gram's last token from p_{n-1} of it."""
        counts = _look_up(grams, self._grams, self._counts)
        contexts = grams // self._num_tokens
        totals, followers = (_look_up(contexts, self._contexts, of) for of in (self._totals, self._followers))
        seen = np.maximum(totals, 1)
        p = np.maximum(counts - self._discount, 0) / seen + self._discount * followers / seen * lower
        return np.where(totals > 0, p, lower)


def _grams(tokens: Ids, order: int, num_tokens: int) -> Ids:
    """Return each run of `order` tokens as one number, the last token its lowest digit."""
    result = np.zeros(len(tokens) - order + 1, np.int64)
    for place in range(order):
        result = result * num_tokens + tokens[place : len(tokens) - order + 1 + place]
    return result


def _look_up(wanted: Ids, keys: Ids, values: Ids) -> Ids:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def stream(columns: Columns) -> Ids:
    """Return the tokens that blocks were cut from, the first input and then every target."""
    return np.concatenate([columns.inputs[:1, 0].numpy(), columns.targets.flatten().numpy()]).astype(np.int64)


def bits_per_byte(train: Ids, validation: Ids, *, order: int, token_bytes: NDArray[np.int64]) -> float:
    """Return what `val/bits_per_byte` is: every validation token but the first, which no model predicts.

    The first few have the end of the training tokens before them, so that each has a whole context.
    """
    model = KneserNey(train, order=order, num_tokens=len(token_bytes))
    p = model.probabilities(np.concatenate([train[len(train) - order + 1 :], validation]))[1:]
    return -float(np.log(p).sum()) / math.log(2) / int(token_bytes[validation[1:]].sum())


def baselines(data: TextData, *, seed: int, orders: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Return bits per byte by name, over the config's own tokens."""
    prepare_text(data, seed=seed)
    text = load_text(data, seed=seed)
    train, validation, token_bytes = stream(text.train), stream(text.validation), text.tokenizer.token_bytes()
    return {
        "unigram" if order == 1 else f"{order}-gram": bits_per_byte(
            train, validation, order=order, token_bytes=token_bytes
        )
        for order in orders
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    config = load_config(given.config, given.overrides).config
    if not isinstance(config.data, TextData):
        sys.exit(f"{given.config}: data.source is {config.data.source}, wanted text")
    in_bytes = config.data.model_copy(update={"tokenizer": ByteTokenizer(kind="byte")})
    kinds = {config.data.tokenizer.kind: config.data, "byte": in_bytes}
    for kind, data in kinds.items():
        for name, bits in baselines(data, seed=config.run.seed).items():
            print(f"{name:8} of {kind:4} tokens: {bits:.4f} bits per byte", flush=True)


if __name__ == "__main__":
    main()

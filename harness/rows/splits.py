"""What a run trains on and what it is judged by, and how rows are set aside for that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.config.data import DataSection
from harness.errors import DataError
from harness.rows.order import permutation_key, permute
from harness.rows.rows import AnyRows, Augmentation

READING = 2
"""Raise it when the same files give other rows than before, and say in `read_otherwise` which columns those are."""


class Tokens(Protocol):
    """The tokens of running text, as a run asks for them."""

    @property
    def num_tokens(self) -> int:
        """Different tokens."""
        ...

    def decode(self, ids: list[int]) -> bytes:
        """Return the bytes that tokens stand for."""
        ...

    def token_bytes(self) -> NDArray[np.int64]:
        """Return (V,) how many bytes each token stands for."""
        ...

    def to_json(self) -> str:
        """Return everything that it is."""
        ...


@dataclass(frozen=True)
class DataSplits:
    """What a run trains on, what it is judged by, and the sizes that the model follows from."""

    train: AnyRows
    validation: AnyRows
    input_shape: tuple[int, ...]
    """Of one row: (F,), (C, H, W), or (T,) tokens."""
    num_outputs: int
    """Classes, numbers to predict, or different tokens."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """Plain data: how rows became `inputs` ("features", see preprocess.py) and names labels ("classes")."""
    notices: tuple[str, ...] = ()
    """Sentences for whoever started the run."""
    tokenizer: Tokens | None = None
    """Of running text."""
    augmentation: Augmentation | None = None
    """Of the rows that train."""
    own_facts: dict[str, Any] = field(default_factory=dict)
    """JSON that the data say of themselves beside these sizes, by the names of docs/parts.md."""
    read_otherwise: tuple[str, ...] = ()
    """What is done with the columns here that was not in the version before, see `tabular.read_otherwise`."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a network may be built from."""
        return {"input_shape": self.input_shape, "num_outputs": self.num_outputs, **self.own_facts}


def split_rows(targets: NDArray[Any], data: DataSection, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the (training, validation) rows of a data section in ascending order; see `set_aside`.

    Args:
        targets: (N,) labels, or (N, K) numbers, which are not stratified.
    """
    labels = targets if data.stratify and targets.ndim == 1 else None
    return set_aside(len(targets), data.validation_fraction, seed=seed, labels=labels)


def set_aside(
    num_rows: int, fraction: float, *, seed: int, labels: NDArray[Any] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the (training, validation) rows in ascending order; which is which follows from seed and labels alone.

    Args:
        labels: (N,) of which each class has its share in both.
    Raises:
        DataError: one of them would have no row.
    """
    num_validation = round(fraction * num_rows)
    if not 0 < num_validation < num_rows:
        raise DataError(
            f"data.validation_fraction: {fraction:g} of {num_rows} rows leaves {num_rows - num_validation} to train "
            f"and {num_validation} to validate; "
            + (f"use {1 / num_rows:.2g} to {1 - 1 / num_rows:.2g}" if num_rows > 1 else "at least 2 rows are wanted")
        )
    order = permute(np.arange(num_rows), size=num_rows, key=permutation_key(seed, 0, "split"))
    is_validation = np.arange(num_rows) < num_validation  # in this order
    if labels is not None:
        is_validation = _first_of_each_class(labels[order], num_validation)
    return np.sort(order[~is_validation]), np.sort(order[is_validation])


def _first_of_each_class(labels: NDArray[np.int64], num_wanted: int) -> NDArray[np.bool_]:
    """Return which rows are the first of their class, `num_wanted` in all, each class its share to within one row."""
    counts = np.bincount(labels)
    shares = num_wanted * counts / len(labels)
    quotas = np.floor(shares).astype(np.int64)
    # The largest remainders get the rows that are left over (Hamilton's method).
    largest = np.argsort(quotas - shares, kind="stable")
    quotas[largest[: num_wanted - quotas.sum()]] += 1
    by_class = np.argsort(labels, kind="stable")
    place_in_class = np.empty_like(labels)
    place_in_class[by_class] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[by_class]]
    return place_in_class < quotas[labels]

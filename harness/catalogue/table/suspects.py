"""Features that look like something nobody meant the model to see: the number of a row, or the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import lgamma, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.catalogue.table.preprocess import Feature, values_of
from harness.catalogue.table.read import Table

FIRST_ROWS = 10_000
"""What these do not show is not looked for in the others."""
MIN_ROWS = 20
LEAST_ODDS = 1_000
"""A column predicts the target by chance in fewer than one of so many tables."""


def suspects(
    table: Table,
    features: Sequence[Feature],
    names: Sequence[str],
    targets: NDArray[Any],
    rows: NDArray[np.int64],
) -> Iterator[str]:
    """Yield a sentence for each feature all of whose values differ, and each that alone tells a target.

    Args:
        names: of the targets.
        targets: (N,) labels or (N, K) numbers of all rows of the table.
        rows: those that are looked at.
    """
    if len(rows) < MIN_ROWS:
        return
    columns = dict(zip(names, targets.reshape(len(targets), -1).T, strict=True))
    for feature in features:
        for some in (rows[:FIRST_ROWS], rows):
            values = values_of(replace(table, arrow=table.arrow.take(some)), feature)
            is_number_of_row = _are_all_different(values)
            told = [name for name, column in columns.items() if _predicts(values, column[some], odds=len(features))]
            if not is_number_of_row and not told:
                break
        if is_number_of_row:
            yield (
                f"{table.path}: column {feature['name']!r} has another value in each of {len(rows):,} rows, as the "
                "number of a row or a name has; leave it out of data.features if it is one"
            )
        for name in told:
            yield (
                f"{table.path}: column {feature['name']!r} alone tells {name!r} of all {len(rows):,} rows; leave "
                "it out of data.features if it is not known where the model will be used"
            )


def _are_all_different(values: NDArray[Any]) -> bool:
    is_whole = np.array_equal(values, np.floor(values))  # fractions always differ; NaN is not equal to itself
    return bool(is_whole) and len(np.unique(values)) == len(values)


def _predicts(values: NDArray[Any], target: NDArray[Any], *, odds: int) -> bool:
    """Whether each value, or each of as many intervals as there are classes, has one value of the target.

    Not where that happens by chance in one of LEAST_ODDS tables with `odds` such columns: values that occur once say
    nothing, and few rows are soon in order.
    """
    _, codes, counts = np.unique(target, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return False
    if np.ptp(target) and np.ptp(values) and np.corrcoef(values, target)[0, 1] ** 2 > 1 - 1e-6:
        return len(counts) > 2 or _log_odds_of_intervals(counts) > log(LEAST_ODDS * odds)
    order = np.lexsort((codes, values))
    is_new_value = np.diff(values[order], prepend=np.nan) != 0
    is_new_code = np.diff(codes[order], prepend=-1) != 0
    if (is_new_code & ~is_new_value).any():
        return False
    repeats = codes[order][~is_new_value]
    has_values = (2 * np.bincount(repeats, minlength=len(counts)) >= counts).all()  # and not most rows one of their own
    by_values = -np.log(counts / len(codes))[repeats].sum() if has_values else 0.0
    by_intervals = _log_odds_of_intervals(counts) if is_new_code.sum() == len(counts) else 0.0
    return bool(max(by_values, by_intervals) > log(LEAST_ODDS * odds))


def _log_odds_of_intervals(counts: NDArray[np.int64]) -> float:
    """Return the logarithm of one over the chance that rows of these classes stand class after class."""
    return lgamma(counts.sum() + 1) - sum(lgamma(count + 1) for count in counts) - lgamma(len(counts) + 1)

"""What is learned from the training rows of a table before the network sees them, as plain data that can be saved.

A feature becomes one column, `((value, or fill where there is none) - mean) / scale`, or one column for each of its
categories, 1 in that of its value and 0 elsewhere. The categories, fills, means and scales are those of the training
rows; a validation row changes none of them. Every rank reads the same rows and learns the same from them, so nothing of
it is sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from harness.catalogue.table.columns import NUMBERS, TEXTS, advice, short, spelled_numbers
from harness.catalogue.table.read import Table, numbers_of
from harness.catalogue.table.section import TableData
from harness.errors import DataError

MAX_CATEGORIES = 1_000  # each is a column of every row

Feature = Mapping[str, Any]
"""{"name", "fill", "mean", "scale"} of a number, {"name", "categories"} of the rest; plain data, as in trainer.json."""


def fit_features(table: Table, names: Sequence[str], data: TableData, *, rows: NDArray[np.int64]) -> list[Feature]:
    """Return what makes numbers of each column, learned from the training rows `rows` of a table.

    Raises:
        DataError: a column is not of numbers, has no value in these rows to learn from, or too many categories.
    """
    may_miss = data.impute != "none"
    return [
        _fit_categories(table, name, rows)
        if name in data.categorical
        else _fit_numbers(table, name, numbers_of(table, name, may_miss=may_miss)[rows], data)
        for name in names
    ]


def check_feature(table: Table, name: str, data: TableData) -> None:
    """Refuse a column that no feature can be made of.

    Raises:
        DataError: it is not of numbers, or not of categories.
    """
    if name in data.categorical:
        _values(table, name)
    else:
        numbers_of(table, name, may_miss=data.impute != "none")


def _fit_categories(table: Table, name: str, rows: NDArray[np.int64]) -> Feature:
    categories = sorted(set(_values(table, name, rows)), key=lambda value: (value is None, str(type(value)), value))
    if name in (table.spelled or ()):
        categories = _in_order_of_numbers(categories)
    if len(categories) > MAX_CATEGORIES:
        raise DataError(
            f"{table.path}: column {name!r} has {len(categories):,} different values in the training rows, but "
            f"data.categorical makes a column of each and stops at {MAX_CATEGORIES:,}. Group them, or leave the "
            "column out"
        )
    return {"name": name, "categories": categories}


def _in_order_of_numbers(texts: list[str | None]) -> list[str | None]:
    """Return categories of csv in the order that they have in a file of another format, where they are numbers."""
    numbers = spelled_numbers(pyarrow.array(texts, pyarrow.large_string()))
    return texts if numbers is None else [texts[place] for place in np.argsort(numbers, kind="stable")]  # NaN is last


def _fit_numbers(table: Table, name: str, training: NDArray[Any], data: TableData) -> Feature:
    present = training[~np.isnan(training)].astype(np.float64)
    if not present.size:
        raise DataError(
            f"{table.path}: column {name!r} has no value in any of the {len(training):,} training rows, so there is "
            "nothing to impute it with. Leave the column out."
        )
    if present.min() == present.max():  # it has no scale; the rounding of its mean is none
        only = float(present[0])
        fill = None if data.impute == "none" else only
        return {"name": name, "fill": fill, "mean": only if data.standardize else 0.0, "scale": 1.0}
    fill = None
    if data.impute != "none":
        fill = float(np.mean(present) if data.impute == "mean" else np.median(present))
        present = np.concatenate([present, np.full(len(training) - len(present), fill)])
    if not data.standardize:
        return {"name": name, "fill": fill, "mean": 0.0, "scale": 1.0}
    return {"name": name, "fill": fill, "mean": float(present.mean()), "scale": float(present.std())}


def apply_features(table: Table, features: Sequence[Feature]) -> NDArray[Any]:
    """Return the inputs (N, F) of all rows of a table, in float32 if that holds each exactly, else float64.

    Raises:
        DataError: a column is missing or not of numbers.
    """
    columns = [column for feature in features for column in _columns(table, feature)]
    matrix = np.empty((len(columns[0]), len(columns)), np.result_type(np.float32, *columns))
    return np.stack(columns, axis=1, out=matrix)


def _columns(table: Table, feature: Feature) -> list[NDArray[Any]]:
    if "categories" in feature:
        codes = _codes(table, feature)
        return [(codes == code).astype(np.float32) for code in range(len(feature["categories"]))]
    values = numbers_of(table, feature["name"], may_miss=feature["fill"] is not None)
    if feature["fill"] is not None:
        values = np.where(np.isnan(values), feature["fill"], values)
    if (feature["mean"], feature["scale"]) == (0.0, 1.0):
        return [values]
    return [(values.astype(np.float64) - feature["mean"]) / feature["scale"]]


def imputed_values(splits: Mapping[str, tuple[Table, NDArray[np.int64]]], features: Sequence[Feature]) -> list[str]:
    """Return a sentence for each column some of whose numbers are filled in.

    Args:
        splits: by their names, a table and the rows of it.
    """
    sentences = []
    for feature in features:
        if feature.get("fill") is None:
            continue
        counts = []
        for name, (table, rows) in splits.items():
            missing = np.isnan(numbers_of(table, feature["name"], may_miss=True)[rows]).sum()
            counts.append((int(missing), f"{missing:,} of {len(rows):,} {name} rows"))
        if any(missing for missing, _ in counts):
            where = " and ".join(text for missing, text in counts if missing)
            sentences.append(
                f"column {feature['name']!r} has no number in {where}; {feature['fill']:g} stands there (data.impute)"
            )
    return sentences


def unknown_categories(
    table: Table, features: Sequence[Feature], *, rows: NDArray[np.int64], called: str = "validation rows"
) -> list[str]:
    """Return a sentence for each column in which rows have a value that no training row has.

    Args:
        called: what these rows are.
    Raises:
        DataError: no value of a column is known, and all are numbers that are, spelled otherwise.
    """
    sentences = []
    for feature in features:
        if "categories" not in feature:
            continue
        unknown = np.flatnonzero(_codes(table, feature)[rows] < 0)
        if unknown.size:
            value = _values(table, feature["name"], rows[unknown[:1]])[0]
            _refuse_other_spelling(table, feature, rows=rows)
            sentences.append(
                f"{table.path}: column {feature['name']!r} has in {unknown.size:,} of {len(rows):,} {called} a "
                f"value that no training row has, such as {value!r}; there all of its columns are 0"
            )
    return sentences


def _refuse_other_spelling(table: Table, feature: Feature, *, rows: NDArray[np.int64]) -> None:
    values = {value for value in _values(table, feature["name"], rows) if value is not None}
    by_number = {_as_number(category): category for category in feature["categories"]}
    known = {value: by_number.get(_as_number(value)) for value in values if _as_number(value) is not None}
    if not values or not values.isdisjoint(feature["categories"]) or None in [known.get(value) for value in values]:
        return
    value, category = min(known.items())
    raise DataError(
        f"{table.path}: column {feature['name']!r} has {value!r} where the training rows have {category!r}, and so in "
        "every row: the same numbers, spelled otherwise. Write both files alike (pandas writes whole numbers with .0 "
        "where one of the column is missing)"
    )


def _as_number(value: Any) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def values_of(table: Table, feature: Feature) -> NDArray[Any]:
    """Return the (N,) numbers of a feature as they stand in the table, NaN for none; of categories the places."""
    if "categories" in feature:
        return _codes(table, feature)
    return numbers_of(table, feature["name"], may_miss=feature["fill"] is not None).astype(np.float64)


def _codes(table: Table, feature: Feature) -> NDArray[np.int64]:
    """Return the place of each row's value among the categories, -1 if it is none of them."""
    places = {value: place for place, value in enumerate(feature["categories"])}
    return np.array([places.get(value, -1) for value in _values(table, feature["name"])], np.int64)


def _values(table: Table, name: str, rows: NDArray[np.int64] | None = None) -> list[Any]:
    """Return the texts, numbers or booleans of a column; None where there is no value, or NaN."""
    column = table.arrow.column(name)
    if table.kind(name) not in (TEXTS, NUMBERS, "null"):
        raise DataError(
            f"{table.path}: column {name!r} holds {short(column.type)}, but texts, numbers or true and false are "
            f"wanted in data.categorical. {advice(column.type)}"
        )
    values = (column if rows is None else column.take(rows)).to_pylist()
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]

"""Rows that somebody has in Python, as the inputs of a network that was trained on a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from harness.catalogue.table.columns import plain
from harness.catalogue.table.preprocess import Feature, apply_features, unknown_categories
from harness.catalogue.table.read import Table
from harness.config.problems import nearest_name
from harness.errors import DataError

HERE = "the rows given"


def inputs_of(rows: Any, features: Sequence[Feature]) -> tuple[NDArray[Any], list[str]]:
    """Return the (N, F) inputs of rows, and a sentence for each column with categories that no training row had.

    Args:
        rows: a DataFrame of pandas, or a list of N mappings of names to values.
    Raises:
        DataError: a column is missing, or holds what the training rows could not have.
    """
    if not (isinstance(features, list) and all(map(_is_feature, features))):
        raise DataError(f"{HERE} meet a preprocessing that this harness has not written: {features!s:.200}")
    names = [feature["name"] for feature in features]
    table = Table(Path(HERE), plain(pyarrow.table({name: _column(rows, name) for name in names})))
    every = np.arange(table.arrow.num_rows)
    return apply_features(table, features), unknown_categories(table, features, rows=every, called="rows")


def _is_feature(feature: Any) -> bool:
    """Whether something that anyone may have written is a `Feature`."""
    if not isinstance(feature, Mapping) or not isinstance(feature.get("name"), str):
        return False
    if isinstance(feature.get("categories"), list):
        return all(isinstance(value, str | int | float | None) for value in feature["categories"])
    numbers = (feature.get("mean"), feature.get("scale"), feature.get("fill") or 0)
    return "fill" in feature and all(isinstance(number, int | float) for number in numbers)


def _column(rows: Any, name: str) -> Any:
    is_frame = hasattr(rows, "columns")
    if not is_frame and not (isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows)):
        raise DataError(f"{HERE} are a {type(rows).__name__}; a DataFrame, or a list of at least one dict, is wanted")
    for number, there in enumerate([rows.columns] if is_frame else rows):
        if name not in there:
            nearest = nearest_name(name, map(str, there))
            where = "" if is_frame else f" in row {number:,}"
            raise DataError(f"{HERE}: there is no {name!r}{where}{f' (nearest: {nearest!r})' if nearest else ''}")
    try:
        return pyarrow.array(rows[name] if is_frame else [row[name] for row in rows], from_pandas=True)
    except (pyarrow.ArrowException, TypeError) as error:
        raise DataError(f"{HERE}: column {name!r} has values of several types ({error}); write them alike") from error

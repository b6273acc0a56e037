"""How long rows are, where a set of rows says it beforehand: one whole number above 0 a row."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import DataError
from harness.own_code import told

RowLengths = NDArray[np.int64]
"""(N,) how long each row is, in whatever its time and memory go with; whole numbers above 0."""
WRITE_LENGTHS = (
    "give the Dataset an attribute or a method `lengths`, one whole number above 0 a row, such as self.lengths = "
    "[len(row) for row in self.rows]"
)


def lengths_of(rows: Any) -> RowLengths | None:
    """Return the (N,) lengths that a set of N rows says its rows have; None where it has no `lengths`.

    Args:
        rows: has `__len__`, and perhaps `lengths`, an attribute or a method without arguments.
    Raises:
        DataError: these are not one whole number above 0 a row.
    """
    name = type(rows).__name__
    try:
        said = getattr(rows, "lengths", None)
        said = said() if callable(said) else said
        column = None if said is None else np.asarray(said)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"lengths of {name} raised {told(error)}; {WRITE_LENGTHS}") from error
    if column is None:
        return None
    if problem := _problem(column, num_rows=len(rows)):
        raise DataError(f"lengths of {name}: {problem}; {WRITE_LENGTHS}")
    return column.astype(np.int64)


def _problem(column: NDArray[Any], *, num_rows: int) -> str:
    """Return what is wrong with lengths; empty if nothing is."""
    if column.ndim != 1:
        return f"one number a row is wanted, not an array of shape {column.shape} of {column.dtype}"
    if len(column) != num_rows:
        return f"there are {len(column):,} of them for {num_rows:,} rows"
    if column.dtype.kind == "f":
        wrong = ~np.isfinite(column) | (column != np.floor(column))
        row = int(wrong.argmax())
        return f"whole numbers are wanted, not {column.dtype}, and row {row:,} has {column[row]:g}"
    if column.dtype.kind not in "iu":
        return f"whole numbers are wanted, not {column.dtype}, and row 0 has {column[0]!r}"
    wrong = (column < 1) | (column > np.iinfo(np.int64).max)
    if wrong.any():
        row = int(wrong.argmax())
        return f"row {row:,} has {column[row]}"
    return ""


def lengths_digest(lengths: RowLengths) -> str:
    """Return 16 hexadecimal digits that change with every length and their order."""
    return hashlib.blake2b(np.ascontiguousarray(lengths).data, digest_size=8).hexdigest()

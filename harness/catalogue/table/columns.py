"""What a column of a table holds: texts, numbers, or what nothing can be learned from as it is; needs no torch.

Parquet and json say of each value what it is. A csv file has nothing but spellings, so what a column of it is follows
from what it is used for: a category, label or text is as it is spelled and only the empty field is missing, and labels
are numbers if the training file spells each of them as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

TEXTS, NUMBERS = "texts", "numbers"
SPELLED_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.\d*)?(?:[eE][+-]?\d+)?")
"""Without leading zeros: 01234 is a code, not the number 1234."""
SPELLED_TRUTH = {"True": 1.0, "TRUE": 1.0, "true": 1.0, "False": 0.0, "FALSE": 0.0, "false": 0.0}
PANDAS_MISSING = {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"} | set(
    ("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)
"""What pandas takes for no value besides the empty field: here in columns of numbers only, once in all."""
MOST_SHOWN = 100
"""Characters of a value or type in a message."""


def kind_of(type_: Any) -> str:
    """Return TEXTS, NUMBERS (also true and false), or what it is if neither."""
    types = pyarrow.types
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return TEXTS
    if types.is_boolean(type_) or types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_):
        return NUMBERS
    if types.is_dictionary(type_):
        return kind_of(type_.value_type)
    if types.is_temporal(type_):
        return "times"
    return "lists or structs" if types.is_nested(type_) else str(type_)


def short(value: Any) -> str:
    """Return what a value or type looks like, in a line: json of a table by its columns has structs of all its rows."""
    text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def plain(arrow: Any) -> Any:
    """Return a table whose texts are strings and whose numbers are numbers, however its writer has stored them.

    Decimals become the nearest float64, texts of dictionaries and views (as polars writes them) large strings.
    """
    for place, field in enumerate(arrow.schema):
        types = pyarrow.types
        column = arrow.column(place)
        if types.is_dictionary(field.type):
            column = column.cast(field.type.value_type)
        if types.is_string_view(column.type):
            column = column.cast(pyarrow.large_string())
        elif types.is_decimal(column.type):
            column = column.cast(pyarrow.string()).cast(pyarrow.float64())  # directly, 0.95 is 0.9500000000000001
        if column.type != field.type:
            arrow = arrow.set_column(place, field.name, column)
    return arrow


def advice(type_: Any, *, is_target: bool = False) -> str:
    """Return what to do with a column that is wanted as numbers and holds something else."""
    if is_target:
        others = "set task.kind: classification, which predicts texts" if kind_of(type_) == TEXTS else "write numbers"
        return f"Name another column in data.targets, or {others}."
    if kind_of(type_) == TEXTS:
        return "Name it in data.categorical, or leave the column out."
    if pyarrow.types.is_temporal(type_):
        return "Write what matters of the time as numbers, such as days since the first, or leave the column out."
    if pyarrow.types.is_nested(type_):
        return "Write each of its parts as a column of its own, or leave the column out."
    return "Write texts or numbers alone, or leave the column out."


def spelled_numbers(column: Any) -> NDArray[np.float64] | None:
    """Return the numbers that texts spell, NaN where there is none; None if one of them spells no number.

    True and false are 1 and 0, if there is nothing else.
    """
    texts: list[str | None] = column.to_pylist()
    spelled = {text for text in texts if text is not None}
    values: dict[str, float]
    if spelled <= SPELLED_TRUTH.keys():
        values = SPELLED_TRUTH
    elif all(SPELLED_NUMBER.fullmatch(text.strip()) for text in spelled):
        values = {text: float(text) for text in spelled}
    else:
        return None
    return np.array([np.nan if text is None else values[text] for text in texts])


def as_pandas_reads(texts: Sequence[str]) -> Any:
    """Return what fields of csv hold where nothing says that they are texts, as `load_table` has it from pandas."""
    values = [None if text == "" or text in PANDAS_MISSING else text for text in texts]
    words = {value for value in values if value is not None}
    if words and words <= SPELLED_TRUTH.keys():
        return pyarrow.array([None if value is None else bool(SPELLED_TRUTH[value]) for value in values])
    try:
        return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())
    except ValueError:
        return pyarrow.array(values, pyarrow.large_string())


def index_columns(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """Return the columns that pandas has written as the index of its rows, by the metadata of a parquet file."""
    described = (metadata or {}).get(b"pandas")
    columns = json.loads(described).get("index_columns", []) if described else []
    return [name for name in columns if isinstance(name, str)]  # a range is described, and no column


def read_before(column: Any) -> dict[str, Any]:
    """Return what each spelling of a csv column was read as before spellings were kept: by what else is in its file."""
    texts = set(pyarrow.compute.unique(column).to_pylist()) - {None}
    words = texts - PANDAS_MISSING
    values: dict[str, Any] = {text: text for text in words}
    if words <= SPELLED_TRUTH.keys():
        values = {text: bool(SPELLED_TRUTH[text]) for text in words}
    else:
        with suppress(ValueError):
            values = {text: float(text) for text in words}
    return {**values, **dict.fromkeys(texts & PANDAS_MISSING)}

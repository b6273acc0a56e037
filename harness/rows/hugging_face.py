"""Sets of Hugging Face's `datasets`: the split that is meant, with rows of tensors that no other row changes."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

from harness.errors import DataError

TENSORS = ("torch", "numpy", "custom")
"""Formats whose rows are tensors or arrays, or whatever a transform makes of them."""


def as_rows(thing: Any, *, name: str, split: str = "") -> Any:
    """Return a set of `datasets` with rows of tensors; anything else as it is.

    Args:
        thing: what a data part has returned. Of several splits, the one that it was asked for is taken.
        name: what to call it in messages.
        split: that was asked for; empty where the part has no parameter for it.
    Raises:
        DataError: none of several splits was asked for, rows would be no tensors, or whole numbers are missing.
    """
    datasets = sys.modules.get("datasets")  # without it, it is none of them
    if datasets is None:
        return thing
    if isinstance(thing, datasets.DatasetDict | datasets.IterableDatasetDict):
        thing = _one_of(thing, name=name, split=split)
    if not isinstance(thing, datasets.Dataset):
        return thing
    form = thing.format
    if form["type"] is None:
        thing = thing.with_format("torch", columns=form["columns"], output_all_columns=form["output_all_columns"])
    elif form["type"] not in TENSORS:
        raise DataError(
            f"{name}: its rows come in the format {form['type']}, of which no batch is made; return it after "
            'with_format("torch")'
        )
    if form["type"] != "custom":
        _check_whole_numbers(thing, name=name)
    return thing


def facts_of(rows: Any) -> dict[str, Any]:
    """Return how many classes a set of `datasets` has, if one of its columns, and only one, is a ClassLabel."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(rows, datasets.Dataset):
        return {}
    found = [rows.features[column] for column in rows.format["columns"]]
    labels = [feature for feature in found if isinstance(feature, datasets.ClassLabel)]
    return {"classes": labels[0].num_classes} if len(labels) == 1 else {}


def _one_of(splits: Any, *, name: str, split: str) -> Any:
    if split in splits:
        return splits[split]
    one = next(iter(splits), "train")
    wanted = (
        f"return the one that is meant, such as splits[{one!r}], where split is {split!r}"
        if split
        else f"return one, such as load_dataset(...)[{one!r}], or give the data part a parameter split, which gets "
        "train and validation"
    )
    raise DataError(
        f"{name}: a {type(splits).__name__} has splits ({', '.join(splits) or 'none'}) and no rows; {wanted}"
    )


def _check_whole_numbers(rows: Any, *, name: str) -> None:
    """Refuse whole numbers that are missing: they make floats of all that are read with them, rounded to 24 bits.

    Raises:
        DataError: names the column and the first row.
    """
    for column in rows.format["columns"]:
        if not _lacks_numbers(rows.data.column(column)):
            continue
        values = rows.select_columns([column]).with_format("arrow")[:].column(column)  # only those rows that are in it
        row = bisect_left(range(len(values)), True, key=_lacks_up_to(values))
        if row < len(values):
            raise DataError(
                f"{name}: row {row:,} has None among the whole numbers of {column}, which would make floats of those "
                "of other rows that are read with it; leave such rows out with filter, or fill them in with map"
            )


def _lacks_up_to(values: Any) -> Callable[[int], bool]:
    return lambda row: _lacks_numbers(values.slice(0, row + 1))


def _lacks_numbers(values: Any) -> bool:
    """Return whether whole numbers, or true and false, are missing in a column of pyarrow, at any depth of it."""
    from pyarrow import types

    kind = values.type
    if types.is_integer(kind) or types.is_boolean(kind):
        return bool(values.null_count)
    return any(_lacks_numbers(part) for part in _parts(values))


def _parts(values: Any) -> Iterator[Any]:
    """Yield the columns that a column of lists or structs is made of."""
    import pyarrow
    from pyarrow import compute, types

    kind = values.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        yield from (chunk.storage for chunk in values.chunks)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield compute.list_flatten(values)
    elif types.is_struct(kind):
        yield from values.flatten()

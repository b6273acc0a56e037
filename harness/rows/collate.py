"""From some rows to one tree with the rows first: stacked, or padded where they differ in shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import reduce
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate, get_worker_info

from harness.config.data import Pad
from harness.config.problems import nearest_name
from harness.errors import DataError
from harness.own_code import told
from harness.rows.tree import children, paths, with_children

SENT_BYTES = 2**15
"""A worker sends tensors up to this size as they are; larger ones in shared memory, which takes 150 us to open."""
Collate = Callable[[list[Any]], Any]
"""From a list of rows to a tree of tensors with as many rows first."""
WRITE_COLLATE = (
    "pad them with data.collate: {pad: 0}, bring them to one shape, or give the data part a method collate(rows)"
)
MAKE_TENSORS = (
    "a list is a tensor for each of its places, so return torch.tensor(...) of it (a datasets.Dataset does after "
    'with_format("torch")), and pad with data.collate: {pad: 0}'
)
TO_TENSOR = "end the transform with v2.ToImage() and v2.ToDtype(torch.float32, scale=True), or return a tensor"
_NUMBERS = {bool, int, float}
_STACKED = (Tensor, np.ndarray, np.number, np.bool_, *_NUMBERS)


def stack(rows: Sequence[Any], ids: Sequence[int]) -> Any:
    """Return the tree of some rows: tensors, arrays and numbers are stacked, all else comes as a list.

    In a worker of a DataLoader, large tensors are stacked in the memory that it shares with its rank.

    Args:
        rows: trees with the same keys, lengths and fields.
        ids: of these rows, for messages.
    Raises:
        DataError: they are not alike; names two rows and what each has.
    """
    return padded(rows, ids, None)


def padded(rows: Sequence[Any], ids: Sequence[int], pad: Pad | None) -> Any:
    """Return the tree of some rows as `stack` does, where tensors that `pad` speaks of may differ in shape.

    Args:
        rows: trees with the same keys, lengths and fields.
        ids: of these rows, for messages.
        pad: which tensors are padded at their ends, and with what; None is none.
    Raises:
        DataError: rows are not alike, cannot be padded, or have no tensor that `pad` names.
    """
    if pad is not None and pad.fills is not None:
        _check_names(pad.fills, rows[0])
    return _joined(rows, ids, pad, "")


def _joined(rows: Sequence[Any], ids: Sequence[int], pad: Pad | None, path: str) -> Any:
    first = rows[0]
    if pad is None and isinstance(first, Tensor):
        try:
            return _stacked(rows)
        except (AttributeError, RuntimeError, TypeError):
            return _joined_leaves(rows, ids, pad, path)  # which says what is wrong
    names = children(first)
    if names is None:
        return _joined_leaves(rows, ids, pad, path)
    columns = _columns(rows, names)
    if columns is None:
        _refuse_unlike(rows, ids, path)
    prefix = f"{path}." if path else ""
    parts = {name: _joined(column, ids, pad, f"{prefix}{name}") for name, column in zip(names, columns, strict=True)}
    return with_children(first, parts)


def _columns(rows: Sequence[Any], names: Sequence[Any]) -> Sequence[Sequence[Any]] | None:
    """Return what all rows have under each name; None if they are not of one kind with the same names."""
    first = rows[0]
    if len(set(map(type, rows))) > 1:
        return None
    if not isinstance(first, dict | MutableMapping | list | tuple):
        return [[getattr(row, name) for row in rows] for name in names]
    if len(set(map(len, rows))) > 1:
        return None
    if isinstance(first, list | tuple):
        return list(zip(*rows, strict=True))
    try:
        return [[row[name] for row in rows] for name in names]
    except KeyError:
        return None


def _joined_leaves(rows: Sequence[Any], ids: Sequence[int], pad: Pad | None, path: str) -> Any:
    kinds = set(map(type, rows))
    if all(issubclass(kind, Tensor) for kind in kinds):
        return _joined_tensors(rows, ids, pad, path)
    if kinds <= _NUMBERS:  # floats are brought to the type of the run later
        try:
            return torch.tensor(rows, dtype=torch.float64 if float in kinds else None)
        except (OverflowError, RuntimeError, ValueError):
            row, number = max(zip(rows, ids, strict=True), key=lambda each: abs(each[0]))
            raise DataError(f"row {number:,} has {row}{at(path)}, which is too large for a tensor") from None
    if all(issubclass(kind, _STACKED) for kind in kinds):
        tensors = [_tensor(row, number, path) for row, number in zip(rows, ids, strict=True)]
        return _joined_tensors(tensors, ids, pad, path)
    if len({_sort(row) for row in rows}) > 1:
        _refuse_unlike(rows, ids, path)
    for row, number in zip(rows, ids, strict=True):
        if any(base.__module__ == "PIL.Image" for base in type(row).__mro__):
            raise DataError(f"row {number:,} has a PIL image{at(path)}: {TO_TENSOR}")
    return list(rows)


def _tensor(row: Any, number: int, path: str) -> Tensor:
    if isinstance(row, Tensor):
        return row
    array = np.asarray(row)
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()  # torch warns of the one, and does not take the other
    try:
        return torch.as_tensor(array)
    except TypeError as error:
        raise DataError(f"row {number:,} has an array of {array.dtype}{at(path)}, of which torch has none") from error


def _joined_tensors(tensors: Sequence[Tensor], ids: Sequence[int], pad: Pad | None, path: str) -> Tensor:
    fill = None if pad is None else pad.fill_of(path)
    try:
        return _stacked(tensors) if pad is None or fill is None else _padded(tensors, ids, pad, path)
    except RuntimeError as error:
        shape = tensors[0].shape
        for tensor, number in zip(tensors, ids, strict=True):
            if fill is None and tensor.shape != shape:
                raise DataError(
                    f"row {number:,} has shape {tuple(tensor.shape)}{at(path)}, row {ids[0]:,} has {tuple(shape)}: "
                    f"{_what_pads(pad, path)}"
                ) from None
        raise DataError(f"the tensors of the rows{at(path)} do not become one: {told(error)}") from error


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    if get_worker_info() is not None and (
        len(tensors) * tensors[0].nbytes <= SENT_BYTES  # or in shared memory, where
        or len({tensor.dtype for tensor in tensors}) > 1  # torch would give all of them the type of the first
        or any(tensor.requires_grad for tensor in tensors)  # and takes none that has a graph
    ):
        return torch.stack(list(tensors))
    stacked: Tensor = default_collate(list(tensors))
    return stacked


def _padded(tensors: Sequence[Tensor], ids: Sequence[int], pad: Pad, path: str) -> Tensor:
    """Return (B, *sizes), each tensor at the start of its row and what it is padded with behind."""
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) == 1 and pad.fills is None:
        return _stacked(tensors)
    for tensor, number in zip(tensors, ids, strict=True):
        if tensor.dim() != tensors[0].dim():
            raise DataError(
                f"row {number:,} has shape {tuple(tensor.shape)}{at(path)}, row {ids[0]:,} has "
                f"{tuple(tensors[0].shape)}: padding makes a dimension longer and adds none; bring them to as many"
            )
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    fill = _checked_fill(pad, dtype, path)
    sizes = _sizes(shapes, pad, path)
    if shapes == {torch.Size(sizes)}:
        return _stacked(tensors)
    if get_worker_info() is None and _are_sequences(tensors, shapes, sizes, fill):
        return pad_sequence(list(tensors), batch_first=True, padding_value=fill)  # in half the time
    # Stacked too, so that a worker has it in the memory that it shares.
    blank = _stacked([torch.full((), fill, dtype=dtype).expand(sizes)] * len(tensors))
    for place, tensor in zip(blank, tensors, strict=True):
        place[tuple(map(slice, tensor.shape))] = tensor
    return blank


def _are_sequences(tensors: Sequence[Tensor], shapes: set[torch.Size], sizes: list[int], fill: float) -> bool:
    """Return whether torch's `pad_sequence` brings them to these sizes: of one type, the first to the longest.

    There what they are padded with goes through a float.
    """
    return (
        max(shape[0] for shape in shapes) == sizes[0]
        and (len(sizes) == 1 or {shape[1:] for shape in shapes} == {torch.Size(sizes[1:])})
        and len({tensor.dtype for tensor in tensors}) == 1
        and not any(tensor.requires_grad for tensor in tensors)
        and float(fill) == fill
    )


def _sizes(shapes: set[torch.Size], pad: Pad, path: str) -> list[int]:
    """Return what each dimension of a row has after padding."""
    found = [sorted(set(sizes)) for sizes in zip(*shapes, strict=True)]
    longest = [sizes[-1] for sizes in found]
    rounded = [-(-size // pad.multiple_of) * pad.multiple_of for size in longest]
    differ = [len(sizes) > 1 for sizes in found]
    if pad.fills is None:
        return [new if is_ragged else old for old, new, is_ragged in zip(longest, rounded, differ, strict=True)]
    if any(differ) and not differ[0] and rounded[0] != longest[0]:
        raise DataError(
            f"data.collate.multiple_of: of tensors that are named it rounds the first dimension, and would make "
            f"{rounded[0]} of the {longest[0]}{at(path)}, where rows differ in others; one value for all, such as "
            "pad: 0, rounds those"
        )
    return [*rounded[:1], *longest[1:]]


def _checked_fill(pad: Pad, dtype: torch.dtype, path: str) -> bool | int | float:
    """Return what a tensor is padded with.

    Raises:
        DataError: its type does not hold that.
    """
    fill = pad.fill_of(path)
    assert fill is not None, "only what is padded is asked for"
    if dtype.is_floating_point or dtype.is_complex:
        largest = torch.finfo(dtype).max
        holds, what = abs(fill) <= largest, f"numbers from {-largest:g} to {largest:g}"
    elif dtype == torch.bool:
        holds, what = fill in (0, 1), "true and false"
    else:
        least, largest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        holds, what = fill == int(fill) and least <= fill <= largest, f"whole numbers from {least} to {largest}"
    if not holds:
        where = f"data.collate.pad{f'.{path}' if pad.fills is not None else ''}"
        each = f"; say what each is padded with: {_named({path: 0})}" if pad.fills is None and path else ""
        raise DataError(f"{where}: {fill} does not fit into {dtype}{at(path)}, which holds {what}{each}")
    return fill


def _check_names(fills: Mapping[str, Any], row: Any) -> None:
    tensors = [path for path, leaf in paths(row) if isinstance(leaf, _STACKED)]
    for name in fills:
        if name not in tensors:
            near = nearest_name(name, tensors)
            hint = f"nearest: {near}; " if near else ""
            what = ", ".join(tensors) if any(tensors) else "one without a name, which pad: 0 pads"
            raise DataError(f"data.collate.pad.{name}: rows have no such tensor ({hint}they have {what})")


def _what_pads(pad: Pad | None, path: str) -> str:
    if pad is None or pad.fills is None or not path:
        return WRITE_COLLATE
    return f"name it as well, with what it is padded with: {_named({**pad.fills, path: 0})}"


def _named(fills: Mapping[str, Any]) -> str:
    each = ", ".join(f"{name}: {str(fill).lower()}" for name, fill in fills.items())
    return f"data.collate: {{pad: {{{each}}}}}"


def check_rows(tree: Any, num_rows: int) -> None:
    """Refuse a tree that has not `num_rows` rows first in every tensor.

    Raises:
        DataError: names the tensor.
    """
    tensors = [(path, leaf) for path, leaf in paths(tree) if isinstance(leaf, Tensor)]
    if not tensors:
        raise DataError(f"a batch of {num_rows} rows has no tensor in it; rows are trees of tensors and numbers")
    for path, tensor in tensors:
        found = len(tensor) if tensor.dim() else None
        if found != num_rows:
            what = "is one number" if found is None else f"has {found} rows"
            raise DataError(
                f"collate was given {num_rows} rows, and what it returned {what}{at(path)}: every tensor of a batch "
                "has its rows first, as many as there are"
            )


def _refuse_unlike(rows: Sequence[Any], ids: Sequence[int], path: str) -> NoReturn:
    first, sort = rows[0], _sort(rows[0])
    row, number = next((row, number) for row, number in zip(rows, ids, strict=True) if _sort(row) != sort)
    if isinstance(first, Tensor):
        raise DataError(
            f"row {number:,} has shape {type(row).__name__}{at(path)}, row {ids[0]:,} has {tuple(first.shape)}: "
            "all rows are to be alike"
        )
    are_lists = isinstance(row, list) and isinstance(first, list)
    raise DataError(
        f"row {number:,} has {described(row)}{at(path)}, row {ids[0]:,} has {described(first)}: "
        f"{MAKE_TENSORS if are_lists else 'all rows are to be alike'}"
    )


def _sort(row: Any) -> Any:
    """Return what is equal for two rows that can be one tree: a kind with its names, or what becomes of a leaf."""
    names = children(row)
    if names is not None:
        return type(row), frozenset(names)
    return isinstance(row, _STACKED)


def at(path: str) -> str:
    """Return ` at PATH`, or nothing for a lone leaf."""
    return f" at {path}" if path else ""


def described(tree: Any) -> str:
    """Return what a tree is to its reader: `the keys a, b`, `a tuple of 2`, `one Tensor`."""
    names = children(tree)
    if names is None:
        return f"one {type(tree).__name__}"
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return f"a {type(tree).__name__} of {len(names)}"
    return f"the keys {', '.join(map(str, names))}"

"""Reads the columns of a pickled pandas DataFrame without unpickling: nothing that the file names is ever called.

The opcodes are walked with the standard library's disassembler. A class or function that they name becomes an inert
record, and only the few records that make up a DataFrame of numbers and texts are understood.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import DataError

MARK = object()


@dataclass
class Record:
    """What the file would have had made: `name(*arguments)`, and the state it would have been given."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


def read_frame(content: bytes) -> dict[str, list[Any]]:
    """Return the columns of a pickled DataFrame by name: numbers, texts, None.

    Raises:
        DataError: the content is anything else.
    """
    try:
        frame = _walk(content)
        blocks, axes = _named(frame, "DataFrame").state["_mgr"].arguments[:2]
        names = _labels(axes[0])
        columns: dict[str, list[Any]] = {}
        for block in blocks:
            values, places, *_ = _named(block, "_unpickle_block").arguments
            for row, place in zip(_array(values), _places(places), strict=True):
                columns[names[place]] = [_plain(value) for value in row]
        return {name: columns[name] for name in names}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, StopIteration) as error:
        raise DataError(f"this is no pickled table of numbers and texts: {type(error).__name__}: {error}") from error


class _Machine:
    """The stack and the memo of a pickle; a method for each opcode that does something."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def get(self, place: int) -> None:
        self.push(self.memo[place])

    def memoize(self, _: Any) -> None:
        self.memo.append(self.stack[-1])

    def tuple_(self, _: Any) -> None:
        self.push(tuple(self._since_mark()))

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self.stack[-1].append(item)

    def appends(self, _: Any) -> None:
        items = self._since_mark()
        self.stack[-1].extend(items)

    def set_item(self, _: Any) -> None:
        key, value = self._pop(2)
        self.stack[-1][key] = value

    def set_items(self, _: Any) -> None:
        items = self._since_mark()
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def name(self, _: Any) -> None:
        module, attribute = self._pop(2)
        self.push(Record(f"{module}.{attribute}"))

    def call(self, _: Any) -> None:
        function, arguments = self._pop(2)
        self.push(Record(function.name, arguments))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        self.stack[-1].state = state

    def tuple_of(self, length: int) -> None:
        self.push(tuple(self._pop(length)))

    def _pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        start = len(self.stack) - 1 - next(i for i, item in enumerate(reversed(self.stack)) if item is MARK)
        return self._pop(len(self.stack) - start)[1:]


PLAIN = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8")
TEXT = ("BINUNICODE", "SHORT_BINUNICODE")
OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys((*PLAIN, *TEXT), _Machine.push),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": lambda machine, _: machine.push(MARK),
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "MEMOIZE": _Machine.memoize,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "STACK_GLOBAL": _Machine.name,
    "BUILD": _Machine.build,
}


def _walk(content: bytes) -> Any:
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in OPCODES:
            raise ValueError(f"it uses {opcode.name}, which no such table needs")
        OPCODES[opcode.name](machine, argument)
    (result,) = machine.stack
    return result


def _named(record: Record, name: str) -> Record:
    if record.name.rpartition(".")[2] != name:
        raise ValueError(f"{record.name} stands where {name} is wanted")
    return record


def _array(record: Record) -> Any:
    """Return an array of numbers, or of objects that are plain already."""
    if record.name.endswith("._frombuffer"):
        buffer, dtype, shape, order = record.arguments
        return np.frombuffer(buffer, _dtype(dtype)).reshape(shape, order=order)
    _, shape, dtype, is_fortran, items = _named(record, "_reconstruct").state
    if isinstance(items, list):
        flat = np.empty(len(items), object)
        flat[:] = items
    else:
        flat = np.frombuffer(items, _dtype(dtype))
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _dtype(record: Record) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(_named(record, "dtype").arguments[0])
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {dtype} is not of numbers")
    ordered: np.dtype[Any] = dtype.newbyteorder(record.state[1])
    return ordered


def _places(record: Record) -> list[int]:
    if record.name == "builtins.slice":
        start, stop, step = record.arguments
        return list(range(start, stop, step))
    return [int(place) for place in _array(record)]


def _labels(index: Record) -> list[str]:
    """Return the names that a pandas Index holds."""
    return [str(name) for name in _array(_named(index, "_new_Index").arguments[1]["data"])]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Record) or not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"{value!r} is neither a number nor a text")
    return value

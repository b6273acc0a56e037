"""What pandas would mend in a csv file without a word: names of columns, and rows that are too short."""

from __future__ import annotations

import csv
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from harness.errors import DataError

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"PK\3\4": "zip"}
"""How files begin that `datasets` unpacks, whatever they are called."""


def check_header(path: Path) -> None:
    """Refuse a csv file two of whose columns have one name, or one of whose columns has none.

    Raises:
        DataError: pandas would call such columns `a.1` and `Unnamed: 2`.
    """
    header = _header(path)
    unnamed = [str(place) for place, name in enumerate(header, start=1) if not name.strip()]
    if unnamed:
        raise DataError(
            f"{path}: column {', '.join(unnamed[:5])} of {len(header)} has no name in the header. Name it, or remove "
            "it; pandas writes such a column unless it is told index=False."
        )
    name, count = Counter(header).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: {count} columns are called {name!r} in the header. Give each a name of its own.")


def check_no_short_rows(path: Path) -> None:
    """Refuse a csv file with a row of fewer fields than the header, which would pass for one of missing values.

    Raises:
        DataError: names the line.
    """
    header = _header(path)
    for line, row in _rows(path):
        if len(row) < len(header):
            raise DataError(
                f"{path}: line {line:,} has {len(row)} of {len(header)} fields. Write the row again; a value that is "
                "missing is nothing between two commas."
            )


def first_rows(path: Path, count: int) -> dict[str, list[str]]:
    """Return the columns of the first rows of a csv file as they are spelled; what a short row lacks is nothing.

    Raises:
        DataError: a row has more fields than the header.
    """
    header = _header(path)
    rows = [(line, row) for line, row in itertools.islice(_rows(path), 1, count + 1)]
    long = next((line for line, row in rows if len(row) > len(header)), None)
    if long is not None:
        raise DataError(
            f"{path}: line {long:,} has more than {len(header)} fields, those of the header. Mend the file."
        )
    return {name: [row[place] if place < len(row) else "" for _, row in rows] for place, name in enumerate(header)}


def field_at(path: Path, *, row: int, column: str) -> str:
    """Return what a csv file has in a row, counted from 0 without header and blank lines; nothing, if it is short."""
    place = _header(path).index(column)
    _, fields = next(itertools.islice(_rows(path), row + 1, None))
    return fields[place] if place < len(fields) else ""


def open_text(path: Path) -> IO[str]:
    """Return a file of UTF-8 text, unpacked as `datasets` would."""
    from fsspec.implementations.local import LocalFileSystem

    with path.open("rb") as file:
        start = file.read(8)
    compression = next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)
    text: IO[str] = LocalFileSystem().open(str(path), "rt", encoding="utf-8-sig", newline="", compression=compression)
    return text


def _header(path: Path) -> list[str]:
    for _, fields in _rows(path):
        return fields
    raise DataError(f"{path}: there is not one row in it. Check data.path.")


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line that each row ends in, from 1, and its fields; blank lines are none, as for pandas."""
    csv.field_size_limit(sys.maxsize)  # pandas has none
    with open_text(path) as text:
        reader = csv.reader(text)
        try:
            for row in reader:
                if len(row) > 1 or any(field.strip() for field in row):
                    yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as csv: {error}. Mend the file, or write it again.") from error

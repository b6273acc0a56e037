"""The first rows of a table, as they are looked at before a run; needs no torch.

What is looked at is judged by the functions that read all of it when the run starts, so that nothing is refused that
would be trained on. What it takes follows from FIRST_ROWS and FIRST_BYTES, not from the sizes of the files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.table.columns import TEXTS, as_pandas_reads, index_columns, plain
from harness.catalogue.table.csv_rows import check_header, open_text
from harness.catalogue.table.csv_rows import first_rows as first_rows_of_csv
from harness.catalogue.table.json_rows import json_rows
from harness.catalogue.table.read import Table, check_readable, check_same_columns, table_targets
from harness.config.slots import TaskSection
from harness.errors import DataError

FIRST_ROWS = 1_000
FIRST_FILES = 20
FIRST_BYTES = 2**23
"""Of json, in which a row has no greatest length."""


def check_alike(files: Sequence[Table], names: Sequence[str], targets: Sequence[str], task: TaskSection) -> None:
    """Refuse files that are read otherwise than the first, or targets that the task has not."""
    first = files[0]
    classes = None
    for file in files:
        knows_labels = all(_knows_kind(one, name) for one in (first, file) for name in targets)
        check_same_columns(file, [*names, *(targets if knows_labels else ())], as_in=first)
        if knows_labels or not isinstance(task, ClassificationTask):
            all_labels = file is first or classes is not None  # those of the first rows may be fewer
            _, found = table_targets(replace(file, is_whole=file.is_whole and all_labels), targets, task, classes)
            classes = found if file is first and first.is_whole else classes


def _knows_kind(table: Table, name: str) -> bool:
    """Whether no later row of a csv file can make texts of its labels."""
    return table.is_whole or table.spelled is None or table.kind(name) == TEXTS


def looked_at(table: Table) -> str:
    size = table.path.stat().st_size
    rest = f"; what comes after its first {table.arrow.num_rows:,} rows was not looked at" if not table.is_whole else ""
    return f"{table.path}: {table.arrow.num_columns:,} columns, {size:,} bytes{rest}"


def first_rows(kind: str, path: Path, spelled: Any) -> Table:
    """Return what `load_table` would, of the first rows."""
    check_readable(kind, path)
    read = {"csv": _first_of_csv, "json": _first_of_json, "parquet": _first_of_parquet}[kind]
    table = read(path, spelled)
    if not table.arrow.num_rows:
        raise DataError(f"{path}: there is not one row in it. Check data.path.")
    return table


def _first_of_csv(path: Path, spelled: Any) -> Table:
    check_header(path)
    columns = first_rows_of_csv(path, FIRST_ROWS + 1)
    texts = {name: values for name, values in columns.items() if name in spelled}
    arrow = {
        name: pyarrow.array([value or None for value in values[:FIRST_ROWS]], pyarrow.large_string())
        if name in texts
        else as_pandas_reads(values[:FIRST_ROWS])
        for name, values in columns.items()
    }
    is_whole = all(len(values) <= FIRST_ROWS for values in columns.values())
    return Table(path, pyarrow.table(arrow), frozenset(texts), is_whole=is_whole)


def _first_of_json(path: Path, _: Any) -> Table:
    with open_text(path) as file:
        text = file.read(FIRST_BYTES)
    found = json_rows(text)
    rows: list[Any] = []
    is_whole = len(text) < FIRST_BYTES
    with suppress(ValueError):  # where it is cut off; else the run says what is wrong
        rows += itertools.islice(found, FIRST_ROWS)
        is_whole &= next(found, None) is None
    names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    try:
        arrow = pyarrow.table({name: _array([row.get(name) for row in rows]) for name in names})
    except (pyarrow.ArrowException, AttributeError) as error:
        raise DataError(
            f"{path}: its first rows are not alike: {error}. Write each value of a column alike."
        ) from error
    return Table(path, arrow, is_whole=is_whole)


def _array(values: list[Any]) -> Any:
    try:
        return pyarrow.array(values)
    except OverflowError:  # of integers beyond 64 bits, which `load_table` reads as the nearest float
        return pyarrow.array([float(value) if isinstance(value, int) else value for value in values])


def _first_of_parquet(path: Path, _: Any) -> Table:
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False) as file:  # not whole columns
            batch = next(file.iter_batches(FIRST_ROWS), None)
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}. Mend the file, or write it again.") from error
    arrow = schema.empty_table() if batch is None else pyarrow.table(batch)
    index = tuple(index_columns(schema.metadata))
    return Table(path, plain(arrow), index=index, is_whole=num_rows <= FIRST_ROWS)

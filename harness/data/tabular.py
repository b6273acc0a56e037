"""Local files, read by `datasets` and turned into columns of numbers; what is not a number is refused."""

from __future__ import annotations

import difflib
import errno
import glob
import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.config.tasks import ClassificationTask, Task
from harness.data.csv_rows import check_header
from harness.data.prepare import PREPARATIONS
from harness.errors import DataError, StorageError

ROWS = "rows count from 0, without header and blank lines"
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT)
LONG_ROWS = "Length of header or names"  # how pandas' warning begins that it dropped the last fields of rows
NUMERIC = ("int", "uint", "halffloat", "float", "double", "bool")  # how the names of arrow's number types begin


@dataclass(frozen=True)
class Table:
    """The content of one file."""

    path: Path
    arrow: Any
    """The `pyarrow.Table`, whole: asking the `Dataset` for one column at a time takes 38 s for 785 columns."""


def load_files(kind: str, path: Path, *, pattern: str = "", **options: Any) -> Any:
    """Return the `datasets.Dataset` of a local file, or of the files in a folder that match `pattern`.

    Args:
        kind: csv, parquet, json or imagefolder.
        options: go to the reader of this kind.
    Raises:
        DataError: nothing is there, there is not one row, or the reader refuses the content.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in our DataError
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or each call, even of a local file, asks the network first
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=LONG_ROWS)
            files = glob.escape(str(path.resolve())) + pattern
            return datasets.load_dataset(kind, data_files=files, split="train", **options)
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{path}: there is not one row in it. Check data.path.") from error
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in NOT_WRITABLE:
            raise StorageError(
                f"{path}: the cache of datasets, {datasets.config.HF_DATASETS_CACHE}, cannot be written "
                f"({cause.strerror}). Mend that, or set HF_DATASETS_CACHE to a folder you can write"
            ) from error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        if LONG_ROWS in reason:
            reason = "rows have more fields than the header"
        raise DataError(f"{path}: cannot be read as {kind}: {reason}. Mend the file, or write it again.") from error


def file_digest(kind: str, path: Path) -> str:
    """Return 32 hexadecimal digits that change with the content of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        example = f" Type: harness data prepare {path.stem}" if path.stem in PREPARATIONS else ""
        raise DataError(
            f"{path.absolute()}: {error.strerror}. data.path and data.validation_path want a {kind} file.{example}"
        ) from error


def load_table(kind: str, path: Path, **options: Any) -> Table:
    """Return the content of one csv, parquet or json file; options and errors as of `load_files`."""
    digest = file_digest(kind, path)
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise DataError(f"{path}: is empty (0 bytes). Write it again.")
    # Types are inferred from the whole file at once: by default a column of integers that has its first fraction
    # after 10,000 rows is an error. index_col: a first field too many would silently shift every column.
    reader: dict[str, dict[str, Any]] = {
        "csv": {"chunksize": None, "index_col": False},
        "json": {"chunksize": num_bytes + 1},
        "parquet": {"batch_size": 10_000},  # the default is an error for a table of no rows
    }
    # The name is part of the cache's key: without the digest a file rewritten with the same mtime is served stale.
    dataset = load_files(kind, path, name=digest, **reader[kind], **options)
    if kind == "csv" and "column_names" not in options:
        check_header(path)
    return Table(path, dataset.with_format("arrow")[:])


def feature_names(table: Table, features: Sequence[str] | None, targets: Sequence[str]) -> list[str]:
    """Return the columns that the model sees: those named, or all but the targets in the order of the file."""
    return [name for name in table.arrow.column_names if name not in targets] if features is None else list(features)


def table_targets(
    table: Table, names: Sequence[str], task: Task, classes: Sequence[str] | None
) -> tuple[torch.Tensor, list[str] | None]:
    """Return the (N,) labels or (N, K) numbers to predict, and the names of the classes where labels are texts.

    Args:
        classes: names whose places are the labels, learned from another table; None is to learn them from this one,
            in alphabetical order.
    Raises:
        DataError: a column holds anything but finite numbers, or labels that are not classes of the task.
    """
    if not isinstance(task, ClassificationTask):
        return torch.from_numpy(matrix(table, names)), None
    if len(names) > 1:
        raise DataError(
            f"data.targets: {', '.join(names)} are {len(names)} columns, but classification wants one column of "
            "labels. Name one, or set task.kind: regression."
        )
    if not _is_text(table, names[0]):
        return torch.from_numpy(_labels(table, names[0], task.num_classes)), None
    texts = _texts(table, names[0])
    known = sorted(set(texts)) if classes is None else list(classes)
    return torch.from_numpy(_labels_of_texts(table, names[0], texts, known, task.num_classes)), known


def check_names(table: Table, features: Sequence[str], targets: Sequence[str], categorical: Sequence[str]) -> None:
    """Refuse names of columns that the table does not have, or that are named twice.

    Raises:
        DataError: such a name.
    """
    check_columns(table, {"features": features, "targets": targets, "categorical": categorical})
    if not features:
        raise DataError(f"{table.path}: no column is left for the model to see. Name some in data.features.")
    name, count = Counter([*features, *targets]).most_common(1)[0]
    if count > 1:
        raise DataError(f"column {name!r} is named {count} times in data.features and data.targets; name it once")


def check_columns(table: Table, named: Mapping[str, Sequence[str]]) -> None:
    """Refuse names of columns that the table does not have.

    Args:
        named: names by their key in the data section.
    Raises:
        DataError: such a name.
    """
    columns = table.arrow.column_names
    for key, name in ((key, name) for key, names in named.items() for name in names):
        if name not in columns:
            nearest = difflib.get_close_matches(name, columns, n=1, cutoff=0.0)[0]
            raise DataError(f"{table.path}: data.{key}: there is no column {name!r} (nearest: {nearest!r})")


def check_same_columns(table: Table, names: Sequence[str], *, as_in: Table) -> None:
    """Refuse a table that lacks a column of another.

    Raises:
        DataError: it does.
    """
    for name in names:
        if name not in table.arrow.column_names:
            raise DataError(
                f"{table.path}: has no column {name!r}, but {as_in.path}, whose rows train, has; the rows that "
                "validate have the columns of those that train"
            )


def _labels(table: Table, name: str, num_classes: int) -> NDArray[np.int64]:
    numbers = numbers_of(table, name)
    strange = (numbers < 0) | (numbers >= num_classes) | (numbers != np.floor(numbers))
    if strange.any():
        raise DataError(
            f"{table.path}: column {name!r} has {_found(strange)} with label {numbers[strange][0]}, but labels are "
            f"whole numbers from 0 to {num_classes - 1}. Number the classes from 0, and check task.num_classes."
        )
    labels: NDArray[np.int64] = numbers.astype(np.int64)
    return labels


def matrix(table: Table, names: Sequence[str]) -> NDArray[Any]:
    """Return columns side by side, (N, len(names)), in float32 if that holds each of them exactly, else float64.

    Raises:
        DataError: a column holds anything but finite numbers.
    """
    columns = [numbers_of(table, name) for name in names]
    return np.stack(columns, axis=1).astype(np.result_type(np.float32, *columns))


def _is_text(table: Table, name: str) -> bool:
    return str(table.arrow.column(name).type) in ("string", "large_string")


def _texts(table: Table, name: str) -> list[str]:
    _check_no_missing(table, name)
    return [str(text) for text in table.arrow.column(name).to_pylist()]


def _labels_of_texts(
    table: Table, name: str, texts: Sequence[str], classes: Sequence[str], num_classes: int
) -> NDArray[np.int64]:
    if len(classes) != num_classes:
        raise DataError(
            f"{table.path}: column {name!r} has {len(classes)} different labels, {classes[0]!r} to {classes[-1]!r}, "
            f"but task.num_classes is {num_classes}. Set it to {len(classes)}, or mend the labels."
        )
    places = {text: label for label, text in enumerate(classes)}
    labels = np.array([places.get(text, -1) for text in texts], np.int64)
    if labels.min() < 0:
        raise DataError(
            f"{table.path}: column {name!r} has {_found(labels < 0)} with label {texts[int(labels.argmin())]!r}, but "
            f"the training file has {', '.join(map(repr, classes[:20]))} only. Mend the labels."
        )
    return labels


def _check_no_missing(table: Table, name: str) -> None:
    missing = table.arrow.column(name).is_null(nan_is_null=True).to_numpy()
    if missing.any():
        raise DataError(
            f"{table.path}: column {name!r} has {_found(missing)} without a value, or with NaN. Fill these in, remove "
            "the rows, leave the column out, or, if it is no target, set data.impute."
        )


def numbers_of(table: Table, name: str, *, may_miss: bool = False) -> NDArray[Any]:
    """Return one column, (N,) finite numbers; NaN where there is none, if it may miss.

    Raises:
        DataError: it holds anything else.
    """
    column = table.arrow.column(name)
    if not may_miss:
        _check_no_missing(table, name)
    if not str(column.type).startswith(NUMERIC):
        row, value = _first_without_number(column.to_pylist())
        raise DataError(
            f"{table.path}: column {name!r} holds {column.type}, but numbers are wanted; row {row:,} has {value!r} "
            f"({ROWS}). Name it in data.categorical, or leave the column out."
        )
    numbers: NDArray[Any] = column.to_numpy()
    infinite = np.isinf(numbers)
    if infinite.any():
        raise DataError(
            f"{table.path}: column {name!r} has {_found(infinite)} with an infinite value. Replace these, remove the "
            "rows, or leave the column out."
        )
    return numbers


def _found(rows: NDArray[np.bool_]) -> str:
    return f"{rows.sum():,} of {len(rows):,} rows (first: row {rows.argmax():,}; {ROWS})"


def _first_without_number(values: list[Any]) -> tuple[int, Any]:
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            float(value)
        except (TypeError, ValueError):
            return row, value
    return 0, values[0]  # each would be a number if it were not quoted

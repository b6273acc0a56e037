"""What is known of the rows of a run before any of them is read: what `harness data prepare` noted beside a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.images.section import MNIST_5K_ROWS, Mnist5kData
from harness.catalogue.table.section import TableData
from harness.catalogue.text_table.section import TextTableData
from harness.config.run_config import RunConfig

MAX_NOTE_BYTES = 2**20


@dataclass(frozen=True)
class KnownRows:
    """Counts of the rows that a run will see."""

    updates_per_epoch: int
    classes: Mapping[str, int]
    """Rows of each class, those set aside for validation included; {} if they are not known."""


def known_rows(config: RunConfig) -> KnownRows | None:
    """Return the counts of a config's rows if they are known; none is read for them."""
    data = config.data
    if isinstance(data, Mnist5kData):
        num_rows, classes = MNIST_5K_ROWS, {str(digit): MNIST_5K_ROWS // 10 for digit in range(10)}
    elif isinstance(data, TableData | TextTableData) and (noted := _noted(Path(data.path))):
        num_rows, target, classes = noted
        classes = classes if [target] == _targets(data) else {}
    else:
        return None
    if not (isinstance(config.task, ClassificationTask) and config.task.num_classes == len(classes)):
        classes = {}
    has_own_validation = not isinstance(data, Mnist5kData) and data.validation_path is not None
    num_training = num_rows - (0 if has_own_validation else round(data.validation_fraction * num_rows))
    return KnownRows(-(-num_training // data.global_batch), classes)


def _targets(data: TableData | TextTableData) -> list[str]:
    return list(data.targets) if isinstance(data, TableData) else [data.target]


def _noted(path: Path) -> tuple[int, str | None, dict[str, int]] | None:
    """Return how many rows a prepared table has, in all and of each class of which column; None without such a note."""
    try:
        note = path.with_suffix(".json")  # a path such as . or / has no suffix
        if note == path or note.stat().st_size > MAX_NOTE_BYTES:
            return None
        file = json.loads(note.read_bytes())["files"][path.name]
        classes = {str(name): int(count) for name, count in file.get("classes", {}).items()}
        return int(file["rows"]), file.get("target"), classes
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # some other file of that name

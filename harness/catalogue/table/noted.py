"""What `harness data prepare` noted beside a table; needs the standard library only."""

from __future__ import annotations

import json
from pathlib import Path

from harness.catalogue.classification.section import ClassificationTask
from harness.config.data import DataSection
from harness.config.slots import KnownRows, TaskSection

MAX_NOTE_BYTES = 2**20


def known_rows_of_table(
    data: DataSection, task: TaskSection, *, path: str, validation_path: str | None, targets: list[str]
) -> KnownRows | None:
    """Return the counts of a prepared table's rows."""
    noted = _noted(Path(path))
    if noted is None:
        return None
    num_rows, target, classes = noted
    of_target = classes if [target] == targets else {}
    return known_rows(data, task, num_rows, of_target, has_own_validation=validation_path is not None)


def known_rows(
    data: DataSection, task: TaskSection, num_rows: int, classes: dict[str, int], *, has_own_validation: bool
) -> KnownRows:
    """Return the counts that follow from the number of all rows and of those of each class."""
    if not (isinstance(task, ClassificationTask) and task.num_classes == len(classes)):
        classes = {}
    num_training = num_rows - (0 if has_own_validation else round(data.validation_fraction * num_rows))
    return KnownRows(-(-num_training // data.global_batch), classes)


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

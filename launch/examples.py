"""`harness examples`: the configurations and the cluster file that came with the package, as files of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.record.files import storage_errors

EXAMPLES = Path(__file__).parent / "example_files"
PATTERNS = ("configs/*.yaml", "slurm/*.example.yaml", "slurm/README.md")


def write_examples(folder: Path) -> Iterator[str]:
    """Write those that `folder` does not have, and yield a sentence for each.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage_errors("write to", folder):
        for source in sorted(path for pattern in PATTERNS for path in EXAMPLES.glob(pattern)):
            target = folder / source.relative_to(EXAMPLES)
            if target.exists():
                yield f"{target} is there already and stays as it is"
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            yield str(target)

"""Writing files so that a crash leaves the old one or the new one, never a half."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import StorageError


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Put `content` in the place of whatever `path` held, in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any) -> bytes:
    """Encode for a file that people read as well; floats read back to the same bits."""
    return (json.dumps(value, indent=1) + "\n").encode()


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn what the operating system says of `path` into the run's exit code 5.

    Args:
        doing: a verb, such as "write".
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {doing} {path}: {error.strerror or error}. Mend that, then start the same command again"
        ) from error

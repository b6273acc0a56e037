"""Writing files so that a crash leaves the old one or the new one, never a half."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import StorageError

ADVICE = ". Mend that, then start the same command again"
_PIECE_BYTES = 8 * 2**20  # hashed and written while it is still in a core's cache


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file and wait until the disk has it.

    Args:
        chunks: contiguous bytes; each is asked for when the one before is written.
    Returns:
        The size and the SHA-256 of what was in memory, not of what can be read back.
    """
    size, digest = 0, hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            size += len(chunk)
            for start in range(0, len(chunk), _PIECE_BYTES):
                piece = memoryview(chunk)[start : start + _PIECE_BYTES]
                digest.update(piece)
                while piece:
                    piece = piece[os.write(file.fileno(), piece) :]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def replace_durably(path: Path, content: bytes) -> None:
    """Put `content` in the place of whatever `path` held, in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_durably(temporary, [content])
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory to fill, which becomes `path` in one step, and does so only if nothing fails inside.

    Raises:
        OSError: also if `path` is a file by then, or a directory with something in it.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}")  # other nodes have the same process ids
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_directory_durably(path: Path) -> None:
    """Make a directory and those above it, and wait until the disk has their names."""
    if not path.is_dir():
        make_directory_durably(path.parent)
        path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def own_file(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file of a run to write in, for `open(opener=own_file)`; through a link a stranger's run could name any.

    Raises:
        OSError: it is a link.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a link, which may lead anywhere; put the file itself there") from error


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory, or the content of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any) -> bytes:
    """Encode for a file that people read as well; floats read back to the same bits."""
    return (json.dumps(value, indent=1) + "\n").encode()


@contextmanager
def storage_errors(doing: str, path: Path, *, advice: str = ADVICE) -> Iterator[None]:
    """Turn what the operating system says of `path` into the run's exit code 5.

    Args:
        doing: a verb, such as "write".
        advice: nothing, if the run goes on without it.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {doing} {path}: {error.strerror or error}{advice}") from error

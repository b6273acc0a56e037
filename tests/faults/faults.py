"""What is done to the newest checkpoint of a run, whichever system wrote it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def files_in(folder: Path) -> list[Path]:
    """Return the files of a checkpoint, the largest first."""
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)


def flip_a_bit(newest: Path, older: Path) -> None:
    path = files_in(newest)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut_in_half(newest: Path, older: Path) -> None:
    path = files_in(newest)[0]
    os.truncate(path, path.stat().st_size // 2)


def delete(newest: Path, older: Path) -> None:
    files_in(newest)[0].unlink()


def take_from_older(newest: Path, older: Path) -> None:
    path = files_in(newest)[0]
    path.write_bytes((older / path.relative_to(newest)).read_bytes())


def exchange(newest: Path, older: Path) -> None:
    path = files_in(newest)[0]
    other = older / path.relative_to(newest)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "one bit flipped in the largest file": flip_a_bit,
    "the largest file cut in half": cut_in_half,
    "the largest file deleted": delete,
    "the largest file replaced by step 10's": take_from_older,
    "the largest file exchanged with step 10's": exchange,
}


class NotPermitted(Exception):
    """This user may not mount a file system."""


@contextmanager
def small_disk(at: Path, *, num_bytes: int) -> Iterator[None]:
    """Mount a disk of a few kilobytes.

    Raises:
        NotPermitted: says what mount said.
    """
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermitted(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)

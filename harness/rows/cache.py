"""What is made of the data of a run before it trains: folders that rank zero fills once and every rank maps.

CACHE/WHAT-KEY/   KEY is a digest of all that decides about the content
  facts.json      what the filler told, and the size and SHA-256 of the other files
CACHE is the folder that HARNESS_CACHE names, or .harness-cache beside the data. All nodes of a run share it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.record.files import json_bytes, new_directory, storage_errors, write_durably

LAYOUT = 2
"""Of every folder; raise it when one that was filled before would be read wrongly."""
FACTS = "facts.json"
ADVICE = ". Mend that, or set HARNESS_CACHE to a folder that can be written (and that all nodes share)"
Facts = dict[str, Any]
"""Plain data."""
Write = Callable[[str, Iterable[bytes | memoryview]], int]
"""Writes a file of the folder by its name, and returns its size."""


def cache_folder(what: str, described: Any, *, beside: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the cache has, or will have, what is `described`.

    Args:
        described: plain data; another one is another folder.
        beside: a file of the data.
    """
    key = hashlib.blake2b(json.dumps([LAYOUT, described], sort_keys=True).encode(), digest_size=16).hexdigest()
    return Path(environment.get("HARNESS_CACHE") or beside.parent / ".harness-cache") / f"{what}-{key}"


def fill_once(folder: Path, fill: Callable[[Write], Facts]) -> None:
    """Fill a folder of the cache unless it is there, when every byte of it is read; for rank zero, before any opens it.

    Raises:
        DataError: the folder is not what was written.
        StorageError: it cannot be written.
    """
    if folder.exists():
        read_facts(folder, read_all=True)
        return
    files: dict[str, Any] = {}

    def write(name: str, chunks: Iterable[bytes | memoryview]) -> int:
        size, digest = write_durably(fresh / name, chunks)
        files[name] = {"size": size, "sha256": digest}
        return size

    with storage_errors("write", folder, advice=ADVICE):
        try:
            with new_directory(folder) as fresh:
                facts = fill(write)
                write_durably(fresh / FACTS, [json_bytes({"facts": facts, "files": files})])
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (folder / FACTS).exists():
                raise  # or else another run was quicker


def read_facts(folder: Path, *, read_all: bool = False) -> Facts:
    """Return what the filler of a folder told, after comparing the sizes of its files with those that were written.

    Args:
        read_all: compare every byte.
    Raises:
        DataError: the folder is not there, or is not what was written.
    """
    if not folder.exists():
        raise DataError(
            f"{folder}: what rank zero has made of the data is not there. Set HARNESS_CACHE to a folder that all nodes "
            "share"
        )
    try:
        noted = json.loads((folder / FACTS).read_bytes())
        for name, wanted in noted["files"].items():
            found = (folder / name).stat().st_size
            if found != wanted["size"]:
                raise ValueError(f"{name} has {found:,} bytes, wanted {wanted['size']:,}")
            with (folder / name).open("rb") as file:
                if read_all and hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                    raise ValueError(f"{name} is not what was written: its SHA-256 differs")
        facts: Facts = noted["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: {error}. Remove the folder (rm -r {folder}); the next start builds it again"
        ) from error
    return facts

"""What a checkpoint directory holds, and how to tell a whole one from a broken one.

step-00000040/
  COMMIT.json             names, sizes and SHA-256 of the other files; written last
  trainer.json            counters, stopping, where the ledger stood, versions
  model.safetensors       every parameter and buffer by name
  optim.safetensors       NAME/MOMENT of every trainable parameter
  rng-00000.safetensors   the random state of rank 0; one file a rank
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.files import json_bytes, write_durably

SCHEMA = 1
COMMIT, TRAINER, MODEL, OPTIM = "COMMIT.json", "trainer.json", "model.safetensors", "optim.safetensors"
MAX_JSON_BYTES = 64 * 2**20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def rng_file(rank: int) -> str:
    """Return the name of a rank's random state."""
    return f"rng-{rank:05d}.safetensors"


@dataclass(frozen=True)
class FileEntry:
    """One file as it was in memory when it was written."""

    name: str
    size: int
    sha256: str


def write_file(path: Path, content: bytes) -> FileEntry:
    """Write durably and return what was written, hashed from memory and not from the disk."""
    write_durably(path, content)
    return FileEntry(path.name, len(content), hashlib.sha256(content).hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write tensors on the CPU as safetensors."""
    return write_file(path, safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}))


def write_commit(directory: Path, files: list[FileEntry], *, step: int) -> None:
    """Write COMMIT.json: from here on, once renamed, the directory is a checkpoint."""
    entries = [asdict(entry) for entry in sorted(files, key=lambda entry: entry.name)]
    write_durably(directory / COMMIT, json_bytes({"schema": SCHEMA, "step": step, "files": entries}))


def read_commit(directory: Path) -> list[FileEntry]:
    """Return the files that COMMIT.json names.

    Raises:
        ValueError: says what is wrong with it.
    """
    path = directory / COMMIT
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"has no {COMMIT}: the save was cut off")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{COMMIT} is larger than {MAX_JSON_BYTES:,} bytes")
    try:
        commit = json.loads(path.read_bytes())
        files = [FileEntry(entry["name"], entry["size"], entry["sha256"]) for entry in commit["files"]]
        schema, step = commit["schema"], commit["step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{COMMIT} cannot be read: {error!r}") from error
    if schema != SCHEMA:
        raise ValueError(f"{COMMIT} has schema {schema!r}, this harness reads {SCHEMA}")
    if not isinstance(step, int) or directory.name != f"step-{step:08d}":
        raise ValueError(f"{COMMIT} is that of step {step!r}")
    for entry in files:
        if not (isinstance(entry.name, str) and isinstance(entry.size, int) and isinstance(entry.sha256, str)):
            raise ValueError(f"{COMMIT} has an entry that is no name, size and digest: {entry}")
        if not _PLAIN_NAME.fullmatch(entry.name):
            raise ValueError(f"{COMMIT} names {entry.name[:60]!r}, which is not a plain file name")
    if not {TRAINER, MODEL, OPTIM, rng_file(0)} <= {entry.name for entry in files}:
        raise ValueError(f"{COMMIT} does not list all files of a checkpoint")
    return files


def file_problem(directory: Path, entry: FileEntry) -> str | None:
    """Return what is wrong with one file, or None; reads all of it."""
    path = directory / entry.name
    if path.is_symlink() or not path.is_file():
        return f"{entry.name} is missing"
    if path.stat().st_size != entry.size:
        return f"{entry.name} has {path.stat().st_size:,} bytes, wanted {entry.size:,}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == entry.sha256 else f"{entry.name} is not what was written: its SHA-256 differs"


class SavedState(Mapping[str, Tensor]):
    """The tensors of a checkpoint by the keys of `Strategy.state`, each read from disk when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Any] = {
            prefix: safe_open(directory / name, framework="pt") for prefix, name in (("model", MODEL), ("optim", OPTIM))
        }

    def __getitem__(self, key: str) -> Tensor:
        prefix, _, name = key.partition("/")
        try:
            tensor: Tensor = self._files[prefix].get_tensor(name)
        except SafetensorError as error:
            raise KeyError(key) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        for prefix, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield f"{prefix}/{name}"

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shapes(self, prefix: str) -> dict[str, list[int]]:
        """Return the shape of every tensor of one file, without reading them."""
        file = self._files[prefix]
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_json(path: Path) -> Any:
    """Return a JSON file's value; only called on files that were verified."""
    return json.loads(path.read_bytes())

"""COMMIT.json: what a checkpoint consists of, and how to tell a whole one from a broken one. Needs no torch.

step-00000040/
  COMMIT.json              names, sizes and SHA-256 of the other files, a digest of every tensor; written last
  trainer.json             counters, stopping, where the ledger stood, optimizer settings, versions
  model-00000.safetensors  the parameters and buffers by name that rank 0 wrote
  optim-00000.safetensors  NAME/MOMENT of trainable parameters that rank 0 wrote
  ema-00000.safetensors    if the weights are averaged: weight/NAME of the average, and count, that rank 0 wrote
  rng-00000.safetensors    the random state of rank 0; one file a rank
"""

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.errors import CheckpointError, StorageError
from harness.record.files import json_bytes

SCHEMA = 3
KINDS = ("model", "optim", "ema")
"""Of files of tensors that belong to no rank; there are always some of the first two."""
COMMIT, TRAINER = "COMMIT.json", "trainer.json"
_DAMAGE = (errno.EIO, errno.ENOENT, errno.ENOTDIR)
"""What the operating system says of a file that is lost; all else may be well again in a minute."""
MAX_JSON_BYTES = 64 * 2**20
MAX_COUNT = 2**53
"""What a run counts is also told in float64, which holds every whole number up to here."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def tensor_file(kind: str, rank: int) -> str:
    """Return the name of a file of tensors that a rank writes; `kind` is model, optim or rng."""
    return f"{kind}-{rank:05d}.safetensors"


@dataclass(frozen=True)
class FileEntry:
    """One file as it was in memory when it was written."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What COMMIT.json says."""

    step: int
    files: tuple[FileEntry, ...]
    tensors: Mapping[str, str]
    """The digest of every tensor by its key, such as `model/NAME` (see `Strategy.state`), whichever file it lies in."""

    def names(self, kind: str) -> list[str]:
        """Return the files of tensors of one kind, in order of rank."""
        return sorted(entry.name for entry in self.files if entry.name.startswith(f"{kind}-"))

    def to_bytes(self) -> bytes:
        """Return the content of COMMIT.json; it ends in a digest of itself."""
        files = [asdict(entry) for entry in sorted(self.files, key=lambda entry: entry.name)]
        body = {"schema": SCHEMA, "step": self.step, "files": files, "tensors": dict(sorted(self.tensors.items()))}
        return json_bytes(_sealed(body))


def too_large(name: str, size: int) -> str:
    """Return why a JSON file of this size is not read; empty if it is."""
    return f"{name} is larger than {MAX_JSON_BYTES:,} bytes" if size > MAX_JSON_BYTES else ""


def _link_problem(path: Path) -> str:
    """Return why a link is not followed; empty if it is none."""
    told = f"{path.name} is a link, which may lead anywhere; put in its place what it leads to"
    return told if path.is_symlink() else ""


def read_json(path: Path) -> Any:
    """Return what a JSON file holds that anyone may have written.

    Raises:
        ValueError: it is too large, nested too deeply, or no JSON.
    """
    if problem := too_large(path.name, path.stat().st_size):
        raise ValueError(problem)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read: {error!r}") from error


def _sealed(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()}


def read_manifest(directory: Path) -> Manifest:
    """Return what COMMIT.json of a checkpoint says.

    Raises:
        ValueError: it is broken, and how.
        CheckpointError: it is whole, but another version of the harness wrote it.
    """
    path = directory / COMMIT
    if problem := _link_problem(directory) or _link_problem(path):
        raise ValueError(problem)
    if not path.is_file():
        raise ValueError(f"has no {COMMIT}: the save was cut off")
    commit, content = read_json(path), path.read_bytes()
    try:
        body = {key: value for key, value in commit.items() if key != "sha256"}
        is_whole = json_bytes(_sealed(body)) == content
    except AttributeError as error:
        raise ValueError(f"{COMMIT} cannot be read: {error!r}") from error
    if not is_whole:
        raise ValueError(f"{COMMIT} is not what was written: its SHA-256 differs")
    if body.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{directory} has schema {body.get('schema')!r}, this harness reads {SCHEMA}. Go on with the version that "
            "wrote it, or start afresh under another run.name"
        )
    try:
        files = tuple(FileEntry(entry["name"], entry["size"], entry["sha256"]) for entry in body["files"])
        manifest = Manifest(body["step"], files, body["tensors"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{COMMIT} cannot be read: {error!r}") from error
    _check(manifest, directory)
    return manifest


def _check(manifest: Manifest, directory: Path) -> None:
    """Trust no value of a manifest, since whoever wrote it can seal it."""
    if not isinstance(manifest.step, int) or directory.name != f"step-{manifest.step:08d}":
        raise ValueError(f"{COMMIT} is that of step {manifest.step!r}")
    for entry in manifest.files:
        if not (isinstance(entry.name, str) and isinstance(entry.size, int) and isinstance(entry.sha256, str)):
            raise ValueError(f"{COMMIT} has an entry that is no name, size and digest: {entry}")
        if not _PLAIN_NAME.fullmatch(entry.name):
            raise ValueError(f"{COMMIT} names {entry.name[:60]!r}, which is not a plain file name")
    names = {entry.name for entry in manifest.files}
    if not {TRAINER, *(tensor_file(kind, 0) for kind in ("model", "optim", "rng"))} <= names:
        raise ValueError(f"{COMMIT} does not list all files of a checkpoint")
    if not isinstance(manifest.tensors, dict) or not all(isinstance(text, str) for text in manifest.tensors.values()):
        raise ValueError(f"{COMMIT} has tensors without a digest")


def file_problem(directory: Path, entry: FileEntry) -> str | None:
    """Return what is wrong with one file, or None; reads all of it."""
    path = directory / entry.name
    if problem := _link_problem(path):
        return problem
    if not path.is_file():
        return f"{entry.name} is missing"
    if path.stat().st_size != entry.size:
        return f"{entry.name} has {path.stat().st_size:,} bytes, wanted {entry.size:,}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == entry.sha256 else f"{entry.name} is not what was written: its SHA-256 differs"


def commit_digest(directory: Path) -> str:
    """Return the SHA-256 of COMMIT.json as it is there, whatever it holds; empty where there is none."""
    path = directory / COMMIT
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def checkpoint_problems(directory: Path, *, share: slice = slice(None)) -> list[str]:
    """Return what is wrong with a checkpoint, nothing if it is whole; reads `share` of its files.

    Raises:
        CheckpointError: another version of the harness wrote it.
        StorageError: it cannot be read just now or by this user, so nothing is known of it.
    """
    try:
        files = read_manifest(directory).files[share]
        problems = [problem for entry in files if (problem := file_problem(directory, entry))]
        if not problems and any(entry.name == TRAINER for entry in files):
            read_trainer(directory)
        return problems
    except OSError as error:
        if error.errno in _DAMAGE:
            return [str(error)]
        raise StorageError(
            f"cannot read {directory}: {error.strerror or error}. It may be whole, so it stays where it is; mend that, "
            "then start the same command again"
        ) from error
    except ValueError as error:
        return [str(error)]


def read_trainer(directory: Path) -> Any:
    """Return what trainer.json holds.

    Raises:
        ValueError: whoever sealed the checkpoint put something else there.
    """
    trainer = read_json(directory / TRAINER)
    if not isinstance(trainer, dict):
        raise ValueError(f"{TRAINER} holds {type(trainer).__name__}, wanted an object")
    return trainer

"""Documents of local text files, one in memory at a time, and which of them train and which validate."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from harness.data.order import permutation_key, permute
from harness.errors import DataError

PARQUET = ".parquet"
ROWS_AT_ONCE = 1_000


@dataclass(frozen=True)
class Document:
    """One text."""

    name: str
    """For messages: its file, and its row if the file has several."""
    content: bytes

    def text(self) -> str:
        """Return the characters.

        Raises:
            DataError: it is not UTF-8.
        """
        try:
            return self.content.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.name}: is not UTF-8 at byte {error.start:,} (0x{self.content[error.start]:02x}). Save it as "
                "UTF-8, or set data.tokenizer={kind: byte}, which takes any bytes"
            ) from None


@dataclass(frozen=True)
class Corpus:
    """The documents of some files, in their order."""

    files: tuple[Path, ...]
    text_column: str

    def __iter__(self) -> Iterator[Document]:
        for path in self.files:
            yield from _rows(path, self.text_column) if path.suffix == PARQUET else [_whole(path)]

    def digest(self) -> str:
        """Return 32 hexadecimal digits of the files' contents, in order; reads all of them."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()


def find_corpus(pattern: str, *, text_column: str, key: str = "data.path") -> Corpus:
    """Return the files that a path or a pattern names, in alphabetical order.

    Args:
        key: of the configuration, for messages.
    Raises:
        DataError: there is none, one is a folder, or one is empty or cannot be read.
    """
    literal = Path(pattern)
    files = [literal] if literal.exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not files:
        raise DataError(
            f"{key}: no file is called {literal.absolute()}, or looks like it. Mend the name; the texts of our "
            "examples come with harness data prepare NAME, such as shakespeare"
        )
    for path in files:
        if path.is_dir():
            raise DataError(f"{path}: is a folder, but {key} wants files; write {path}/*.txt")
        try:
            with path.open("rb") as file:
                is_empty = not file.read(1)
        except OSError as error:
            raise DataError(f"{path.absolute()}: {error.strerror}. {key} wants files that can be read") from error
        if is_empty:
            raise DataError(f"{path}: is empty (0 bytes). Write it again, or leave it out of {key}")
    return Corpus(tuple(files), text_column)


def divide_documents(num_documents: int, *, fraction: float, seed: int) -> frozenset[int]:
    """Return which of the documents validate: a fraction of them, at random, as the seed says.

    Raises:
        DataError: no document would be left to train with, or to validate.
    """
    num_validation = round(fraction * num_documents)
    if not 0 < num_validation < num_documents:
        raise DataError(
            f"data.validation_fraction: {fraction:g} of {num_documents} documents leaves "
            f"{num_documents - num_validation} to train and {num_validation} to validate; set data.split=tail, which "
            "divides the text itself, or another fraction"
        )
    order = permute(np.arange(num_documents), size=num_documents, key=permutation_key(seed, 0, "split"))
    return frozenset(order[:num_validation].tolist())


def cut_at(documents: Iterator[Document], cut: int) -> Iterator[tuple[bool, Document]]:
    """Yield (whether it lies before the cut, document); the one that the cut falls into comes as two.

    Args:
        cut: a number of bytes; the cut is made there, or up to three bytes before to keep a UTF-8 character whole.
    """
    start = 0
    for document in documents:
        content, stop = document.content, start + len(document.content)
        here = cut - start
        for _ in range(3):
            if 0 < here < len(content) and content[here] & 0xC0 == 0x80:  # not the first byte of a character
                here -= 1
        if 0 < here < len(content):
            yield True, Document(document.name, content[:here])
            yield False, Document(document.name, content[here:])
        else:
            yield here > 0, document
        start = stop


def _whole(path: Path) -> Document:
    return Document(str(path), path.read_bytes())


def _rows(path: Path, column: str) -> Iterator[Document]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(path, column, file.schema_arrow)
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts):
                if not text:
                    raise DataError(f"{path}: row {row:,} has no text in column {column!r}. Fill it in, or remove it")
                yield Document(f"{path}, row {row:,}", text.encode())
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}. Write it again") from error


def _check_column(path: Path, column: str, schema: Any) -> None:
    if column not in schema.names:
        raise DataError(
            f"{path}: has no column {column!r}, but {', '.join(schema.names)}; set data.text_column to one of these"
        )
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column {column!r} holds {kind}, but text is wanted; set data.text_column to another")

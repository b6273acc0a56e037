"""Documents of local text files, one in memory at a time, and which of them train and which validate."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from harness.catalogue.table.columns import TEXTS, kind_of
from harness.catalogue.table.csv_rows import COMPRESSIONS
from harness.errors import DataError
from harness.rows.order import permutation_key, permute

PARQUET, JSON_LINES = ".parquet", (".jsonl", ".ndjson")
ROWS_AT_ONCE = 1_000
TABLES = {".csv": "columns", ".tsv": "columns", ".json": "records"}
"""Suffixes of files that are text, and of which no model should learn to write the commas."""
CONTENTS = (
    *((0, start, f"{name}-compressed") for start, name in COMPRESSIONS.items() if name != "zip"),
    *((0, start, "compressed") for start in (b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"7z\xbc\xaf", b"Rar!")),
    (0, b"PK\3\4", "a zip archive (also of an office program, or of torch)"),
    (257, b"ustar", "a tar archive"),
    *((0, start, "an image") for start in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"BM")),
    (0, b"RIFF", "an image, a sound or a film"),
    *((0, start, "a sound") for start in (b"ID3", b"fLaC", b"OggS")),
    (4, b"ftyp", "a film or an image"),
    (0, b"%PDF", "a PDF"),
    (0, b"PAR1", "parquet; call it *.parquet"),
    *((0, start, "a table") for start in (b"ARROW1", b"FEA1", b"ORC", b"Obj\x01", b"SQLite format 3", b"\x89HDF")),
    *((0, start, "an array or a pickle") for start in (b"\x93NUMPY", b"\x80\x02", b"\x80\x04", b"\x80\x05")),
    (8, b'{"', "a file of tensors"),
    (0, b"\x7fELF", "a program"),
    *((0, start, "UTF-16 or UTF-32; save it as UTF-8") for start in (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")),
)
"""(place, bytes there, what such a file is) of files that are no running text, whatever they are called."""


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
            if path.suffix.lower() == PARQUET:
                yield from _rows(path, self.text_column)
            elif path.suffix.lower() in JSON_LINES:
                yield from _lines(path, self.text_column)
            else:
                yield _whole(path)

    def in_lines(self) -> list[Path]:
        """Return the files that are JSON, a document a line."""
        return [path for path in self.files if path.suffix.lower() in JSON_LINES]

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
        DataError: there is none, one is a folder, or one is empty, is no text or cannot be read.
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
                start = file.read(512)
        except OSError as error:
            raise DataError(f"{path.absolute()}: {error.strerror}. {key} wants files that can be read") from error
        if not start:
            raise DataError(f"{path}: is empty (0 bytes). Write it again, or leave it out of {key}")
        if path.suffix.lower() != PARQUET:
            _check_is_text(path, start, key)
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


def _check_is_text(path: Path, start: bytes, key: str) -> None:
    what = next((what for place, found, what in CONTENTS if start[place:].startswith(found)), None)
    if what is not None and not _is_plain(start):  # a text may begin with GIF8 or BM
        raise DataError(f"{path}: is {what}, but {key} wants running text. Write its text to a file, or leave it out")
    if path.suffix.lower() in TABLES:
        raise DataError(
            f"{path}: holds {TABLES[path.suffix.lower()]}, but {key} wants running text. Write the column of the texts "
            "to a .jsonl file, an object a line, or to a .parquet file, and name it in data.text_column"
        )


def _is_plain(start: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8, perhaps cut within a character, without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(character >= " " or character in "\t\n\r\f\v\b\x1b" for character in text)


def _lines(path: Path, column: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row.get(column, "") if isinstance(row, dict) else None
                content = text.encode() if isinstance(text, str) else b""
            except ValueError as error:
                raise DataError(f"{path}: line {number:,} cannot be read as JSON: {error}. Write it again") from None
            if not content:
                has = f"but {', '.join(map(repr, row))}" if isinstance(row, dict) else "for it is no object"
                if isinstance(row, dict) and column in row:
                    has = f"for that is {json.dumps(row[column])[:40]}"
                raise DataError(
                    f"{path}: line {number:,} has no text {column!r}, {has}; set data.text_column, fill it in, or "
                    "remove the line"
                )
            yield Document(f"{path}, line {number:,}", content)


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


def check_text_column(path: Path, column: str) -> None:
    """Refuse a parquet file without a column of texts of this name, or a file of JSON whose first line has none.

    Raises:
        DataError: it is one.
    """
    if path.suffix.lower() == PARQUET:
        next(_rows(path, column), None)
    elif path.suffix.lower() in JSON_LINES:
        next(_lines(path, column), None)


def _check_column(path: Path, column: str, schema: Any) -> None:
    if column not in schema.names:
        raise DataError(
            f"{path}: has no column {column!r}, but {', '.join(schema.names)}; set data.text_column to one of these"
        )
    kind = schema.field(column).type
    if kind_of(kind) != TEXTS:
        raise DataError(f"{path}: column {column!r} holds {kind}, but text is wanted; set data.text_column to another")

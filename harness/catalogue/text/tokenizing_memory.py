"""What memory the tokens of running text want while they are made, told before it is taken."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from harness.catalogue.text.documents import JSON_LINES, PARQUET, Corpus
from harness.catalogue.text.section import ByteTokenizer, Tokenizer
from harness.errors import DataError

BYTES_FOR_A_BYTE = 210
"""Of `tokenizers`, for each byte of a document: 161 to 169 were seen with byte-pair encoding of prose, 194 to 213 with
characters, 259 to 305 with short tokens (300 of them, for hexadecimal numbers)."""


def memory_wanted(corpora: Iterable[Corpus], tokenizer: Tokenizer) -> tuple[Path, int]:
    """Return the largest file that is one document, and how many bytes of memory its tokens want.

    A document a row or a line is not counted: it is a small part of its file.
    """
    files = [path for corpus in corpora for path in corpus.files]
    sizes = {path: 0 if path.suffix.lower() in (PARQUET, *JSON_LINES) else path.stat().st_size for path in files}
    largest = max(files, key=sizes.__getitem__)
    return largest, sizes[largest] * (1 if isinstance(tokenizer, ByteTokenizer) else BYTES_FOR_A_BYTE)


def check_memory(corpora: Iterable[Corpus], tokenizer: Tokenizer) -> None:
    """Refuse to tokenize what cannot fit into the memory that is free here.

    Raises:
        DataError: names the file and both sizes.
    """
    path, wanted = memory_wanted(corpora, tokenizer)
    free = free_memory()
    if free is not None and wanted > free:
        raise DataError(
            f"{path}: is one document of {path.stat().st_size:,} bytes, whose tokens want {in_gb(wanted)} of memory "
            f"while they are made; {in_gb(free)} are free. Divide it into files, or write its parts to a .jsonl file"
        )


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that this process may still take: of the machine and of its container; None if nothing says."""
    found = []
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)


def in_gb(num_bytes: int) -> str:
    """Return a number of bytes for a reader."""
    return f"{num_bytes / 1e9:,.1f} GB"

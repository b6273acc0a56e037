"""A first look at running text, for `harness check`; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from harness.catalogue.text.documents import check_text_column, find_corpus
from harness.catalogue.text.section import TextData
from harness.catalogue.text.tokenizing_memory import in_gb, memory_wanted

FIRST_FILES = 20
MUCH_MEMORY = 10**9
"""Bytes that are told; whether there are so many is a question to the machine that trains."""


def look_at_running_text(data: TextData) -> Iterator[str]:
    for key, pattern in (("data.path", data.path), ("data.validation_path", data.validation_path)):
        if pattern is None:
            continue
        corpus = find_corpus(pattern, text_column=data.text_column, key=key)
        for path in corpus.files[:FIRST_FILES]:
            check_text_column(path, data.text_column)
        size = sum(path.stat().st_size for path in corpus.files)
        yield f"{pattern}: {len(corpus.files):,} files, {size:,} bytes; beyond their beginnings not looked at"
        path, wanted = memory_wanted([corpus], data.tokenizer)
        if wanted > MUCH_MEMORY:
            yield f"{path}: is one document, whose tokens want {in_gb(wanted)} of memory while they are made"

"""Running text as fixed blocks of tokens: views of one token file, built once by rank zero and mapped by every rank.

Documents stand one after another with an end-of-document token before the first and after each. Row r of T tokens
has the tokens r T ... r T + T - 1 as inputs and the same, one further, as targets; fewer than T at the end are left
out.

CACHE/tokens-KEY/ (cache.py)  KEY is a digest of the files' contents and of every setting that decides about tokens
  train.bin validation.bin    the tokens, little-endian int16 or int32
  tokenizer.json              what `tokenizer_from_json` reads
  facts.json                  their type, and how many there are
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.catalogue.text.documents import Corpus, Document, cut_at, divide_documents, find_corpus
from harness.catalogue.text.section import ByteTokenizer, PretrainedTokenizer, TextData
from harness.catalogue.text.tokenizers import TextTokenizer, tokenizer_from_json, train_tokenizer
from harness.catalogue.text.tokenizing_memory import check_memory
from harness.errors import DataError
from harness.rows.cache import Facts, Write, cache_folder, fill_once, read_facts
from harness.rows.rows import Columns
from harness.rows.unchanged import check_unchanged, file_states

TRAIN, VALIDATION, TOKENIZER = "train.bin", "validation.bin", "tokenizer.json"


@dataclass(frozen=True)
class TextSplits:
    """The blocks that train, those that validate, and what their ids mean."""

    train: Columns
    validation: Columns
    tokenizer: TextTokenizer
    notices: tuple[str, ...] = ()
    read_otherwise: tuple[str, ...] = ()
    """What is done with the files that the version before did not."""


def prepare_text(data: TextData, *, seed: int, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of tokens of `data`, after filling it if it is not there; for one process, before `load_text`.

    Raises:
        DataError: the files cannot be used, or the folder is not what was written.
        StorageError: the folder cannot be written.
    """
    corpora = _corpora(data)
    before = file_states(path for corpus in corpora for path in corpus.files)
    folder = token_folder(data, seed=seed, environment=environment)

    def fill(write: Write) -> Facts:
        check_memory(corpora, data.tokenizer)
        facts = _write_tokens(write, data, seed=seed)
        check_unchanged(before)
        if _corpora(data) != corpora:
            raise DataError(f"{data.path}: files came or went while they were read. Start again when nothing does that")
        return facts

    fill_once(folder, fill)
    return folder


def load_text(data: TextData, *, seed: int, environment: Mapping[str, str] = os.environ) -> TextSplits:
    """Return the blocks of `data`, mapped from the folder that `prepare_text` has made.

    Raises:
        DataError: the folder is missing or torn, or a split has not one whole block.
    """
    folder = token_folder(data, seed=seed, environment=environment)
    facts = read_facts(folder)
    train, validation = (_blocks(folder, name, facts, block=data.block) for name in (TRAIN, VALIDATION))
    corpora = _corpora(data)
    trains, validates = ({path.resolve() for path in corpus.files} for corpus in (corpora[0], corpora[-1]))
    both = sorted(trains & validates) if len(corpora) > 1 else []
    return TextSplits(
        train,
        validation,
        tokenizer_from_json((folder / TOKENIZER).read_text()),
        tuple(f"{path}: trains and validates; keep it out of data.path or data.validation_path" for path in both),
        tuple(
            f"reads column {data.text_column!r} of each line of {path}"
            for corpus in corpora
            for path in corpus.in_lines()
        ),
    )


def _corpora(data: TextData) -> list[Corpus]:
    """Return the files that train, and those that validate if there are some."""
    named = {"data.path": data.path, "data.validation_path": data.validation_path}
    return [find_corpus(path, text_column=data.text_column, key=key) for key, path in named.items() if path is not None]


def token_folder(data: TextData, *, seed: int, environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the tokens of `data` are kept; reads all of its files."""
    corpora = _corpora(data)
    settings: dict[str, Any] = {"tokenizer": data.tokenizer.model_dump()}
    if data.tokenizer.kind != "byte":
        settings["tokenizers"] = tokenizers.__version__  # which may merge otherwise
    if isinstance(data.tokenizer, PretrainedTokenizer):
        files = [(Path(data.tokenizer.path) / name).read_bytes() for name in (TOKENIZER, "config.json")]
        settings["model"] = [hashlib.sha256(content).hexdigest() for content in files]
    if data.validation_path is None:
        settings |= {"split": data.split, "fraction": data.validation_fraction}
        settings |= {"seed": seed} if data.split == "documents" else {}
    settings["texts"] = [corpus.digest() for corpus in corpora]
    settings["columns"] = data.text_column
    if any(corpus.in_lines() for corpus in corpora):
        settings["in_lines"] = True  # once they were one document
    return cache_folder("tokens", settings, beside=corpora[0].files[0], environment=environment)


def documents_of(data: TextData, *, seed: int, validating: bool) -> Iterator[Document]:
    """Yield the documents that train, or those that validate."""
    corpus, *others = _corpora(data)
    if others:
        yield from others[0] if validating else corpus
    elif data.split == "tail":
        cut = round((1 - data.validation_fraction) * sum(len(document.content) for document in corpus))
        yield from (document for trains, document in cut_at(iter(corpus), cut) if trains != validating)
    else:
        chosen = divide_documents(sum(1 for _ in corpus), fraction=data.validation_fraction, seed=seed)
        yield from (document for index, document in enumerate(corpus) if (index in chosen) == validating)


def _write_tokens(write: Write, data: TextData, *, seed: int) -> Facts:
    texts = (document.text() for document in documents_of(data, seed=seed, validating=False))
    tokenizer = train_tokenizer(data.tokenizer, texts)
    dtype = np.dtype("<i2" if tokenizer.num_tokens <= 2**15 else "<i4")
    facts: Facts = {"dtype": dtype.name}
    for name, validating in ((TRAIN, False), (VALIDATION, True)):
        documents = documents_of(data, seed=seed, validating=validating)
        if not isinstance(data.tokenizer, ByteTokenizer):
            documents = (Document(document.name, document.text().encode()) for document in documents)
        tokens = _with_ends(documents, tokenizer)
        facts[name] = write(name, (chunk.astype(dtype).tobytes() for chunk in tokens)) // dtype.itemsize
    write(TOKENIZER, [tokenizer.to_json().encode()])
    return facts


def _with_ends(documents: Iterator[Document], tokenizer: TextTokenizer) -> Iterator[NDArray[np.int32]]:
    end = np.array([tokenizer.end], np.int32)
    bytes_of = tokenizer.token_bytes()
    yield end
    for document in documents:
        tokens = tokenizer.encode(document.content)
        # What bits per byte rest on: the tokens stand for every byte of the text.
        num_bytes = int(bytes_of[tokens].sum())
        if num_bytes != len(document.content):
            raise DataError(
                f"{document.name}: data.tokenizer does not give this text back; its tokens stand for {num_bytes:,} "
                f"bytes of {len(document.content):,}. Take out what it changes (its normalizer, in tokenizer.json, "
                "says what), or use another model"
            )
        yield tokens
        yield end


def _blocks(folder: Path, name: str, facts: Facts, *, block: int) -> Columns:
    num_tokens = facts[name]
    num_rows = (num_tokens - 1) // block  # the last target has no successor
    if num_rows == 0:
        what = "training" if name == TRAIN else "validation"
        raise DataError(
            f"data.block: {block:,} tokens are more than the {what} text has ({num_tokens - 1:,}); use a smaller "
            "block, or more text"
        )
    dtype = torch.int16 if facts["dtype"] == "int16" else torch.int32
    # A private map: the pages of the file are shared by all ranks of a machine, and nothing is read until it is used.
    stream: Tensor = torch.from_file(str(folder / name), shared=False, size=num_tokens, dtype=dtype)
    inputs, targets = (stream[shift : shift + num_rows * block].view(num_rows, block) for shift in (0, 1))
    return Columns(inputs, targets)

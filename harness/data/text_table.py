"""The texts of a table as tokens of a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from harness.config.data import TABLE_SUFFIXES, TextTableData
from harness.config.pretrained import TOKENIZER, pad_token_id
from harness.data.tabular import Table, check_columns, load_table, texts_of
from harness.errors import DataError


def read_texts(path: str, data: TextTableData) -> tuple[Table, list[str]]:
    """Return a table and its column of texts.

    Raises:
        DataError: the file cannot be read, a column does not exist, or a row has no text.
    """
    table = load_table(TABLE_SUFFIXES[PurePath(path).suffix], Path(path), spelled=[data.text, data.target])
    check_columns(table, {"text": [data.text], "target": [data.target]})
    return table, texts_of(table, data.text)


def tokenized(texts: Sequence[str], data: TextTableData) -> tuple[Tensor, tuple[str, ...]]:
    """Return the (N, T) int64 tokens of texts, filled up at the end, and what there is to say of it.

    T is the length of the longest, at most `data.max_tokens`.

    Raises:
        DataError: there is no tokenizer, it cannot be read, or it makes nothing of a text.
    """
    if data.tokenizer is None:
        raise DataError("data.tokenizer: missing; give a directory with tokenizer.json and config.json")
    tokenizer = _tokenizer(Path(data.tokenizer) / TOKENIZER)
    tokenizer.no_padding()
    tokenizer.enable_truncation(data.max_tokens)  # keeps the special tokens at both ends
    encodings = tokenizer.encode_batch_fast(list(texts))
    rows = [encoding.ids for encoding in encodings]
    if not all(rows):
        raise DataError(
            f"{data.tokenizer}: the tokenizer makes no token of {texts[rows.index([])]!r}; remove such rows"
        )
    tokens = torch.full((len(rows), max(map(len, rows))), pad_token_id(data.tokenizer))
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    num_cut = sum(bool(encoding.overflowing) for encoding in encodings)
    if not num_cut:
        return tokens, ()
    return tokens, (
        f"{num_cut:,} of {len(rows):,} texts have more than {data.max_tokens} tokens; what is beyond is cut off "
        "(data.max_tokens)",
    )


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise DataError(f"{path.absolute()}: there is no such file; data.tokenizer wants a directory that has it")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{path}: cannot be read as a tokenizer: {error}; copy it again") from error

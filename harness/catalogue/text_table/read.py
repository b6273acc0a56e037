"""The texts of a table as tokens of a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from harness.catalogue.pretrained.directory import TOKENIZER, end_token_id, pad_token_id, read_config
from harness.catalogue.table.read import Table, check_columns, load_table, texts_of
from harness.catalogue.text_table.section import TABLE_SUFFIXES, TextTableData
from harness.errors import DataError

NAMES_ARE_TEXT = "which is read as plain text"
"""How the notice ends where READING 1 took the names of special tokens in a text for these tokens."""


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
    notices = _read_names_as_text(encodings, texts, tokenizer, directory=data.tokenizer)
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
        return tokens, notices
    return tokens, (
        *notices,
        f"{num_cut:,} of {len(rows):,} texts have more than {data.max_tokens} tokens; what is beyond is cut off "
        "(data.max_tokens)",
    )


def _read_names_as_text(
    encodings: list[Any], texts: Sequence[str], tokenizer: Any, *, directory: str
) -> tuple[str, ...]:
    """Encode the texts again, as plain text, that the names of special tokens would give a wrong meaning to.

    They are the padding token and, where an encoder and a decoder are classified by its place, the end of the text.

    Raises:
        DataError: the tokenizer makes such a token of other words as well, or puts no end behind a text.
    """
    config, pad = read_config(directory), pad_token_id(directory)
    end = end_token_id(directory) if config.get("is_encoder_decoder") else None
    reserved = {pad} if end is None else {pad, end}
    affected = [row for row, encoding in enumerate(encodings) if _has_inside(encoding, reserved)]
    if affected:
        tokenizer.encode_special_tokens = True
    for row in affected:
        encodings[row] = tokenizer.encode(texts[row])
        if _has_inside(encodings[row], reserved):
            raise DataError(
                f"{directory}: the tokenizer makes its padding or end token ({_names(tokenizer, reserved)}) of "
                f"{texts[row]!r}; give the model another pad_token_id in config.json, or remove such rows"
            )
    if end is not None:
        without = next((row for row, encoding in enumerate(encodings) if encoding.ids.count(end) != 1), None)
        if without is not None:
            raise DataError(
                f"{directory}: the model looks at the end of a text ({_names(tokenizer, {end})}), which its tokenizer "
                f"does not put behind {texts[without]!r}; use the tokenizer that the model was trained with"
            )
    if not affected:
        return ()
    return (
        f"{len(affected):,} of {len(texts):,} texts have the name of a special token in them "
        f"({_names(tokenizer, reserved)}), {NAMES_ARE_TEXT}",
    )


def _has_inside(encoding: Any, reserved: set[int]) -> bool:
    """Whether a text, without what the tokenizer puts around it, has one of some tokens."""
    if reserved.isdisjoint(encoding.ids):
        return False
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return any(token in reserved and not is_around for token, is_around in pairs)


def _names(tokenizer: Any, tokens: set[int]) -> str:
    return " or ".join(str(tokenizer.id_to_token(token)) for token in sorted(tokens))


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise DataError(f"{path.absolute()}: there is no such file; data.tokenizer wants a directory that has it")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{path}: cannot be read as a tokenizer: {error}; copy it again") from error

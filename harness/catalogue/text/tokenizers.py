"""Tokenizers: documents to token ids and back, without loss, and how many bytes of text each token stands for.

One id of each is the end of a document, which stands for no byte: the last one, or what a pretrained model has for it.
All but a text's bytes are `tokenizers.Tokenizer`s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from harness.catalogue.pretrained.directory import TOKENIZER, end_token_id, vocabulary_size
from harness.catalogue.text.section import BpeTokenizer, ByteTokenizer, PretrainedTokenizer, Tokenizer
from harness.errors import DataError

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
"""What `tokenizers` calls the bytes of a character that has no token."""


class TextTokenizer(Protocol):
    """What turns documents into ids."""

    num_tokens: int
    """The end of a document included."""
    end: int
    """The id of the end of a document."""

    def encode(self, document: bytes) -> NDArray[np.int32]:
        """Return the (n,) ids of a document, which is UTF-8 unless the tokens are bytes; without its end."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the text of some ids; the end of a document is nothing."""
        ...

    def token_bytes(self) -> NDArray[np.int64]:
        """Return for each of (num_tokens,) ids how many bytes it stands for."""
        ...

    def to_json(self) -> str:
        """Return what `tokenizer_from_json` makes this tokenizer from."""
        ...


class Bytes:
    """Each byte is its own id."""

    num_tokens = 257
    end = 256

    def encode(self, document: bytes) -> NDArray[np.int32]:
        return np.frombuffer(document, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(token for token in ids if token < 256)

    def token_bytes(self) -> NDArray[np.int64]:
        return np.array([1] * 256 + [0], np.int64)

    def to_json(self) -> str:
        return json.dumps({"kind": "byte"})


class Subwords:
    """The tokens of a `tokenizers.Tokenizer`, and one more for the end of a document.

    Args:
        tokenizer: one of byte-pair encoding that has a token for every byte.
    """

    def __init__(self, tokenizer: LibraryTokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_tokens: int = tokenizer.get_vocab_size() + 1
        self.end = self.num_tokens - 1

    def encode(self, document: bytes) -> NDArray[np.int32]:
        return np.array(self._tokenizer.encode(document.decode()).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        tokens = [token for token in ids if token < self.end]
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text.encode()

    def token_bytes(self) -> NDArray[np.int64]:
        names = [str(self._tokenizer.id_to_token(token)) for token in range(self.num_tokens - 1)]
        if self._tokenizer.pre_tokenizer is None:  # characters
            bytes_of = [1 if name in BYTE_TOKENS else len(name.encode()) for name in names]
        else:
            bytes_of = [len(name) for name in names]  # the byte-level alphabet has one character for each byte
        return np.array([*bytes_of, 0], np.int64)

    def to_json(self) -> str:
        text: str = self._tokenizer.to_str()
        return text


class ModelTokens:
    """The tokens of a pretrained model with byte-level BPE, those that its tokenizer never makes included.

    What a text has of the names of special tokens is text. Nothing is put before a document or behind it.

    Args:
        directory: of tokenizer.json and config.json, which are as catalogue/pretrained/directory.py wants them.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = str(directory)
        self._tokenizer = LibraryTokenizer.from_file(str(Path(directory) / TOKENIZER))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.num_tokens, self.end = vocabulary_size(self._directory), end_token_id(self._directory)
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if max(largest, self.end) >= self.num_tokens:
            raise DataError(
                f"data.tokenizer.path: the tokens of {directory} go up to {max(largest, self.end):,}, but its "
                f"config.json has a vocab_size of {self.num_tokens:,}; use the tokenizer that it was trained with"
            )

    def encode(self, document: bytes) -> NDArray[np.int32]:
        return np.array(self._tokenizer.encode(document.decode(), add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.encode()

    def token_bytes(self) -> NDArray[np.int64]:
        bytes_of = np.zeros(self.num_tokens, np.int64)
        for name, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            bytes_of[token] = len(name)  # the byte-level alphabet has one character for each byte
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            bytes_of[token] = 0 if added.special else len(added.content.encode())
        bytes_of[self.end] = 0
        return bytes_of

    def to_json(self) -> str:
        return json.dumps({"kind": "pretrained", "path": self._directory})


def tokenizer_from_json(text: str) -> TextTokenizer:
    """Return the tokenizer that `to_json` described."""
    described: Any = json.loads(text)
    match described.get("kind"):
        case "byte":
            return Bytes()
        case "pretrained":
            return ModelTokens(described["path"])
    return Subwords(LibraryTokenizer.from_str(text))


def train_tokenizer(config: Tokenizer, texts: Iterable[str]) -> TextTokenizer:
    """Return the tokenizer that `config` wants for the training `texts`, which are read once, if at all.

    Raises:
        DataError: the text has too few different pairs for so many tokens.
    """
    if isinstance(config, ByteTokenizer):
        return Bytes()
    if isinstance(config, PretrainedTokenizer):
        return ModelTokens(config.path)
    if not isinstance(config, BpeTokenizer):
        return Subwords(_characters(texts))
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=config.vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    trained = Subwords(tokenizer)
    if trained.num_tokens < config.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size: the training text has no more than {trained.num_tokens:,} tokens to give, "
            f"{config.vocab_size:,} are wanted; use {trained.num_tokens} or less, or more text"
        )
    return trained


def _characters(texts: Iterable[str]) -> LibraryTokenizer:
    characters = sorted({character for text in texts for character in set(text)})
    vocabulary = {name: token for token, name in enumerate([*characters, *BYTE_TOKENS])}
    tokenizer = LibraryTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer

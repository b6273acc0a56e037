"""The sections that describe running text: how it is read, divided and turned into tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.config.data import DataSection
from harness.config.fields import Int, PositiveInt, Section
from harness.config.slots import TaskSection
from harness.parts import data

if TYPE_CHECKING:
    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits


class ByteTokenizer(Section):
    """256 tokens, one a byte, and one for the end of a document; takes any bytes, UTF-8 or not."""

    kind: Literal["byte"]


class CharTokenizer(Section):
    """One token for each character of the training text; any other character is written as its UTF-8 bytes."""

    kind: Literal["char"]


class BpeTokenizer(Section):
    """Byte-pair encoding of UTF-8 bytes, merged as the training text suggests (GPT-2's rules for words)."""

    kind: Literal["bpe"]
    vocab_size: Annotated[Int, Field(ge=258, le=2**20)]
    """All tokens: 256 bytes, the merges, and one for the end of a document."""


class PretrainedTokenizer(Section):
    """That of a pretrained causal language model: byte-level BPE, such as GPT-2's or Llama 3's; its documents end with
    the model's eos_token_id."""

    kind: Literal["pretrained"]
    path: str
    """A directory with tokenizer.json and config.json."""


Tokenizer = Annotated[ByteTokenizer | CharTokenizer | BpeTokenizer | PretrainedTokenizer, Field(discriminator="kind")]


class TextSection(Section):
    """Running text for a causal language model, cut into blocks of one length; a row is a block."""

    source: Literal["text"]
    path: str
    """A file, or a pattern such as data/shakespeare/*.txt; a .parquet file holds a document a row, a .jsonl file one a
    line, any other file is one document. Tables and what is no text, such as images and archives, are refused."""
    validation_path: str | None = None
    """Files of their own for validation; without them `validation_fraction` is set aside, as `split` says."""
    split: Literal["documents", "tail"] = "documents"
    """Set aside a fraction of the documents, chosen by the seed, or the last fraction of all bytes."""
    block: PositiveInt
    """Tokens of a row; the model predicts each of them from those before it."""
    text_column: str = "text"
    """The column of a .parquet file, or the key of each line of a .jsonl file, that holds the text."""
    tokenizer: Tokenizer = ByteTokenizer(kind="byte")
    """Made from the training text when the run first starts; by default that of a pretrained model, if it is one."""


@data("text")
class TextData(DataSection, TextSection):
    """Running text for a causal language model."""

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems
        from harness.catalogue.text_table.agree import tokenizer_problems

        return [*language_problems(config), *tokenizer_problems(config, self)]

    def problems_here(self, config: RunConfig, *, must_be_there: bool) -> list[str]:
        from harness.catalogue.pretrained.directory import pretrained_problems

        return pretrained_problems(config, must_be_there=must_be_there)

    def prepare(self, task: TaskSection, *, seed: int) -> None:
        from harness.catalogue.text.read import prepare_text

        prepare_text(self, seed=seed)

    def open(self, task: TaskSection, *, seed: int) -> DataSplits:
        from harness.catalogue.text.open import open_rows

        return open_rows(self, seed=seed)

    def look(self, task: TaskSection) -> Iterator[str]:
        from harness.catalogue.text.look import look_at_running_text

        return look_at_running_text(self)

"""From the section of running text to the blocks that train and those that validate."""

from __future__ import annotations

from harness.catalogue.finish import same_rows
from harness.catalogue.text.read import load_text
from harness.catalogue.text.section import TextData
from harness.rows.splits import DataSplits


def open_rows(data: TextData, *, seed: int) -> DataSplits:
    """Return blocks of tokens; see `DataSection.open`."""
    text = load_text(data, seed=seed)
    num_tokens = text.tokenizer.num_tokens
    return DataSplits(
        text.train,
        text.validation,
        (data.block,),
        num_tokens,
        notices=(*text.notices, *same_rows(text.train, text.validation)),
        tokenizer=text.tokenizer,
        own_facts={"vocabulary": num_tokens, "outputs": num_tokens},
        read_otherwise=text.read_otherwise,
    )

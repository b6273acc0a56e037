"""The section of a network of transformers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.config.fields import CountInt, Float, PositiveFloat, PositiveInt, Probability, Section


class Lora(Section):
    """Train a low-rank addition to some matrices in place of the matrices (arXiv:2106.09685); needs `peft`.

    The head of a classifier trains whole, and whatever else the model's files do not have.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    """The addition is multiplied by alpha / rank."""
    dropout: Probability = 0.0
    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of layers or experts, such as query and value; null is peft's choice for the
    architecture. One that shares its weight with another layer, as a head does with embeddings, gets one of its own."""


class PretrainedModel(Section):
    """A network of `transformers` from a local directory of config.json and safetensors; no code of it is run."""

    kind: Literal["pretrained"]
    path: str
    head: Literal["sequence_classification", "causal_lm"] = "sequence_classification"
    """What it ends in: logits of a row, or of every token."""
    frozen_layers: CountInt | None = None
    """These many lowest blocks (of an encoder and of a decoder), and the embeddings, stay as they are, but for what is
    drawn at random; 0 is the embeddings alone, null nothing."""
    layer_lr_decay: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Going down from the head, the learning rate of each block is this times that of the one above it."""
    dropout: Probability | None = None
    """Replaces every dropout rate of config.json; null keeps them."""
    lora: Lora | None = None

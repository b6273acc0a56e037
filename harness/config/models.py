"""The sections that describe a network: one `kind:` each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.config.fields import CountInt, Float, PositiveFloat, PositiveInt, Probability, Section


class MlpModel(Section):
    """Fully connected layers: hidden widths, then one linear layer to the outputs of the task."""

    kind: Literal["mlp"]
    hidden: tuple[PositiveInt, ...]
    activation: Literal["relu", "gelu", "tanh", "sigmoid"] = "relu"
    norm: Literal["none", "batch"] = "none"
    sync_batch_norm: bool = False
    """BatchNorm takes its statistics over all ranks; on GPUs only."""
    dropout: Probability = 0.0


class CnnModel(Section):
    """3x3 convolutions, each followed by 2x2 max-pooling, then fully connected layers."""

    kind: Literal["cnn"]
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    hidden: tuple[PositiveInt, ...] = (128,)
    norm: Literal["none", "batch"] = "none"
    sync_batch_norm: bool = False
    """BatchNorm takes its statistics over all ranks; on GPUs only."""
    dropout: Probability = 0.0


class Lora(Section):
    """Train a low-rank addition to some matrices in place of the matrices (arXiv:2106.09685); needs `peft`."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    """The addition is multiplied by alpha / rank."""
    dropout: Probability = 0.0
    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of linear layers, such as query and value; null is peft's choice for the architecture."""


class PretrainedModel(Section):
    """A network of `transformers` from a local directory of config.json and safetensors; no code of it is run."""

    kind: Literal["pretrained"]
    path: str
    head: Literal["sequence_classification", "causal_lm"] = "sequence_classification"
    """What it ends in: logits of a row, or of every token."""
    frozen_layers: CountInt | None = None
    """These many lowest blocks, and the embeddings, stay as they are; 0 is the embeddings alone, null nothing."""
    layer_lr_decay: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Going down from the head, the learning rate of each block is this times that of the one above it."""
    dropout: Probability | None = None
    """Replaces every dropout rate of config.json; null keeps them."""
    lora: Lora | None = None


Model = Annotated[MlpModel | CnnModel | PretrainedModel, Field(discriminator="kind")]

"""The sections that describe a network: one `kind:` each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.config.fields import PositiveInt, Probability, Section
from harness.config.gpt import GptModel


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


Model = Annotated[MlpModel | CnnModel | GptModel, Field(discriminator="kind")]

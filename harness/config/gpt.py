"""The section of a decoder-only Transformer, and what follows from it in closed form."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from harness.config.fields import PositiveInt, Probability, Section


class GptModel(Section):
    """Token and position embeddings, pre-norm blocks of causal attention and a feed-forward net, a linear head.

    The context is `data.block`. No layer has a bias.
    """

    sync_batch_norm: ClassVar = False
    kind: Literal["gpt"]
    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    norm: Literal["layer", "rms"] = "layer"
    activation: Literal["gelu", "swiglu"] = "gelu"
    tied_embeddings: bool = True
    """The head's weights are those of the token embedding."""
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> GptModel:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self

    @property
    def hidden_width(self) -> int:
        """Of the feed-forward net: 4 times the width; SwiGLU has a third matrix, so 8/3, up to a multiple of 8."""
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // 24) * 8

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices in all blocks."""
        matrices = 2 if self.activation == "gelu" else 3
        return self.layers * (4 * self.width**2 + matrices * self.width * self.hidden_width)


def num_parameters(config: GptModel, *, context: int, num_tokens: int) -> int:
    """Return the parameters of the network, tied ones once.

    `layers * (4 w^2 + m w h) + (2 layers + 1) w + context w + num_tokens w`, the last twice if the head is not tied.
    """
    embeddings = num_tokens * (1 if config.tied_embeddings else 2) + context
    norms = 2 * config.layers + 1
    return config.matrix_parameters + (embeddings + norms) * config.width


def forward_flops_per_token(config: GptModel, *, context: int, num_tokens: int) -> int:
    """Return the floating-point operations of matrix products for one token; a training update has three times as many.

    Two for each weight of a matrix, the head's included, and `4 context width` a layer for the attention, which is
    counted in full although half of it is masked.
    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1, with the head.
    """
    weights = config.matrix_parameters + num_tokens * config.width
    return 2 * weights + 4 * config.layers * context * config.width

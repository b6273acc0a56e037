"""The section of a decoder-only Transformer, and what follows from it in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.config.fields import Int, NonNegativeFloat, PositiveInt, Probability, Section, WrongKey
from harness.config.slots import KnownRows, ModelSection
from harness.parts import model

if TYPE_CHECKING:
    from torch import nn

    from harness.config.run_config import RunConfig


class Experts(Section):
    """Several feed-forward nets in each block; a router sends every token to `top_k` of them."""

    count: Annotated[Int, Field(ge=2)]
    top_k: PositiveInt = 2
    load_balance: NonNegativeFloat = 0.01
    """How much of the loss that evens out the load is added (Fedus et al. 2022, arXiv:2101.03961, eq. 4)."""

    @model_validator(mode="after")
    def _there_are_so_many(self) -> Experts:
        if self.top_k > self.count:
            raise WrongKey("top_k", f"{self.top_k} is more than the {self.count} experts; use {self.count} or less")
        return self


class Ngrams(Section):
    """A learned vector for the last 2, ..., `longest` tokens together, added to that of the token."""

    rows: PositiveInt
    """Of the table of each length, `width` wide; runs of tokens that hash alike share a row."""
    longest: Annotated[Int, Field(ge=2, le=8)] = 3


@model("gpt")
class GptModel(ModelSection):
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
    positions: Literal["learned", "rotary"] = "learned"
    """A vector for each place, or queries and keys turned by their place (Su et al. 2021, arXiv:2104.09864)."""
    ngrams: Ngrams | None = None
    """What counting knows at the price of a look-up; small networks and short runs gain the most."""
    dropout: Probability = 0.0
    experts: Experts | None = None
    """In place of one feed-forward net a block; each has the width that the one would have."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> GptModel:
        if self.width % self.heads:
            raise WrongKey("width", f"{self.width} does not divide into {self.heads} heads")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise WrongKey(
                "positions",
                f"rotary turns pairs of features, a head has {self.width // self.heads}; use an even width / heads",
            )
        return self

    def build(self, facts: Mapping[str, Any]) -> nn.Module:
        from harness.catalogue.gpt.network import build

        return build(self, input_shape=facts["input_shape"], num_outputs=facts["num_outputs"])

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems

        return language_problems(config)

    def advice(self, config: RunConfig, *, ranks: int | None, rows: KnownRows | None) -> Iterator[str]:
        from harness.catalogue.gpt.advice import advice

        return advice(self, config)

    @property
    def hidden_width(self) -> int:
        """Of the feed-forward net: 4 times the width; SwiGLU has a third matrix, so 8/3, up to a multiple of 8."""
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // 24) * 8

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices in all blocks."""
        return self._weights(experts=self.experts.count if self.experts else 1)

    @property
    def active_matrix_parameters(self) -> int:
        """Those of them that one token is multiplied with."""
        return self._weights(experts=self.experts.top_k if self.experts else 1)

    def _weights(self, *, experts: int) -> int:
        attention, router = 4 * self.width**2, self.experts.count * self.width if self.experts else 0
        matrices = 2 if self.activation == "gelu" else 3
        return self.layers * (attention + router + experts * matrices * self.width * self.hidden_width)


def num_parameters(config: GptModel, *, context: int, num_tokens: int) -> int:
    """Return the parameters of the network, tied ones once.

    `layers * (4 w^2 + m w h) + (2 layers + 1) w + context w + num_tokens w`, the last twice if the head is not tied;
    without `context w` if positions are rotary, and with `(longest - 1) rows w` more for n-grams. With E experts
    `E m w h` and the router's `E w` stand for `m w h`.
    """
    embeddings = num_tokens * (1 if config.tied_embeddings else 2)
    embeddings += context if config.positions == "learned" else 0
    embeddings += (config.ngrams.longest - 1) * config.ngrams.rows if config.ngrams else 0
    norms = 2 * config.layers + 1
    return config.matrix_parameters + (embeddings + norms) * config.width


def forward_flops_per_token(config: GptModel, *, context: int, num_tokens: int) -> int:
    """Return the floating-point operations of matrix products for one token; a training update has three times as many.

    Two for each weight of a matrix that a token meets, the head's included, and `4 context width` a layer for the
    attention, which is counted in full although half of it is masked.
    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1, with the head.
    """
    weights = config.active_matrix_parameters + num_tokens * config.width
    return 2 * weights + 4 * config.layers * context * config.width

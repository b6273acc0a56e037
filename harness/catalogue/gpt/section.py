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

"""The section of a convolutional network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from harness.catalogue.mlp.section import HiddenLayers, Norm, PlainActivation
from harness.config.fields import PositiveInt
from harness.config.slots import KnownRows
from harness.parts import model

if TYPE_CHECKING:
    from torch import nn

    from harness.config.run_config import RunConfig


@model("cnn")
class CnnModel(HiddenLayers):
    """3x3 convolutions, each followed by 2x2 max-pooling, then fully connected layers.

    With `residual: true` each entry of `channels` is a block of two convolutions that is added to its input (He et al.
    2016, arXiv:1512.03385), all but the first halve the image, and the mean over the image goes to the hidden layers.
    """

    kind: Literal["cnn"]
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    hidden: tuple[PositiveInt, ...] = (128,)
    activation: PlainActivation = "relu"
    norm: Norm = "none"
    """Of convolutions and hidden layers, before the activation. `layer` is over channels and places of an image."""

    @property
    def kinds_of_norm(self) -> set[Norm]:
        """The norms that there are, be it in convolutions alone."""
        return {self.norm} - {"none"}

    def build(self, facts: Mapping[str, Any]) -> nn.Module:
        from harness.catalogue.cnn.network import build

        return build(self, input_shape=facts["input_shape"], num_outputs=facts["num_outputs"])

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import image_problems, language_problems

        return [*image_problems(config), *language_problems(config)]

    def advice(self, config: RunConfig, *, ranks: int | None, rows: KnownRows | None) -> Iterator[str]:
        from harness.catalogue.mlp.advice import advice

        return advice(self, config, ranks=ranks)

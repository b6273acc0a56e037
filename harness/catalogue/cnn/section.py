"""The section of a convolutional network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.catalogue.mlp.section import HiddenLayers, Norm, PlainActivation
from harness.config.fields import PositiveInt


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

"""The sections that describe a network: one `kind:` each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from harness.config.fields import CountInt, Float, OneOrEach, PositiveFloat, PositiveInt, Probability, Section, WrongKey
from harness.config.gpt import GptModel

PlainActivation = Literal["relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu"]
Activation = Literal[PlainActivation, "swiglu"]
"""swiglu gates one half of a layer twice as wide with the SiLU of the other (Shazeer 2020, arXiv:2002.05202)."""
Norm = Literal["none", "batch", "layer"]
Init = Literal["auto", "kaiming", "xavier", "torch"]
"""auto is xavier for sigmoid and tanh, kaiming for the family of ReLU; torch is what torch's layers do themselves."""
SATURATING = ("sigmoid", "tanh")
"""Activations that want the init of Glorot & Bengio 2010, not that of He et al. 2015 (arXiv:1502.01852)."""

T = TypeVar("T")


class PerceptronModel(Section):
    """One linear layer with an activation (Rosenblatt 1958)."""

    kind: Literal["perceptron"]
    activation: Literal[PlainActivation, "none", "softmax"] = "none"
    init: Init = "auto"


class HiddenLayers(Section):
    """What networks with fully connected hidden layers have in common."""

    hidden: tuple[PositiveInt, ...]
    """Their widths; of `residual: true`, one block of two linear layers each."""
    norm: OneOrEach[Norm] = "none"
    """Before the activation; one for all, or a list with one for each hidden layer. `layer` is LayerNorm."""
    sync_batch_norm: bool = False
    """BatchNorm takes its statistics over all ranks; on GPUs only."""
    dropout: OneOrEach[Probability] = 0.0
    """After the activation; one for all, or a list with one for each hidden layer."""
    residual: bool = False
    """Add what a block computes to what it was given."""
    init: Init = "auto"

    @model_validator(mode="after")
    def _lists_have_one_for_each_layer(self) -> HiddenLayers:
        for name in ("norm", "dropout"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != len(self.hidden):
                raise WrongKey(
                    name,
                    f"{len(given)} entries for {len(self.hidden)} hidden layers; write one for each, or one value "
                    "without brackets for all",
                )
        return self

    @model_validator(mode="after")
    def _what_is_synchronised_is_there(self) -> HiddenLayers:
        if self.sync_batch_norm and not self.has_batch_norm:
            raise WrongKey("sync_batch_norm", "there is no BatchNorm to synchronise; use norm: batch, or leave it out")
        return self

    @property
    def kinds_of_norm(self) -> set[Norm]:
        """The norms that there are."""
        return {*self.norms} - {"none"}

    @property
    def has_batch_norm(self) -> bool:
        """Whether some layer has one."""
        return "batch" in self.kinds_of_norm

    @property
    def norms(self) -> Sequence[Norm]:
        """The norm of each hidden layer."""
        return _for_each(self.norm, len(self.hidden))

    @property
    def dropouts(self) -> Sequence[float]:
        """The dropout of each hidden layer."""
        return _for_each(self.dropout, len(self.hidden))


class MlpModel(HiddenLayers):
    """Fully connected layers: hidden ones, then one linear layer to the outputs of the task."""

    kind: Literal["mlp"]
    activation: Activation = "relu"
    output: Literal["linear", "softmax"] = "linear"
    """Classification wants it linear: its cross-entropy takes the softmax itself."""

    @model_validator(mode="after")
    def _residual_has_a_layer(self) -> MlpModel:
        if self.residual and not self.hidden:
            raise WrongKey("residual", "true wants a hidden layer, such as hidden: [64]")
        return self


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


Model = Annotated[PerceptronModel | MlpModel | CnnModel | GptModel | PretrainedModel, Field(discriminator="kind")]


def _for_each(given: T | tuple[T, ...], count: int) -> Sequence[T]:
    return given if isinstance(given, tuple) else (given,) * count

"""The sections of a perceptron and of networks of fully connected layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import model_validator

from harness.config.fields import OneOrEach, PositiveInt, Probability, WrongKey
from harness.config.slots import KnownRows, ModelSection
from harness.parts import model

if TYPE_CHECKING:
    from torch import nn

    from harness.config.run_config import RunConfig

PlainActivation = Literal["relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu"]


Activation = Literal[PlainActivation, "swiglu"]
"""swiglu gates one half of a layer twice as wide with the SiLU of the other (Shazeer 2020, arXiv:2002.05202)."""


Norm = Literal["none", "batch", "layer"]


Init = Literal["auto", "kaiming", "xavier", "torch"]
"""auto is xavier for sigmoid and tanh, kaiming for the family of ReLU; torch is what torch's layers do themselves."""


SATURATING = ("sigmoid", "tanh")
"""Activations that want the init of Glorot & Bengio 2010, not that of He et al. 2015 (arXiv:1502.01852)."""


T = TypeVar("T")


@model("perceptron")
class PerceptronModel(ModelSection):
    """One linear layer with an activation (Rosenblatt 1958)."""

    kind: Literal["perceptron"]
    activation: Literal[PlainActivation, "none", "softmax"] = "none"
    init: Init = "auto"

    def build(self, facts: Mapping[str, Any]) -> nn.Module:
        from harness.catalogue.mlp.network import build_perceptron

        return build_perceptron(self, input_shape=facts["input_shape"], num_outputs=facts["num_outputs"])

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems, output_problems

        output = output_problems(config, path="model.activation", function=self.activation, plain="none")
        return [*language_problems(config), *output]

    def advice(self, config: RunConfig, *, ranks: int | None, rows: KnownRows | None) -> Iterator[str]:
        from harness.catalogue.mlp.advice import advice

        return advice(self, config, ranks=ranks)


class HiddenLayers(ModelSection):
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
    def keys_without_meaning(self) -> set[str]:
        """Keys about something that this section does not have."""
        return set() if self.has_batch_norm else {"sync_batch_norm"}

    @property
    def wants_sync_batch_norm(self) -> bool:
        """Whether BatchNorm takes its statistics over all ranks."""
        return self.sync_batch_norm

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


@model("mlp")
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

    def build(self, facts: Mapping[str, Any]) -> nn.Module:
        from harness.catalogue.mlp.network import build

        return build(self, input_shape=facts["input_shape"], num_outputs=facts["num_outputs"])

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems, output_problems

        output = output_problems(config, path="model.output", function=self.output, plain="linear")
        return [*language_problems(config), *output]

    def advice(self, config: RunConfig, *, ranks: int | None, rows: KnownRows | None) -> Iterator[str]:
        from harness.catalogue.mlp.advice import advice

        return advice(self, config, ranks=ranks)


def _for_each(given: T | tuple[T, ...], count: int) -> Sequence[T]:
    return given if isinstance(given, tuple) else (given,) * count

"""The section of a network of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.config.fields import CountInt, Float, PositiveFloat, PositiveInt, Probability, Section
from harness.config.slots import KnownRows, ModelSection
from harness.parts import model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.config.run_config import RunConfig


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


@model("pretrained")
class PretrainedModel(ModelSection):
    """A network of `transformers` from a local directory of config.json and safetensors; no code of it is run."""

    is_of_transformers: ClassVar[bool] = True
    starts_from_nothing: ClassVar[bool] = False
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

    @property
    def extras(self) -> set[str]:
        """Extras of our distribution whose versions can change what a run computes."""
        return {"pretrained"} if self.lora is None else {"pretrained", "lora"}

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        data, path = values.get("data"), values["model"].get("path")
        own = {"text_table": path, "text": {"kind": "pretrained", "path": path}}
        if not isinstance(data, dict) or data.get("source") not in own or data.get("tokenizer") is not None:
            return values
        return {**values, "data": {**data, "tokenizer": own[data["source"]]}}

    def build(self, facts: Mapping[str, Any]) -> nn.Module:
        from harness.catalogue.pretrained.network import build

        return build(self, num_outputs=facts["num_outputs"])

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems
        from harness.catalogue.text_table.agree import pretrained_text_problems

        return [*language_problems(config), *pretrained_text_problems(config)]

    def problems_here(self, config: RunConfig, *, must_be_there: bool) -> list[str]:
        from harness.catalogue.pretrained.directory import pretrained_problems

        return pretrained_problems(config, must_be_there=must_be_there)

    def advice(self, config: RunConfig, *, ranks: int | None, rows: KnownRows | None) -> Iterator[str]:
        from harness.catalogue.gpt.advice import training_advice

        return training_advice(config)

    def write_export(self, directory: Path, tensors: Mapping[str, Tensor], described: dict[str, Any]) -> None:
        from harness.catalogue.pretrained.export import write_for_transformers

        write_for_transformers(directory, tensors, self, described)

    def as_exported(self, directory: Path) -> PretrainedModel:
        """Return the section that builds the network of an export: its weights are read, and nothing is trained."""
        trained = {"lora": None, "frozen_layers": None, "layer_lr_decay": 1.0}
        return self.model_copy(update={"path": str(directory), **trained})

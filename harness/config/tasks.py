"""The sections that describe what is learned: one `kind:` each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from harness.config.fields import Int, Section


class ClassificationTask(Section):
    """One integer label a row; cross-entropy."""

    metrics: ClassVar = ("val/loss", "val/accuracy")
    kind: Literal["classification"]
    num_classes: Annotated[Int, Field(ge=2)]


class RegressionTask(Section):
    """One or more numbers a row; squared error."""

    metrics: ClassVar = ("val/loss", "val/mse", "val/mae")
    kind: Literal["regression"]


class CausalLmTask(Section):
    """Each token of a text from those before it; cross-entropy over every token."""

    metrics: ClassVar = ("val/loss", "val/perplexity", "val/bits_per_byte")
    kind: Literal["causal_lm"]


Task = Annotated[ClassificationTask | RegressionTask | CausalLmTask, Field(discriminator="kind")]

"""The section of causal language modelling."""

from __future__ import annotations

from typing import ClassVar, Literal

from harness.config.fields import Section


class CausalLmTask(Section):
    """Each token of a text from those before it; cross-entropy over every token."""

    metrics: ClassVar = ("val/loss", "val/perplexity", "val/bits_per_byte")
    kind: Literal["causal_lm"]

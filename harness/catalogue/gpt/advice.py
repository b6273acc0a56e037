"""What `harness check` says of Transformers; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from harness.catalogue.gpt.section import GptModel
from harness.config.run_config import RunConfig

NORMS = {"layer": "LayerNorm", "rms": "RMSNorm"}


def advice(model: GptModel, config: RunConfig) -> Iterator[str]:
    """Yield what there is to say of ours."""
    yield f"norm: {NORMS[model.norm]} stands first in each branch, and after the last block (pre-norm)"
    if model.dropout:
        yield f"dropout: {model.dropout:g} of the embeddings, in the attention, and at the end of each branch"
    yield from training_advice(config)


def training_advice(config: RunConfig) -> Iterator[str]:
    """Yield what there is to say of how any is trained."""
    warmup = config.schedule.warmup_steps
    if warmup:
        yield f"warm-up: {warmup:,} updates"
    else:
        yield "WARNING: schedule.warmup_steps: a Transformer wants a warm-up, of 1 to 10 % of the updates"
    if config.clip.kind == "norm":
        yield f"clipping: norm {config.clip.max_norm:g}"
    else:
        yield "WARNING: clip.kind: a Transformer wants its gradient clipped; use kind: norm, max_norm: 1.0"

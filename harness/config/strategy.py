"""The sections that describe how an update is spread over ranks."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from harness.config.fields import CountInt, Int, PositiveFloat, PositiveInt, Section, WrongKey


class StrategySection(Section):
    """How one update is spread over ranks; it changes memory and traffic, not the arithmetic."""

    micro_batch: PositiveInt | None = None
    """Rows of one forward and backward on one rank; null is a rank's whole share of the global batch."""
    micro_batch_tokens: PositiveInt | None = None
    """Instead, for rows that say their `lengths`: as many rows as fit, their number times the longest at most this."""
    activation_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them."""
    collective_timeout_seconds: PositiveFloat = 1800.0
    """A rank that waits longer than this for the others ends the run with exit 7."""

    @model_validator(mode="after")
    def _micro_batch_has_one_measure(self) -> Self:
        if self.micro_batch is not None and self.micro_batch_tokens is not None:
            raise WrongKey(
                "micro_batch_tokens",
                f"a micro-batch has {self.micro_batch_tokens:,} tokens at most or {self.micro_batch:,} rows, not both; "
                "set strategy.micro_batch or strategy.micro_batch_tokens to null",
            )
        return self


class DdpStrategy(StrategySection):
    """Every rank holds the whole model and optimizer; gradients are summed with all-reduce."""

    kind: Literal["ddp"]
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 are autocast with fp32 weights; in fp16 the loss is scaled."""


class ZeroSection(StrategySection):
    """What the three stages of DeepSpeed's ZeRO have in common (arXiv:1910.02054)."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 are autocast with fp32 weights; in fp16 the loss is scaled."""
    reduce_bucket_elements: PositiveInt = 500_000_000
    """Gradients are reduced in buckets of this many elements."""
    overlap_communication: bool = False
    """Reduce while the backward pass goes on; costs a second bucket of memory."""
    communication_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """The type gradients are reduced in; null is that of the gradients."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the memory of the host."""
    deepspeed_overrides: str | None = None
    """A JSON file merged into DeepSpeed's configuration; it may not contradict the run."""


class ZeroStrategy(ZeroSection):
    """ZeRO-1 partitions the optimizer's state over ranks, ZeRO-2 the gradients as well."""

    kind: Literal["zero1", "zero2"]
    allgather_bucket_elements: Annotated[Int, Field(ge=2, multiple_of=2)] = 500_000_000
    """Updated weights are gathered in buckets of this many elements; DeepSpeed wants an even number."""
    multi_rank_buckets: bool = False
    """All-reduce every bucket to all ranks, as DeepSpeed does by default, instead of reducing it to its owners: moves
    half as much again, and may be quicker on NCCL."""


class Zero3Strategy(ZeroSection):
    """ZeRO-3 partitions the weights too; they are gathered layer by layer."""

    kind: Literal["zero3"]
    offload_parameters: bool = False
    """Keep the weights in the memory of the host."""
    prefetch_bucket_elements: CountInt = 50_000_000
    """How many elements are gathered ahead of their use."""
    persistence_threshold_elements: CountInt = 100_000
    """Weights smaller than this stay whole on every rank."""


Strategy = Annotated[DdpStrategy | ZeroStrategy | Zero3Strategy, Field(discriminator="kind")]

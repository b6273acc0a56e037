"""The sections that describe how long a run lasts, when it is looked at, saved and stopped."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from harness.config.fields import CountInt, Int, Mode, NonNegativeFloat, PositiveInt, RunName, Section


class RunSection(Section):
    """Which run this is, and how long it may last."""

    name: RunName
    output_root: str = "runs"
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 42
    max_epochs: PositiveInt | None = None
    """Stop after this many passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Stop after this many applied updates."""
    max_nonfinite_updates: PositiveInt = 3
    """Give up (exit 6) after this many updates in a row had a NaN or infinite gradient."""

    @model_validator(mode="after")
    def _has_a_budget(self) -> RunSection:
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("set max_epochs or max_steps (or both: the first one reached ends the run)")
        return self


class EarlyStopping(Section):
    """Stop when `metric` has not improved by more than `min_delta` for `patience_evaluations` evaluations."""

    metric: str = "val/loss"
    mode: Mode = "min"
    patience_evaluations: PositiveInt = 5
    min_delta: NonNegativeFloat = 0.0


class Evaluation(Section):
    """When the validation rows are looked at; a run's end always is one such time."""

    every_epochs: PositiveInt | None = None
    every_steps: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_interval(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.keys() & {"every_epochs", "every_steps"}:
            return {**values, "every_epochs": 1}
        return values

    @model_validator(mode="after")
    def _not_both(self) -> Evaluation:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("set every_epochs or every_steps, not both")
        return self


class Best(Section):
    """What makes an evaluation better than another."""

    metric: str
    mode: Mode


class Checkpoint(Section):
    """When the run is saved (besides every best evaluation and its end) and how many saves are kept."""

    every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None
    """Saves whose step is a multiple of this are kept for good."""
    best: Best | None = None
    """Which evaluation is BEST; without it, what early stopping watches, or else the lowest val/loss."""
    asynchronous: bool = True
    """Training waits only for a copy of the state in memory; it is written meanwhile."""
    max_failed_saves: PositiveInt = 3
    """Give up (exit 5) after this many saves in a row could not be written."""


class Diagnostics(Section):
    """Gradient norms of each parameter in the ledger; 0 is off."""

    every_steps: CountInt = 0

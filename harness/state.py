"""What changes while a run trains: plain data, no behaviour beyond counting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from harness.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

StopReason = Literal["budget", "early_stopping", "interrupted"]


class GradNorm(NamedTuple):
    """The gradient of one update, measured after the reduction over ranks and before clipping; all on the device."""

    total: Tensor
    """() global 2-norm."""
    per_parameter: Tensor
    """(P,) 2-norms, in the order of `Strategy.parameter_names`."""
    coefficient: Tensor
    """() the norm after clipping, divided by `total`; in (0, 1] if the update was applied."""
    applied: Tensor
    """() bool: false if the norm was not finite and nothing was changed."""
    loss_scale: Tensor | None
    """() what the loss was multiplied by before its gradient was taken, undone in all the others; None but in fp16."""


class UpdateReport(NamedTuple):
    """What one update knows of itself, on the device: reading it is left to the interval."""

    terms: dict[str, Tensor]
    """() each: this rank's part of the loss, and of what else is told; the parts of all ranks add up to the mean over
    every target."""
    gradient: GradNorm


@dataclass
class TrainState:
    """Where the run is: `position` counts attempted updates, `step` the applied ones; both after the last interval."""

    position: int = 0
    step: int = 0
    nonfinite_in_a_row: int = 0
    evaluated_step: int = 0
    saved_step: int = 0
    """The step whose save was begun last, unless that failed."""
    failed_saves: list[StorageError] = field(default_factory=list)
    """Why each save failed since the last one that did not."""
    save_seconds: float = 0.0
    """The longest save of this launch on this rank."""
    is_best: bool = False
    """The last evaluation was the best so far and is not saved yet."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The scores of the last evaluation: numbers, and tables of them."""
    stop_signal: str | None = None
    """The signal for which the ranks agreed to stop."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    reason: StopReason
    step: int
    metrics: dict[str, Any]
    """The scores of the last evaluation; empty if there was none."""

"""The sections that describe an update: optimizer, schedule of the rate, clipping."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.config.fields import (
    CountInt,
    Float,
    Fraction,
    Mode,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    WrongKey,
)

Betas = tuple[Probability, Probability]


class AdamWOptim(Section):
    """Adam with decoupled weight decay; biases and norms are not decayed."""

    kind: Literal["adamw"]
    peak_lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.01
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class AdamOptim(Section):
    """Adam without weight decay."""

    kind: Literal["adam"]
    peak_lr: PositiveFloat
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class SgdOptim(Section):
    """Stochastic gradient descent; biases and norms are not decayed."""

    kind: Literal["sgd"]
    peak_lr: PositiveFloat
    momentum: Probability = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SgdOptim:
        if self.nesterov and self.momentum == 0:
            raise WrongKey("nesterov", "true wants a momentum above 0, such as momentum: 0.9")
        return self


class AdafactorOptim(Section):
    """Second moments by row and column, next to no memory; biases and norms are not decayed (ddp only).

    A step is at most 1 / sqrt(update), relative to the size of the weights (Shazeer & Stern 2018, arXiv:1804.04235).
    """

    kind: Literal["adafactor"]
    peak_lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0
    beta2_decay: Annotated[Float, Field(le=0)] = -0.8
    """The second moment of update t keeps 1 - t ** beta2_decay of what it was."""
    clip_threshold: Annotated[Float, Field(ge=1)] = 1.0
    """Largest root mean square of an update, before the rate."""


class MuonOptim(Section):
    """Orthogonalised momentum for hidden weight matrices, AdamW for everything else (ddp only).

    Matrices move as far as AdamW would move them, so one rate serves both (Jordan et al. 2024; Liu et al. 2025,
    arXiv:2502.16982). Embeddings, the output layer, kernels of convolutions, stacks of experts, biases and norms are
    AdamW's.
    """

    kind: Literal["muon"]
    peak_lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.1
    momentum: Probability = 0.95
    nesterov: bool = True
    betas: Betas = (0.9, 0.999)
    """Of AdamW."""
    eps: PositiveFloat = 1e-8
    """Of AdamW."""


Optim = Annotated[AdamWOptim | AdamOptim | SgdOptim | AdafactorOptim | MuonOptim, Field(discriminator="kind")]


class ScheduleSection(Section):
    """Linear warm-up that every schedule can have; formulas are in schedule.py."""

    warmup_steps: CountInt = 0

    def length(self, budget: int) -> int:
        """Return how many updates its shape is spread over, when the run has `budget` updates."""
        return budget


class ConstantSchedule(ScheduleSection):
    """The peak rate throughout."""

    kind: Literal["constant"]


class DecaySchedule(ScheduleSection):
    """What falls to a fraction of the peak by the end of the run's budget, or of `total_steps`, and stays there."""

    total_steps: PositiveInt | None = None
    final_lr_fraction: Fraction = 0.0

    def length(self, budget: int) -> int:
        """Return `total_steps`, or the budget."""
        return self.total_steps or budget


class LinearSchedule(DecaySchedule):
    """Linear decay to a fraction of the peak."""

    kind: Literal["linear"]


class CosineSchedule(DecaySchedule):
    """Half a cosine down to a fraction of the peak."""

    kind: Literal["cosine"]


class InverseSqrtSchedule(ScheduleSection):
    """Decay with the inverse square root of the update."""

    kind: Literal["inverse_sqrt"]


class WsdSchedule(DecaySchedule):
    """Warm-up, stable, then linear decay over the last `decay_steps`."""

    kind: Literal["wsd"]
    decay_steps: PositiveInt


class StepSchedule(ScheduleSection):
    """The rate is multiplied by `factor` after every `every_steps` updates, or the updates of `every_epochs` epochs."""

    kind: Literal["step"]
    every_steps: PositiveInt | None = None
    every_epochs: PositiveInt | None = None
    factor: Annotated[Float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _one_interval(self) -> StepSchedule:
        if (self.every_steps is None) == (self.every_epochs is None):
            found = "neither is" if self.every_steps is None else "both are"
            raise ValueError(f"set every_steps or every_epochs, exactly one of them; {found} set")
        return self


class PlateauSchedule(ScheduleSection):
    """The rate is multiplied by `factor` when a metric stops improving."""

    kind: Literal["plateau"]
    metric: str = "val/loss"
    mode: Mode = "min"
    factor: Annotated[Float, Field(gt=0, lt=1)] = 0.1
    patience_evaluations: CountInt = 5
    min_delta: NonNegativeFloat = 0.0
    final_lr_fraction: Fraction = 0.0
    """The rate is never brought below this fraction of the peak."""


Schedule = Annotated[
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | InverseSqrtSchedule
    | WsdSchedule
    | StepSchedule
    | PlateauSchedule,
    Field(discriminator="kind"),
]


class NormClip(Section):
    """Scale the gradient down to a global 2-norm, after it was reduced over ranks."""

    kind: Literal["norm"]
    max_norm: PositiveFloat


class ValueClip(Section):
    """Limit every element of the gradient, after it was reduced over ranks."""

    kind: Literal["value"]
    max_value: PositiveFloat


class NoClip(Section):
    """Leave gradients alone; their norm is still measured."""

    kind: Literal["none"]


class GradientNoise(Section):
    """Add noise to the clipped gradient, of variance eta / (1 + t)^gamma in update t = 0, 1 ... (arXiv:1511.06807)."""

    eta: PositiveFloat
    gamma: NonNegativeFloat = 0.55


class Ema(Section):
    """Keep an exponential moving average of the weights, which is evaluated and exported in their place."""

    decay: Annotated[Float, Field(gt=0, lt=1)]
    """The weights of an update count this many times those of the next; 1 / (1 - decay) updates are looked back on."""


Clip = Annotated[NormClip | ValueClip | NoClip, Field(discriminator="kind")]

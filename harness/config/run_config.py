"""RunConfig: everything that differs between runs, as frozen pydantic models.

Units stand in the names. A section with variants has a literal `kind:` (`source:` for data); which kinds of models,
data and tasks there are the registry says (parts.py), or the Parts that are the validation context. Defaults live here
and nowhere else; what follows from other numbers (accumulation, steps an epoch) is derived, never configured.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationInfo, WithJsonSchema, model_validator

from harness.config.data import DataSection
from harness.config.fields import Section
from harness.config.run import Best, Checkpoint, Diagnostics, EarlyStopping, Evaluation, RunSection
from harness.config.slots import ModelSection, TaskSection
from harness.config.strategy import DdpStrategy, Strategy
from harness.config.tracking import Tracking
from harness.config.training import Clip, ConstantSchedule, Ema, GradientNoise, NoClip, Optim, Schedule
from harness.parts import Parts, registered


def _of_its_kind(slot: str, value: Any, info: ValidationInfo) -> Any:
    return _known(info).validated(slot, value)


def _known(info: ValidationInfo) -> Parts:
    return info.context if isinstance(info.context, Parts) else registered()


Model = Annotated[
    SerializeAsAny[ModelSection], BeforeValidator(partial(_of_its_kind, "model")), WithJsonSchema({"slot": "model"})
]
Data = Annotated[
    SerializeAsAny[DataSection], BeforeValidator(partial(_of_its_kind, "data")), WithJsonSchema({"slot": "data"})
]
Task = Annotated[
    SerializeAsAny[TaskSection], BeforeValidator(partial(_of_its_kind, "task")), WithJsonSchema({"slot": "task"})
]


class RunConfig(Section):
    """One training run."""

    use: tuple[str, ...] = ()
    """Files and installed packages that bring kinds of their own, see docs/parts.md."""
    run: RunSection
    model: Model
    data: Data
    task: Task
    optim: Optim
    schedule: Schedule = ConstantSchedule(kind="constant")
    clip: Clip = NoClip(kind="none")
    gradient_noise: GradientNoise | None = None
    ema: Ema | None = None
    early_stopping: EarlyStopping | None = None
    evaluation: Evaluation = Evaluation(every_epochs=1)
    strategy: Strategy = DdpStrategy(kind="ddp")
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    diagnostics: Diagnostics = Diagnostics()

    @model_validator(mode="before")
    @classmethod
    def _model_completes_others(cls, values: Any, info: ValidationInfo) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        kind = model.get("kind") if isinstance(model, dict) else None
        part = _known(info).of("model").get(kind) if isinstance(kind, str) else None
        return part.section.completed(values) if part else values

    @property
    def best_rule(self) -> Best:
        """What makes an evaluation better than another, whatever else stops the run."""
        stopping = self.early_stopping or EarlyStopping()
        return self.checkpoint.best or Best(metric=stopping.metric, mode=stopping.mode)

    @property
    def run_directory(self) -> Path:
        """Where everything of this run lies."""
        return Path(self.run.output_root) / self.run.name

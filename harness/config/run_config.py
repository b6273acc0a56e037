"""RunConfig: everything that differs between runs, as frozen pydantic models.

Units stand in the names. A section with variants has a literal `kind:` (`source:` for data). Defaults live here
and nowhere else; what follows from other numbers (accumulation, steps an epoch) is derived, never configured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from harness.config.fields import Section
from harness.config.kinds import Data, Model, Task
from harness.config.run import Best, Checkpoint, Diagnostics, EarlyStopping, Evaluation, RunSection
from harness.config.strategy import DdpStrategy, Strategy
from harness.config.tracking import Tracking
from harness.config.training import Clip, ConstantSchedule, Ema, GradientNoise, NoClip, Optim, Schedule


class RunConfig(Section):
    """One training run."""

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
    def _tokenizer_is_that_of_the_model(cls, values: Any) -> Any:
        model, data = (values.get(name) for name in ("model", "data")) if isinstance(values, dict) else (None, None)
        if not (isinstance(model, dict) and isinstance(data, dict)):
            return values
        path = model.get("path")
        own = {"text_table": path, "text": {"kind": "pretrained", "path": path}}
        if model.get("kind") != "pretrained" or data.get("source") not in own or data.get("tokenizer") is not None:
            return values
        return {**values, "data": {**data, "tokenizer": own[data["source"]]}}

    @property
    def best_rule(self) -> Best:
        """What makes an evaluation better than another, whatever else stops the run."""
        stopping = self.early_stopping or EarlyStopping()
        return self.checkpoint.best or Best(metric=stopping.metric, mode=stopping.mode)

    @property
    def run_directory(self) -> Path:
        """Where everything of this run lies."""
        return Path(self.run.output_root) / self.run.name

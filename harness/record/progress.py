"""trainer.json: what a checkpoint knows besides tensors. Needs no torch.

Whoever made a checkpoint can seal it, so nothing that stands here is used before `check_trainer` has looked at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from harness.config.fields import RUN_ID, Mode
from harness.config.problems import problem_sentence, schema_of, shown
from harness.errors import CheckpointError
from harness.record.manifest import MAX_COUNT, TRAINER

_MAX_TOLD = 3

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _are_scores(metrics: dict[str, Any]) -> dict[str, Any]:
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float | list):
            raise ValueError(f"{shown(name)} is neither a number nor a table of numbers")
    return metrics


def _is_text(text: str) -> str:
    text.encode()  # JSON can hold halves of characters, which no file can
    return text


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class _Patience(_Part):
    """What stopping.Patience holds."""

    metric: str
    mode: Mode
    min_delta: Finite
    best_step: Count | None
    best: Finite | None
    evaluations_without_improvement: Count

    @field_validator("best")
    @classmethod
    def _has_its_step(cls, best: float | None, others: ValidationInfo) -> float | None:
        if (best is None) != (others.data.get("best_step") is None):
            raise ValueError("best and best_step are both there, or both null")
        return best


class _Judge(_Part):
    score: _Patience
    patience: _Patience | None = None
    rate: _Patience | None
    lr_factor: Annotated[float, Field(ge=0, le=1)]


class _LossScale(_Part):
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    applied_in_a_row: Count


class _Group(_Part):
    """The settings of a parameter group are compared, not used."""

    model_config = ConfigDict(extra="allow")

    parameters: Annotated[list[str], FailFast()]


class _Rows(_Part):
    """What is compared of the rows of a Dataset."""

    length: Count
    digest: str | None
    rows: dict[Annotated[str, Field(pattern=r"^[0-9]{1,18}$")], str]


class Trainer(_Part):
    """What `resume.save` writes; a later version may add to it."""

    model_config = ConfigDict(extra="allow")

    harness: str
    position: Count
    step: Count
    evaluated_step: Count
    samples_seen: Count
    nonfinite_in_a_row: Count
    metrics: Annotated[dict[str, Any], AfterValidator(_are_scores)]
    judge: _Judge
    ledger_bytes: Count
    data_digest: str
    order: dict[str, Any]
    world_size: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    strategy: str
    optimizer: Annotated[list[_Group], FailFast()]
    loss_scale: _LossScale | None
    input_shape: Annotated[list[Count], FailFast()]
    num_outputs: Count
    preprocessing: dict[str, Any]
    tokenizer: Annotated[str, AfterValidator(_is_text)] | None
    best_step: Count | None = None
    schedule_updates: Count | None = None
    rows: dict[str, _Rows] = {}
    run_id: Annotated[str, Field(pattern=f"^(?:{RUN_ID.pattern})$")] | None = None

    @field_validator("step", "evaluated_step")
    @classmethod
    def _comes_after(cls, step: int, others: ValidationInfo) -> int:
        before = {"step": "position", "evaluated_step": "step"}[str(others.field_name)]
        if step > others.data.get(before, step):
            raise ValueError(f"{before} is {others.data[before]:,}, and cannot be less")
        return step


def trainer_problems(trainer: Mapping[str, Any], *, step: int) -> list[str]:
    """Return `field: what is there, what is wanted` for all that no run of ours has written.

    Args:
        step: of the checkpoint, by its COMMIT.json.
    """
    try:
        Trainer.model_validate(trainer)
    except ValidationError as error:
        return [problem_sentence(details, schema_of(Trainer)) for details in error.errors(include_url=False)]
    return [] if trainer["step"] == step else [f"step: {trainer['step']:,} is not {step:,}, that of the checkpoint"]


def check_trainer(trainer: Mapping[str, Any], directory: Path, *, step: int) -> None:
    """Refuse a checkpoint whose trainer.json no run of ours has written.

    Raises:
        CheckpointError: names the fields.
    """
    problems = trainer_problems(trainer, step=step)
    if problems:
        more = f"; and {len(problems) - _MAX_TOLD} more" if len(problems) > _MAX_TOLD else ""
        raise CheckpointError(
            f"{directory / TRAINER} is not what this harness writes, though its digest is the one in the commit: "
            f"{'; '.join(problems[:_MAX_TOLD])}{more}. Take another checkpoint"
        )

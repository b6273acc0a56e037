"""The design checklist: each mismatch of the chapter is a warning that says what to type, and its remedy is none."""

from __future__ import annotations

from typing import Any

import pytest

from harness.config import RunConfig
from launch.checklist import checklist

CONFIG: dict[str, Any] = {
    "run": {"name": "a", "max_epochs": 30},
    "model": {"kind": "mlp", "hidden": [64, 32]},
    "data": {"source": "mnist_5k", "global_batch": 64},
    "task": {"kind": "classification", "num_classes": 10},
    "optim": {"kind": "adamw", "peak_lr": 1e-3},
    "early_stopping": {"metric": "val/loss", "patience_evaluations": 5},
}


def warnings_of(*, ranks: int | None = 2, **changes: Any) -> list[str]:
    values = {**CONFIG, **{name: {**CONFIG.get(name, {}), **keys} for name, keys in changes.items()}}
    lines = checklist(RunConfig.model_validate(values), ranks=ranks)
    return [line.removeprefix("WARNING: ") for line in lines if line.startswith("WARNING: ")]


def test_a_sound_configuration_has_no_warning_and_says_what_was_looked_at() -> None:
    assert warnings_of() == []
    lines = checklist(RunConfig.model_validate(CONFIG), ranks=2)
    assert [line.partition(":")[0] for line in lines] == ["init", "patience", "imbalance"]


@pytest.mark.parametrize(
    ("changes", "words", "remedy"),
    [
        ({"model": {"init": "xavier"}}, "model.init: xavier does not match relu", {"model": {"init": "kaiming"}}),
        (
            {"model": {"activation": "tanh", "init": "kaiming"}},
            "model.init: kaiming does not match tanh, which wants xavier",
            {"model": {"activation": "tanh", "init": "auto"}},
        ),
        ({"model": {"init": "torch"}}, "model.init: torch's own weights", {"model": {"init": "auto"}}),
        (
            {"model": {"hidden": [64] * 11, "activation": "sigmoid"}},
            "model.activation: gradients vanish in 11 layers of sigmoid",
            {"model": {"hidden": [64] * 11, "norm": "batch"}},
        ),
        (
            {"model": {"hidden": [64] * 11}},
            "model.norm: 11 layers without norms or shortcuts",
            {"model": {"hidden": [64] * 11, "residual": True}},
        ),
        ({"model": {"dropout": 0.7}}, "model.dropout: 0.7 drops more", {"model": {"dropout": 0.5}}),
        (
            {"model": {"norm": "batch"}, "data": {"global_batch": 16}},
            "model.norm: BatchNorm sees 8 rows at a time (16 over 2 ranks)",
            {"model": {"norm": "layer"}, "data": {"global_batch": 16}},
        ),
        (
            {"early_stopping": {"metric": "val/accuracy"}},
            "early_stopping.mode: val/accuracy is better the higher it is; use mode: max",
            {"early_stopping": {"metric": "val/accuracy", "mode": "max"}},
        ),
        (
            {"early_stopping": {"mode": "max"}},
            "early_stopping.mode: val/loss is better the lower it is; use mode: min",
            {"early_stopping": {"mode": "min"}},
        ),
        (
            {"run": {"max_epochs": 5}},
            "early_stopping.patience_evaluations: 5 evaluations are as long as the run of 5 epochs",
            {"run": {"max_epochs": 6}},
        ),
        (
            {"run": {"max_steps": 600}, "ema": {"decay": 0.999}},
            "ema.decay: 0.999 looks back on 1,000 updates, most of the run's 600",
            {"run": {"max_steps": 600}, "ema": {"decay": 0.98}},
        ),
        (
            {
                "task": {"class_weights": "balanced"},
                "early_stopping": {"metric": "val/accuracy", "mode": "max"},
            },
            "early_stopping.metric: accuracy hides rare classes",
            {"task": {"class_weights": "balanced"}, "early_stopping": {"metric": "val/macro_f1", "mode": "max"}},
        ),
    ],
)
def test_a_mismatch_is_one_warning_and_its_remedy_none(
    changes: dict[str, Any], words: str, remedy: dict[str, Any]
) -> None:
    (warning,) = warnings_of(**changes)
    assert warning.startswith(words)
    assert warnings_of(**remedy) == []


def test_without_a_number_of_ranks_nothing_is_said_of_their_share() -> None:
    assert warnings_of(ranks=None, model={"norm": "batch"}, data={"global_batch": 4}) == []


def test_a_transformer_wants_a_warm_up_and_clipping() -> None:
    config = RunConfig.model_validate({**CONFIG, "schedule": {"kind": "cosine", "warmup_steps": 5}})
    for kind in ("gpt", "pretrained"):
        model = config.model.model_copy(update={"kind": kind})  # by the name alone
        bare = config.model_copy(
            update={"model": model, "schedule": config.schedule.model_copy(update={"warmup_steps": 0})}
        )
        found = [line for line in checklist(bare, ranks=1) if line.startswith("WARNING")]
        assert [line.split(":")[1].strip() for line in found] == ["schedule.warmup_steps", "clip.kind"]
        clip = RunConfig.model_validate({**CONFIG, "clip": {"kind": "norm", "max_norm": 1.0}}).clip
        sound = config.model_copy(update={"model": model, "clip": clip})
        assert not [line for line in checklist(sound, ranks=1) if line.startswith("WARNING")]


def test_what_is_better_when_higher_is_what_the_tasks_have() -> None:
    from launch.checklist import HIGHER_IS_BETTER

    two_classes = {"kind": "classification", "num_classes": 2}
    config = RunConfig.model_validate({**CONFIG, "task": two_classes})
    assert {*config.task.metrics, "val/r2"} == {"val/loss", *HIGHER_IS_BETTER}

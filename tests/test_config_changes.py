"""What may change when a run is resumed, and what its owner is told about the rest."""

from __future__ import annotations

from typing import Any

import pytest

from harness.config.changes import VERDICTS, Change, Changes, compare
from harness.config.run_config import RunConfig
from harness.parts import registered

STORED: dict[str, Any] = {
    "run": {"name": "digits", "max_epochs": 2},
    "model": {"kind": "cnn", "channels": [8, 16]},
    "data": {"source": "mnist_5k", "global_batch": 64},
    "task": {"kind": "classification", "num_classes": 10},
    "optim": {"kind": "adamw", "peak_lr": 1e-3},
    "schedule": {"kind": "cosine", "warmup_steps": 5},
    "early_stopping": {"patience_evaluations": 3},
}


def changes_of(section: str, **keys: Any) -> Changes:
    given = {**STORED, section: {**STORED.get(section, {}), **keys}}
    return compare(RunConfig.model_validate(STORED), RunConfig.model_validate(given))


def test_equal_configurations_have_no_changes() -> None:
    assert changes_of("run") == Changes(refused=(), noticed=(), allowed=())


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("run", {"seed": 7}),
        ("model", {"channels": [8, 32]}),
        ("model", {"dropout": 0.5}),
        ("data", {"global_batch": 128}),
        ("data", {"validation_fraction": 0.3}),
        ("data", {"sampling": "by_length"}),
        ("task", {"num_classes": 11}),
        ("optim", {"kind": "adam"}),
    ],
)
def test_what_the_weights_and_the_order_of_rows_were_made_with_may_not_change(
    section: str, keys: dict[str, Any]
) -> None:
    assert {f"{section}.{key}" for key in keys} <= {change.path for change in changes_of(section, **keys).refused}


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("run", {"name": "letters"}),  # the directory was renamed with it
        ("optim", {"peak_lr": 1e-4}),
        ("optim", {"weight_decay": 0.1, "betas": [0.9, 0.95]}),
        ("schedule", {"warmup_steps": 6}),
        ("clip", {"kind": "norm", "max_norm": 1.0}),
        ("early_stopping", {"patience_evaluations": 4}),
    ],
)
def test_rates_schedule_clip_and_stopping_change_with_a_notice(section: str, keys: dict[str, Any]) -> None:
    changes = changes_of(section, **keys)
    assert {change.path for change in changes.noticed} == {f"{section}.{key}" for key in keys}
    assert not changes.refused + changes.allowed


@pytest.mark.parametrize(
    "judge",
    [
        {"early_stopping": {"metric": "val/f1", "mode": "max"}},
        {"checkpoint": {"best": {"metric": "val/auc", "mode": "max"}}},
        {"schedule": {"kind": "plateau", "metric": "val/recall", "mode": "max"}},
        {},
    ],
)
def test_the_class_that_is_scored_changes_with_a_notice_unless_evaluations_are_compared_by_it(
    judge: dict[str, Any],
) -> None:
    stored, given = (
        RunConfig.model_validate({**STORED, **judge, "task": {**STORED["task"], "positive_class": number}})
        for number in (1, 2)
    )
    found = compare(stored, given)
    (change,) = found.refused if judge else found.noticed
    assert change.path == "task.positive_class"
    assert len(found.refused + found.noticed + found.allowed) == 1


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("run", {"max_epochs": 3, "max_steps": 1000, "max_nonfinite_updates": 9, "output_root": "elsewhere"}),
        ("evaluation", {"every_epochs": 2}),
        ("strategy", {"kind": "ddp", "micro_batch": 8}),
        ("strategy", {"kind": "ddp", "micro_batch_tokens": 4096}),
        ("checkpoint", {"every_steps": 10, "keep_last": 5}),
        ("tracking", {"log_every_steps": 1}),
        ("diagnostics", {"every_steps": 1}),
    ],
)
def test_budgets_intervals_tracking_and_strategy_change_freely(section: str, keys: dict[str, Any]) -> None:
    changes = changes_of(section, **keys)
    changed = {path for path, value in keys.items() if (section, path, value) != ("strategy", "kind", "ddp")}
    assert {change.path for change in changes.allowed} == {f"{section}.{key}" for key in changed}
    assert not changes.refused + changes.noticed


def test_a_change_of_kind_lists_the_keys_that_only_one_side_has() -> None:
    assert changes_of("model", channels=[8, 16, 32]).refused == (
        Change("model.channels", stored=[8, 16], given=[8, 16, 32]),
    )
    given = {**STORED, "model": {"kind": "mlp", "hidden": [128]}}
    changes = compare(RunConfig.model_validate(STORED), RunConfig.model_validate(given))
    assert changes.refused == (
        Change("model.kind", stored="cnn", given="mlp"),
        Change("model.channels", stored=[8, 16], given=None),
        Change("model.output", stored=None, given="linear"),
    )


def test_a_section_switched_off_is_noticed_key_by_key() -> None:
    given = RunConfig.model_validate({**STORED, "early_stopping": None})
    changes = compare(RunConfig.model_validate(STORED), given)
    assert Change("early_stopping.patience_evaluations", stored=3, given=None) in changes.noticed
    assert not changes.refused + changes.allowed


def test_the_refusal_is_a_diff_that_says_what_to_do() -> None:
    given = {**STORED, "run": {"name": "digits", "seed": 1, "max_steps": 9}, "optim": {"kind": "sgd", "peak_lr": 1}}
    changes = compare(RunConfig.model_validate(STORED), RunConfig.model_validate(given))
    assert changes.refusal_message().split("\n") == [
        "2 keys cannot change on resume; use the stored value, or another run.name for a new run",
        "  run.seed: stored 42, given 1",
        '  optim.kind: stored "adamw", given "sgd"',
    ]


def test_every_rule_is_about_a_key_that_exists() -> None:
    properties = RunConfig.model_json_schema()["properties"]
    assert {path.split(".")[0] for path in VERDICTS if path} <= set(properties)
    stored = RunConfig.model_validate(STORED).model_dump()
    assert all(key in stored[section] for section, _, key in (path.partition(".") for path in VERDICTS) if key)
    for section in registered().all_sections():
        assert set(section.resume_verdicts) <= set(section.model_fields)

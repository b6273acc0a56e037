"""The design checklist: each mismatch of the chapter is a warning that says what to type, and its remedy is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.catalogue.cnn.section import CnnModel
from harness.catalogue.mlp.advice import num_layers
from harness.catalogue.mlp.section import MlpModel
from harness.config.io import load_config
from harness.config.run_config import RunConfig
from harness.config.slots import KnownRows
from harness.launch.checklist import checklist
from tests.sections import build_model, known_rows, parsed

CONFIGS = Path(__file__).parents[1] / "configs"

CONFIG: dict[str, Any] = {
    "run": {"name": "a", "max_epochs": 30},
    "model": {"kind": "mlp", "hidden": [64, 32]},
    "data": {"source": "mnist_5k", "global_batch": 64},
    "task": {"kind": "classification", "num_classes": 10},
    "optim": {"kind": "adamw", "peak_lr": 1e-3},
    "early_stopping": {"metric": "val/loss", "patience_evaluations": 5},
}


def lines_of(*, ranks: int | None = 2, rows: KnownRows | None = None, **changes: Any) -> list[str]:
    changed = {name: keys and {**CONFIG.get(name, {}), **keys} for name, keys in changes.items()}
    return checklist(RunConfig.model_validate({**CONFIG, **changed}), ranks=ranks, rows=rows)


def warnings_of(*, ranks: int | None = 2, rows: KnownRows | None = None, **changes: Any) -> list[str]:
    lines = lines_of(ranks=ranks, rows=rows, **changes)
    return [line.removeprefix("WARNING: ") for line in lines if line.startswith("WARNING: ")]


NO_PATIENCE = "patience: none; the run uses up its budget, and BEST is the lowest val/loss"
UNKNOWN = "imbalance: every row counts alike; if a class is rare, use task.class_weights=balanced and val/macro_f1"
WHAT_IS_SAID = {
    "default_mlp": [
        "init: kaiming for relu",
        "patience: 8 evaluations without a better val/average_precision",
        UNKNOWN,
    ],
    "digits_mlp": ["init: kaiming for relu", NO_PATIENCE, UNKNOWN],
    "fraud_mlp": [
        "init: kaiming for relu",
        "norm: BatchNorm stands before the activation",
        "dropout: 0, 0.3, 0.3 after the activation of the hidden layers",
        "patience: 8 evaluations without a better val/f1",
        "imbalance: classes are weighted in the loss",
    ],
    "krk_relu12": [
        "init: kaiming for relu",
        "depth: 12 layers with norms",
        "norm: BatchNorm stands before the activation",
        NO_PATIENCE,
        UNKNOWN,
    ],
    "krk_residual12": [
        "init: kaiming for relu",
        "depth: 12 layers with norms and shortcuts",
        "norm: LayerNorm stands first in each block, and after the last one (pre-norm)",
        NO_PATIENCE,
        UNKNOWN,
    ],
    "krk_sigmoid12": [
        "WARNING: model.init: torch's own weights are smaller than xavier, which sigmoid wants; use auto",
        "WARNING: model.activation: gradients vanish in 12 layers of sigmoid; use relu with norm=batch, or "
        "residual=true",
        NO_PATIENCE,
        UNKNOWN,
    ],
    "mnist_cnn": [
        "init: kaiming for relu",
        "dropout: 0.25 after the activation of the fully connected layers",
        "patience: 5 evaluations without a better val/loss",
        "imbalance: little; the rarest, 0, has 10.0 % of the rows",
    ],
    "reviews_minilm": ["warm-up: 20 updates", "clipping: norm 1", NO_PATIENCE, UNKNOWN],
    "shakespeare_gpt": [
        "norm: LayerNorm stands first in each branch, and after the last block (pre-norm)",
        "warm-up: 50 updates",
        "clipping: norm 1",
        NO_PATIENCE,
    ],
    "shakespeare_gpt_20min": [
        "norm: LayerNorm stands first in each branch, and after the last block (pre-norm)",
        "dropout: 0.1 of the embeddings, in the attention, and at the end of each branch",
        "warm-up: 100 updates",
        "clipping: norm 1",
        NO_PATIENCE,
    ],
}
"""Line for line, without the data: only what does not learn on purpose is warned of."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_said_of_each_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no data was prepared
    config = load_config(path).config
    assert checklist(config, ranks=2, rows=known_rows(config)) == WHAT_IS_SAID[path.stem]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"init": "kaiming"}, ["init: kaiming for relu"]),
        ({"activation": "tanh", "init": "xavier"}, ["init: xavier for tanh"]),
        ({"dropout": 0.2}, ["init: kaiming for relu", "dropout: 0.2 after the activation of the hidden layers"]),
        ({"norm": "layer"}, ["init: kaiming for relu", "norm: LayerNorm stands before the activation"]),
        (
            {"norm": ["batch", "layer"], "dropout": [0.2, 0.0]},
            [
                "init: kaiming for relu",
                "norm: BatchNorm and LayerNorm stand before the activation",
                "dropout: 0.2, 0 after the activation of the hidden layers",
            ],
        ),
        (
            {"norm": "batch", "residual": True, "dropout": [0.0, 0.2]},
            [
                "init: kaiming for relu",
                "norm: BatchNorm stands first in each block, and after the last one (pre-norm)",
                "dropout: 0, 0.2 within each block, between its two layers",
                "dropout: some stands before a later BatchNorm, whose statistics then differ between training and "
                "evaluation (Li et al. 2019, arXiv:1801.05134); dropping only after the last norm avoids it",
            ],
        ),
        (
            {"kind": "cnn", "channels": [4, 4], "residual": True, "norm": "batch"},
            [
                "init: kaiming for relu",
                "depth: 8 layers with norms and shortcuts",
                "norm: BatchNorm stands after each convolution, before the activation and the addition",
            ],
        ),
        ({"hidden": [64] * 6, "residual": True}, ["init: kaiming for relu", "depth: 14 layers with shortcuts"]),
        (
            {"hidden": [], "norm": "batch"},
            ["WARNING: model.norm: there is no hidden layer to have it; list some in model.hidden, or use none"],
        ),
        (
            {"kind": "cnn", "channels": [4], "hidden": [], "norm": "layer", "dropout": 0.2},
            [
                "init: kaiming for relu",
                "norm: LayerNorm stands before the activation",
                "WARNING: model.dropout: there is no hidden layer to drop from; list some in model.hidden, or use 0",
            ],
        ),
    ],
)
def test_what_is_said_of_a_network_names_the_place_of_its_norms_and_dropout(
    model: dict[str, Any], said: list[str]
) -> None:
    *lines, patience, imbalance = lines_of(model=model)
    assert lines == said
    assert patience.startswith("patience: ")
    assert imbalance.startswith("imbalance: ")


@pytest.mark.parametrize(
    "model",
    [
        MlpModel(kind="mlp", hidden=(4,) * 11),
        MlpModel(kind="mlp", hidden=(4,) * 5, residual=True),
        CnnModel(kind="cnn", channels=(2, 3), hidden=(4,)),
        CnnModel(kind="cnn", channels=(2, 2), hidden=(4, 4), residual=True),
    ],
    ids=["mlp", "residual mlp", "cnn", "residual cnn"],
)
def test_the_layers_that_are_counted_are_those_of_the_network(model: MlpModel | CnnModel) -> None:
    shape = (1, 8, 8) if isinstance(model, CnnModel) else (7,)
    network = build_model(model, input_shape=shape, num_outputs=3)
    with_weights = {
        name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    on_the_way = [name for name in with_weights if "shortcut" not in name]
    assert num_layers(model) == len(on_the_way)


def test_what_is_asked_of_several_evaluations_and_updates_is_known_with_the_rows() -> None:
    rows = KnownRows(updates_per_epoch=10, classes={})
    every_50 = {"evaluation": {"every_steps": 50}}
    for known, num_warnings in ((None, 0), (rows, 1)):  # 30 epochs of 10 updates have 6 evaluations
        assert len(warnings_of(rows=known, **every_50)) == num_warnings
        assert len(warnings_of(rows=known, ema={"decay": 0.995})) == num_warnings  # 200 of 300 updates
    assert warnings_of(rows=rows, evaluation={"every_steps": 30}) == []
    assert warnings_of(rows=rows, ema={"decay": 0.99}) == []
    steps = {"run": {"max_steps": 300, "max_epochs": None}}
    assert len(warnings_of(**steps, **every_50)) == 1
    assert warnings_of(**steps, evaluation={"every_steps": 30}) == []
    assert len(warnings_of(rows=rows, **{"run": {"max_steps": 60, "max_epochs": None}})) == 1  # 6 epochs


@pytest.mark.parametrize(
    ("rows", "changes", "line"),
    [
        ({"no": 97, "yes": 3}, {}, "imbalance: every row counts alike; the rarest, yes, has 3.0 % of the rows; if it"),
        ({"no": 55, "yes": 45}, {}, "imbalance: little; the rarest, yes, has 45.0 % of the rows"),
        (
            {"no": 97, "yes": 3},
            {"task": {"class_weights": "balanced"}},
            "imbalance: classes are weighted in the loss; the rarest, yes, has 3.0 % of the rows",
        ),
        (
            {"no": 97, "yes": 3},
            {"data": {"sampling": "balanced"}},
            "imbalance: rows of every class are drawn equally often; the rarest, yes, has 3.0 % of the rows",
        ),
        ({}, {"data": {"sampling": "balanced"}}, "imbalance: rows of every class are drawn equally often"),
    ],
)
def test_the_rarest_class_is_named_where_the_rows_are_known(
    rows: dict[str, int], changes: dict[str, Any], line: str
) -> None:
    assert lines_of(rows=KnownRows(10, rows), **changes)[-1].startswith(line)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"schedule": {"kind": "plateau", "patience_evaluations": 3}},
            "plateau: the rate falls after more than 3 evaluations without a better val/loss",
        ),
        (
            {"ema": {"decay": 0.98}},
            "average: the weights of the last 50 updates or so are what is evaluated and exported",
        ),
        (
            {"model": {"output": "softmax"}},
            "output: softmax; the targets have to be shares of a whole, which add up to 1",
        ),
    ],
)
def test_what_is_said_where_no_example_has_it(changes: dict[str, Any], line: str) -> None:
    assert line in lines_of(**changes)


def test_a_network_is_deep_from_seven_layers_on() -> None:
    assert warnings_of(model={"hidden": [64] * 5}) == []
    assert len(warnings_of(model={"hidden": [64] * 6})) == 1


def test_the_average_of_a_short_run_is_given_a_decay_that_can_be() -> None:
    (warning,) = warnings_of(run={"max_epochs": None, "max_steps": 5}, early_stopping=None, ema={"decay": 0.9})
    assert warning.endswith("use 0.5 or so")


def test_accuracy_hides_a_class_that_is_known_to_be_rare() -> None:
    stopping = {"early_stopping": {"metric": "val/accuracy", "mode": "max"}}
    for yes, num_warnings in ((3, 1), (45, 0)):
        assert len(warnings_of(rows=KnownRows(10, {"no": 97, "yes": yes}), **stopping)) == num_warnings


@pytest.mark.parametrize("content", ["[]", "{", '{"files": {"rows.parquet": 3}}', '{"files": {"rows.parquet": {}}}'])
def test_a_file_beside_a_table_that_is_no_note_tells_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.parquet"
    data = {"source": "parquet", "path": str(path), "targets": ["y"], "global_batch": 8}
    config = RunConfig.model_validate({**CONFIG, "data": data})
    assert known_rows(config) is None
    path.with_suffix(".json").write_text(content)
    assert known_rows(config) is None
    classes = {"yes": 3, "no": 98}
    path.with_suffix(".json").write_text(json.dumps({"files": {"rows.parquet": {"rows": 101, "classes": classes}}}))
    assert known_rows(config) == KnownRows(11, {}), "81 rows train, and these are not the ten classes of the task"
    data |= {"source": "json", "path": str(path.with_suffix(".json"))}  # is no note of itself
    path.with_suffix(".json").write_text(json.dumps({"files": {"rows.json": {"rows": 101}}}))
    assert known_rows(RunConfig.model_validate({**CONFIG, "data": data})) is None


def test_counts_of_classes_are_those_of_the_column_that_is_predicted(tmp_path: Path) -> None:
    path, counts = tmp_path / "rows.parquet", {"no": 98, "yes": 3}
    note = {"files": {"rows.parquet": {"rows": 101, "target": "paid", "classes": counts}}}
    path.with_suffix(".json").write_text(json.dumps(note))
    for target, known in (("paid", counts), ("student", {})):
        data = {"source": "parquet", "path": str(path), "targets": [target], "global_batch": 8}
        task = {"kind": "classification", "num_classes": 2}
        config = RunConfig.model_validate({**CONFIG, "data": data, "task": task})
        assert known_rows(config) == KnownRows(11, known)


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
            "model.activation: gradients vanish in 12 layers of sigmoid",
            {"model": {"hidden": [64] * 11, "norm": "batch"}},
        ),
        (
            {"model": {"hidden": [64] * 11}},
            "model.norm: 12 layers without norms or shortcuts",
            {"model": {"hidden": [64] * 11, "residual": True}},
        ),
        (
            {"model": {"hidden": [64] * 11, "activation": "tanh"}},
            "model.norm: 12 layers without norms or shortcuts",
            {"model": {"hidden": [64] * 11, "activation": "tanh", "norm": "batch"}},
        ),
        ({"model": {"dropout": 0.7}}, "model.dropout: 0.7 drops more", {"model": {"dropout": 0.5}}),
        (
            {"model": {"norm": "batch"}, "data": {"global_batch": 16}},
            "model.norm: BatchNorm sees 8 rows at a time (16 over 2 ranks)",
            {"model": {"norm": "layer"}, "data": {"global_batch": 16}},
        ),
        (
            {"run": {"max_epochs": 6}},
            "early_stopping.patience_evaluations: 5 are not used up before the end of a run of 6 evaluations",
            {"run": {"max_epochs": 7}},
        ),
        (
            {"schedule": {"kind": "plateau", "metric": "val/macro_f1", "mode": "max", "patience_evaluations": 28}},
            "schedule.patience_evaluations: 28 are not exceeded before the end of a run of 30 evaluations",
            {"schedule": {"kind": "plateau", "metric": "val/macro_f1", "mode": "max", "patience_evaluations": 27}},
        ),
        (
            {"schedule": {"kind": "plateau", "patience_evaluations": 4}},
            "schedule.patience_evaluations: the run stops early before the rate falls",
            {"schedule": {"kind": "plateau", "patience_evaluations": 3}},
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


def first_of_last_gradient(**model: Any) -> float:
    """The gradient's norm of the first of twelve layers, by that of the last."""
    torch.manual_seed(0)
    config = MlpModel(kind="mlp", hidden=(64,) * 11, **model)
    network = build_model(config, input_shape=(20,), num_outputs=5)
    torch.nn.functional.cross_entropy(network(torch.randn(128, 20)), torch.arange(128) % 5).backward()
    first, *_, last = [layer for layer in network if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    return float(first.weight.grad.norm() / last.weight.grad.norm())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "vanishes"),
    [
        ({"activation": "sigmoid"}, True),
        ({"activation": "sigmoid", "norm": "batch"}, False),
        ({"activation": "tanh"}, False),
        ({"activation": "tanh", "norm": "layer"}, False),
    ],
)
def test_gradients_are_said_to_vanish_where_they_do(model: dict[str, Any], vanishes: bool) -> None:
    ratio = first_of_last_gradient(**model)
    assert ratio < 1e-5 if vanishes else ratio > 0.05
    warnings = warnings_of(model={**model, "hidden": [64] * 11})
    assert any("gradients vanish" in warning for warning in warnings) == vanishes


def test_without_a_number_of_ranks_nothing_is_said_of_their_share() -> None:
    assert warnings_of(ranks=None, model={"norm": "batch"}, data={"global_batch": 4}) == []


def test_a_transformer_wants_a_warm_up_and_clipping() -> None:
    config = RunConfig.model_validate({**CONFIG, "schedule": {"kind": "cosine", "warmup_steps": 5}})
    kinds = ({"kind": "gpt", "layers": 1, "width": 8, "heads": 2}, {"kind": "pretrained", "path": "nowhere"})
    for model in (parsed("model", keys) for keys in kinds):
        bare = config.model_copy(
            update={"model": model, "schedule": config.schedule.model_copy(update={"warmup_steps": 0})}
        )
        found = [line for line in checklist(bare, ranks=1) if line.startswith("WARNING")]
        assert [line.split(":")[1].strip() for line in found] == ["schedule.warmup_steps", "clip.kind"]
        clip = RunConfig.model_validate({**CONFIG, "clip": {"kind": "norm", "max_norm": 1.0}}).clip
        sound = config.model_copy(update={"model": model, "clip": clip})
        assert not [line for line in checklist(sound, ranks=1) if line.startswith("WARNING")]

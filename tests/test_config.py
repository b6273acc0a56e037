"""What a configuration may say, and what its reader is told when it says something else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from harness.config.checks import contradictions
from harness.config.io import LoadedConfig, dump_config, load_config
from harness.config.problems import schema_of, with_slots
from harness.config.run_config import RunConfig
from harness.errors import ConfigError
from harness.parts import registered

GOOD = """\
run:        {name: digits, max_epochs: 2}
model:      {kind: cnn, channels: [8, 16], hidden: [32], dropout: 0.25}
data:       {source: mnist_5k, global_batch: 64}
task:       {kind: classification, num_classes: 10}
optim:      {kind: adamw, peak_lr: 1e-3, betas: [0.9, 0.99]}
schedule:   {kind: cosine, warmup_steps: 5}
early_stopping: {patience_evaluations: 3}
"""

Load = Callable[..., LoadedConfig]
Refuse = Callable[..., list[str]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load GOOD, or another text, with overrides."""

    def loaded(*overrides: str, text: str = GOOD, world_size: int | None = None) -> LoadedConfig:
        path = tmp_path / "a.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, world_size=world_size)

    return loaded


@pytest.fixture
def refuse(load: Load) -> Refuse:
    """Return the lines below the header of the ConfigError; each names a path and a problem."""

    def refused(*overrides: str, text: str = GOOD, world_size: int | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(*overrides, text=text, world_size=world_size)
        return problem_lines(caught.value)

    return refused


def problem_lines(error: ConfigError) -> list[str]:
    header, *lines = str(error).split("\n")
    plural = "s" if len(lines) > 1 else ""
    assert re.fullmatch(rf"ConfigError: {len(lines)} problem{plural} in \S+", header), header
    for line in lines:
        assert re.match(r"  \S.*: \S", line), line
    return [line.strip() for line in lines]


# ---------------------------------------------------------------- what is read


def test_numbers_with_an_exponent_are_numbers(load: Load) -> None:
    assert load("optim.peak_lr=3e-4").config.optim.peak_lr == 0.0003
    assert load().config.optim.peak_lr == 0.001
    assert load("run.max_steps=1e5").config.run.max_steps == 100_000


@pytest.mark.parametrize("name", ["no", "on", "y", "010", "00", "0o10", "0b11", "2024-01-01", "1_000", "0x1f"])
def test_no_version_of_yaml_turns_names_into_something_else(load: Load, name: str) -> None:
    assert load(f"run.name={name}").config.run.name == name
    assert load(text="%YAML 1.1\n---\n" + GOOD.replace("name: digits", f"name: {name}")).config.run.name == name


@pytest.mark.parametrize("duration", ["1:30:00", "1:30.5"])
def test_a_time_of_day_is_not_a_base_60_number(refuse: Refuse, duration: str) -> None:
    wanted = f"optim.peak_lr: '{duration}' is not a finite number, above 0"
    assert refuse(text=GOOD.replace("1e-3", duration)) == [wanted]


def test_overrides_set_nested_keys_lists_and_null(load: Load) -> None:
    config = load("model.hidden=[64, 32]", "early_stopping=null", "tracking.log_every_steps=3").config
    assert config.model.hidden == (64, 32)
    assert config.early_stopping is None
    assert config.tracking.log_every_steps == 3


def test_an_override_reaches_into_a_section_that_the_file_leaves_out(load: Load) -> None:
    config = load("strategy.micro_batch=8", "early_stopping.min_delta=1", text=GOOD.replace("early", "#")).config
    assert (config.strategy.kind, config.strategy.micro_batch) == ("ddp", 8)
    assert config.early_stopping is not None


def test_a_byte_order_mark_is_not_part_of_the_first_key(load: Load) -> None:
    assert load(text="\ufeff" + GOOD).config == load().config


# ---------------------------------------------------------------- changing the kind of a section


def test_an_override_of_the_kind_drops_the_old_kinds_keys_and_says_so(load: Load) -> None:
    loaded = load("model.kind=mlp")
    assert loaded.config.model.kind == "mlp"
    assert loaded.config.model.hidden == (32,)
    assert loaded.config.model.dropout == 0.25
    assert loaded.notices == ("model.kind: cnn -> mlp drops channels: [8, 16], which mlp does not have",)


def test_an_override_of_the_source_drops_the_old_sources_keys(load: Load) -> None:
    table = GOOD.replace("source: mnist_5k", "source: csv, path: a.csv, targets: [y]")
    loaded = load("data.source=mnist_5k", text=table)
    assert loaded.config.data.source == "mnist_5k"
    assert "path: 'a.csv', targets: ['y']" in loaded.notices[0]


def test_nothing_is_said_when_nothing_is_dropped(load: Load) -> None:
    assert load("optim.kind=adam", "model.kind=cnn", "clip.kind=none").notices == ()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_key_of_the_old_kind_that_was_asked_for_is_refused_not_dropped(refuse: Refuse, reverse: bool) -> None:
    overrides = ["model.kind=mlp", "model.channels=[4]"]
    assert refuse(*overrides[:: -1 if reverse else 1]) == [
        "model.channels: unknown key (model.kind=cnn has it; allowed: hidden, norm, sync_batch_norm, dropout, "
        "residual, init, kind, activation, output)"
    ]


def test_a_misspelt_key_is_not_dropped_with_the_old_kind(refuse: Refuse) -> None:
    assert refuse("model.kind=mlp", text=GOOD.replace("dropout", "dropuot"))[0].startswith(
        "model.dropuot: unknown key (nearest: dropout; "
    )


# ---------------------------------------------------------------- what is refused


def test_an_unknown_key_is_named_with_the_nearest_and_all_allowed(refuse: Refuse) -> None:
    assert refuse("optim.peak_lrr=1") == [
        "optim.peak_lrr: unknown key (nearest: peak_lr; allowed: kind, peak_lr, weight_decay, betas, eps)"
    ]
    assert refuse(text=GOOD + "trackign: {}\n")[0].startswith("trackign: unknown key (nearest: tracking; ")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.kind=mpl", "model.kind: 'mpl' is not one of cnn, gpt, mlp, perceptron, pretrained (nearest: mlp)"),
        ("strategy.kind=ddpp", "strategy.kind: 'ddpp' is not one of ddp, zero1, zero2, zero3 (nearest: ddp)"),
        ("early_stopping.mode=mn", "early_stopping.mode: 'mn' is not one of min, max (nearest: min)"),
        ("optim.kind=[1]", "optim.kind: [1] is not one of adafactor, adam, adamw, muon, sgd"),
        ("optim=5", "optim: 5 is not a section whose kind is one of adafactor, adam, adamw, muon, sgd"),
        ("run=null", "run: null is not a section with name"),
        ("model.channels=64", "model.channels: 64 is not a list of 1 or more, each a whole number, at least 1"),
        ("model.channels=[]", "model.channels: [] is not a list of 1 or more, each a whole number, at least 1"),
        ("model.channels='64'", "model.channels: '64' is not a list of 1 or more, each a whole number, at least 1"),
        ("model.hidden=[8, a]", "model.hidden.1: 'a' is not a whole number, at least 1"),
        ("optim.betas=[.9]", "optim.betas.1: missing; wanted: a finite number, at least 0, below 1"),
        ("optim.betas=[0,0,0]", "optim.betas: [0, 0, 0] is not a list of 2, each a finite number, at least 0, below 1"),
        ("model.dropout=x", "model.dropout: 'x' is not a finite number, at least 0, below 1"),
        ("model.dropout=[x]", "model.dropout.0: 'x' is not a finite number, at least 0, below 1"),
        ("model.norm=bach", "model.norm: 'bach' is not one of none, batch, layer (nearest: batch)"),
        ("run.max_steps=1.5", "run.max_steps: 1.5 is not a whole number, at least 1, or null"),
        ("run.max_steps=true", "run.max_steps: true is refused: a number is wanted"),
        ("tracking.log_every_steps=0", "tracking.log_every_steps: 0 is not a whole number, at least 1"),
        ("optim.peak_lr=-1e-3", "optim.peak_lr: -0.001 is not a finite number, above 0"),
        ("optim.peak_lr=.nan", "optim.peak_lr: '.nan' is not a finite number, above 0"),
        ("optim.peak_lr=nan", "optim.peak_lr: 'nan' is not a finite number, above 0"),
        ("optim.peak_lr=inf", "optim.peak_lr: 'inf' is not a finite number, above 0"),
        ("optim.peak_lr=1e999", "optim.peak_lr: inf is not a finite number, above 0"),
        ("optim.peak_lr=", "'optim.peak_lr=': not an override; write key=value, such as optim.peak_lr=3e-4"),
        ("optim.peak_lr", "'optim.peak_lr': not an override; write key=value, such as optim.peak_lr=3e-4"),
        ("run.name.x=1", "run.name.x: run.name is 'digits', which has no keys; set it whole, run.name=..."),
        ("model.hidden.0=1", "model.hidden.0: model.hidden is [32], which has no keys; set it whole, model.hidden=..."),
        ("model.hidden=[1", "model.hidden: line 1, column 3: expected ',' or ']', but got '<stream end>'"),
        ("evaluation={every_steps: 1, every_epochs: 1}", "evaluation: set every_epochs or every_steps, not both"),
        ("schedule.kind=wsd", "schedule.decay_steps: missing; wanted: a whole number, at least 1"),
        (
            "schedule={kind: step, every_steps: 1, every_epochs: 1}",
            "schedule: set every_steps or every_epochs, exactly one of them; both are set",
        ),
        (
            "schedule={kind: step}",
            "schedule: set every_steps or every_epochs, exactly one of them; neither is set",
        ),
        ("clip={max_norm: 1}", "clip.kind: missing; wanted: one of none, norm, value"),
        (
            "data={global_batch: 1}",
            "data.source: missing; wanted: one of csv, imagefolder, json, mnist_5k, parquet, parquet_shards, text, "
            "text_table",
        ),
    ],
)  # fmt: skip
def test_a_problem_says_where_what_was_found_and_what_is_allowed(refuse: Refuse, override: str, problem: str) -> None:
    assert refuse(override) == [problem]


def test_a_list_of_norms_or_dropouts_has_one_for_each_hidden_layer(load: Load, refuse: Refuse) -> None:
    loaded = load("model={kind: mlp, hidden: [3, 4], norm: [batch, none], dropout: 0.5}").config.model
    assert loaded.norms == ("batch", "none")
    assert loaded.dropouts == (0.5, 0.5)
    for name, value in {"norm": "[batch]", "dropout": "[0.1]"}.items():
        assert refuse(f"model={{kind: mlp, hidden: [3, 4], {name}: {value}}}") == [
            f"model.{name}: 1 entries for 2 hidden layers; write one for each, or one value without brackets for all"
        ]


def test_a_residual_mlp_has_a_hidden_layer(refuse: Refuse) -> None:
    assert refuse("model={kind: mlp, hidden: [], residual: true}") == [
        "model.residual: true wants a hidden layer, such as hidden: [64]"
    ]


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_optimizers_that_want_whole_matrices_are_refused_under_zero(
    load: Load, refuse: Refuse, optimizer: str, strategy: str
) -> None:
    assert refuse(f"optim.kind={optimizer}", f"strategy.kind={strategy}") == [
        f"optim.kind: {optimizer} looks at whole weight matrices, which {strategy} cuts into pieces; use "
        "strategy.kind=ddp, or optim.kind=adamw"
    ]
    assert load(f"optim.kind={optimizer}").config.optim.kind == optimizer


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("class_weights: [1, 2]", "task.class_weights: 2 entries for 10 classes"),
        ("class_weights: [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]", "task.class_weights.9: 0 is not a finite number, above 0"),
        (
            "class_weights: balance",
            "task.class_weights: 'balance' is not balanced, or a list, each a finite number, above 0 "
            "(nearest: balanced)",
        ),
        ("positive_class: 10", "task.positive_class: 10 is not one of 0 to 9"),
        ("label_smoothing: 1", "task.label_smoothing: 1 is not a finite number, at least 0, below 1"),
    ],
)
def test_what_a_task_cannot_be_is_refused(refuse: Refuse, keys: str, problem: str) -> None:
    assert refuse(f"task={{kind: classification, num_classes: 10, {keys}}}") == [problem]


def test_scores_of_one_class_can_drive_early_stopping_where_there_is_one(load: Load, refuse: Refuse) -> None:
    stopping = "early_stopping={metric: val/average_precision, mode: max}"
    assert "it has val/loss, val/accuracy, val/macro_f1" in refuse("early_stopping.metric=val/mse")[0]
    assert refuse(stopping) == [
        "early_stopping.metric: val/average_precision is a score of one class of 10; say which with task.positive_class"
    ]
    assert refuse("early_stopping.metric=val/f1")[0].endswith("; or use val/macro_f1, which is of all")
    for keys in ("num_classes: 2", "num_classes: 10, positive_class: 3"):
        assert load(stopping, f"task={{kind: classification, {keys}}}").config


TASKS: dict[str, tuple[str, ...]] = {
    "classification": (),
    "regression": ("task={kind: regression}", "data={source: csv, path: a, targets: [y], global_batch: 8}"),
    "causal_lm": (
        "task={kind: causal_lm}",
        "data={source: text, path: a, block: 8, global_batch: 8}",
        "model={kind: gpt, layers: 1, width: 8, heads: 2}",
    ),
}
BETTER_LOWER = ("val/loss", "val/mse", "val/mae", "val/perplexity", "val/bits_per_byte")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("section", ["early_stopping={", "schedule={kind: plateau, "])
def test_a_metric_is_not_judged_the_wrong_way_round(load: Load, refuse: Refuse, task: str, section: str) -> None:
    others = ("early_stopping=null",) if section.startswith("schedule") else ()
    model = () if task == "causal_lm" else ("model={kind: mlp, hidden: [4]}",)
    overrides = (*TASKS[task], *model, *others)
    if task == "classification":
        overrides += ("task.positive_class=3",)
    path, seen = section.split("=", maxsplit=1)[0], load(*overrides).config.task.metric_names
    for metric in seen:
        good, bad, way = ("min", "max", "lower") if metric in BETTER_LOWER else ("max", "min", "higher")
        assert load(*overrides, f"{section}metric: {metric}, mode: {good}}}").config
        assert refuse(*overrides, f"{section}metric: {metric}, mode: {bad}}}") == [
            f"{path}.mode: {metric} is better the {way} it is; use {path}.mode={good}"
        ]


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_noise_in_the_gradient_is_for_ddp(load: Load, refuse: Refuse, strategy: str) -> None:
    noise = "gradient_noise={eta: 0.1}"
    assert refuse(noise, f"strategy={{kind: {strategy}}}") == [
        f"gradient_noise: {strategy} clips within its step, and the noise is of the clipped gradient; use "
        "strategy.kind=ddp, or gradient_noise=null"
    ]
    assert load(noise).config.gradient_noise is not None


def test_a_softmax_before_the_softmax_of_the_loss_is_refused(load: Load, refuse: Refuse) -> None:
    because = "softmax is part of the loss of classification already, which wants what goes into it; use"
    for model, key, value in [
        ("{kind: perceptron, activation: softmax}", "model.activation", "none"),
        ("{kind: mlp, hidden: [3], output: softmax}", "model.output", "linear"),
    ]:
        assert refuse(f"model={model}") == [f"{key}: {because} {key}={value}"]


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_an_activation_before_the_softmax_of_the_loss_is_refused(refuse: Refuse, activation: str) -> None:
    assert refuse(f"model={{kind: perceptron, activation: {activation}}}") == [
        f"model.activation: the loss of classification takes the softmax of any numbers, and {activation} keeps some "
        "from it; use model.activation=none"
    ]


def test_a_softmax_is_for_targets_that_are_shares_and_one_number_is_none(load: Load, refuse: Refuse) -> None:
    regression = ("task={kind: regression}", "early_stopping=null")
    for model, key, value in [
        ("{kind: perceptron, activation: softmax}", "model.activation", "none"),
        ("{kind: mlp, hidden: [3], output: softmax}", "model.output", "linear"),
    ]:
        one, two = (f"data={{source: csv, path: a, targets: {names}, global_batch: 64}}" for names in ("[y]", "[y, z]"))
        assert refuse(f"model={model}", *regression, one) == [
            f"{key}: the softmax of one number is always 1, and data.targets names one; use {key}={value}, or the "
            "targets that are shares of a whole"
        ]
        assert load(f"model={model}", *regression, two).config
    assert load("model={kind: perceptron, activation: sigmoid}", *regression, one).config


@pytest.mark.parametrize(
    ("override", "start"),
    [
        (
            "task={kind: regression, class_weights: balanced}",
            "task.class_weights: unknown key (task.kind=classification has it",
        ),
        ("optim.momentum=0.9", "optim.momentum: unknown key (optim.kind=muon or sgd has it; allowed: kind, peak_lr"),
        ("data.categorical=[a]", "data.categorical: unknown key (data.source=csv or json or parquet or parquet_shards"),
    ],
)
def test_a_key_of_another_kind_is_told_as_one(refuse: Refuse, override: str, start: str) -> None:
    assert any(line.startswith(start) for line in refuse(override))


def test_batch_norm_that_is_not_there_is_not_synchronised(load: Load, refuse: Refuse) -> None:
    assert refuse("model.sync_batch_norm=true") == [
        "model.sync_batch_norm: there is no BatchNorm to synchronise; use norm: batch, or leave it out"
    ]
    assert load("model.sync_batch_norm=true", "model.norm=batch").config


def test_a_number_is_no_name_and_quotes_make_it_one(load: Load, refuse: Refuse) -> None:
    assert refuse("run.name=5") == [
        "run.name: 5 is not a text (write what looks like something else in quotes, on a command line '\"...\"')"
    ]
    assert load('run.name="5"').config.run.name == "5"


@pytest.mark.parametrize("name", ["a/b", "..", "../a", "a\nb", "a" * 300, "", "-a", "a b", "a\0b", "ä", "a\ud800"])
def test_a_run_name_that_is_no_safe_folder_name_is_refused(refuse: Refuse, name: str) -> None:
    text = GOOD.replace("name: digits", f"name: {json.dumps(name)}")
    (line,) = refuse(text=text)
    assert len(line) < 250


def test_a_missing_section_is_named_with_its_variants(refuse: Refuse) -> None:
    assert refuse(text=GOOD.replace("task: ", "#")) == [
        "task: missing; wanted: a section whose kind is one of causal_lm, classification, regression"
    ]


def test_two_overrides_may_not_set_the_same_key(refuse: Refuse) -> None:
    assert refuse("run.seed=1", "run.seed=2") == ["run.seed: overridden twice, also by run.seed=; keep one"]
    assert refuse("model.hidden=[4]", "model={kind: mlp, hidden: [8]}") == [
        "model: overridden twice, also by model.hidden=; keep one"
    ]


def test_all_problems_are_reported_together(refuse: Refuse) -> None:
    text = (
        GOOD.replace("1e-3", "fast, momentun: 0.9")
        .replace("max_epochs: 2", "max_epochs: 2, seed: 3")
        .replace("num_classes: 10", "num_classes: 1, num_classes: 1")
    )
    paths = [line.split(": ")[0] for line in refuse("nothing", "run.seed.x=1", "model.kind=rnn", text=text)]
    assert paths == [
        *("task.num_classes", "'nothing'", "run.seed.x"),
        *("model.kind", "task.num_classes", "optim.peak_lr", "optim.momentun"),
    ]


def keys_of_every_section() -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield (section, its kind or source, key) for each key that a configuration knows."""
    schema = with_slots(schema_of(RunConfig), registered().schemas)
    for name, field in schema["properties"].items():
        for variant in {str(found): found for found in sections_in(field)}.values():
            tags = {
                tag: variant[tag].get("const") or variant[tag]["enum"][0]
                for tag in ("kind", "source")
                if tag in variant
            }
            yield from ((name, tags, key) for key in variant)


def sections_in(field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the keys of a section, or of each kind of it."""
    options = [field, *field.get("anyOf", ()), *field.get("oneOf", ())]
    yield from (option["properties"] for option in options if "properties" in option)


def test_every_key_of_every_kind_has_a_message_in_plain_words(refuse: Refuse) -> None:
    cases = list(keys_of_every_section())
    assert len(cases) > 50
    for section, tags, key in cases:
        wrong = "x" if key == "lora" else {"x": 1}  # a mapping is looked into where a section is wanted
        raw = {**yaml.safe_load(GOOD), section: {**tags, key: wrong}}
        of_a_section_in_it = f"{section}.{key}.kind: missing; wanted: "
        starts = (f"{section}.{key}: ", f"{section}.{key}.x: ", of_a_section_in_it)
        lines = [line for line in refuse(text=yaml.safe_dump(raw)) if line.startswith(starts)]
        assert len(lines) == 1, (section, tags, key)
        unknown = f"{section}.{key}.x: unknown key"
        assert lines[0].startswith((f"{section}.{key}: {wrong!r} is not ", unknown, of_a_section_in_it)), lines


# ---------------------------------------------------------------- batches and ranks


def test_the_global_batch_must_divide_over_the_ranks(load: Load, refuse: Refuse) -> None:
    assert load(world_size=4).config.data.global_batch == 64
    assert refuse(world_size=6) == [
        "data.global_batch: 64 does not divide over 6 ranks; use 60 or 66, or start 1, 2, 4, 8, 16, 32 or 64 ranks"
    ]
    assert refuse("strategy.micro_batch=8", world_size=6)[0].endswith("or start 1, 2, 4 or 8 ranks")
    assert refuse("data.global_batch=67", world_size=6)[0].endswith("use 66 or 72, or start 1 ranks")


def test_a_micro_batch_is_no_larger_than_a_ranks_share_and_divides_it(load: Load, refuse: Refuse) -> None:
    for micro_batch in (8, 16):
        assert load(f"strategy.micro_batch={micro_batch}", world_size=4).config.strategy.micro_batch == micro_batch
    assert refuse("strategy.micro_batch=17", world_size=4)[0].startswith(
        "strategy.micro_batch: 17 is more than a rank's share of 16 rows"
    )
    assert refuse("strategy.micro_batch=5", world_size=4)[0].endswith("micro-batches of 5; use 4 or 8")


def test_unless_told_otherwise_saves_are_written_beside_the_training(load: Load) -> None:
    assert load().config.checkpoint.asynchronous


def test_a_mistyped_batch_of_a_quadrillion_rows_is_refused_at_once(refuse: Refuse) -> None:
    begin = time.perf_counter()
    refuse("data.global_batch=1000000000000037", world_size=3)
    refuse("data.global_batch=1000000000000037", "strategy.micro_batch=400000000000000", world_size=1)
    assert time.perf_counter() - begin < 2


# ---------------------------------------------------------------- files that are not configurations


def test_a_key_given_twice_is_refused_with_both_lines(refuse: Refuse) -> None:
    assert refuse(text=GOOD + "run: {name: b, max_steps: 900,\n  name: c}\n") == [
        "run: given twice, in lines 1 and 8; keep one",
        "run.name: given twice, in lines 8 and 9; keep one",
    ]


def test_a_tag_is_refused_and_its_code_not_run(refuse: Refuse, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (line,) = refuse(text=GOOD + f"clip: !!python/object/apply:os.system ['touch {trace}']\n")
    assert line.endswith("a.yaml: line 8, column 7: tags (!name) are not read; write the plain value")
    assert not trace.exists()


@pytest.mark.parametrize("value", ["!!str 5", "! a", "!!float 1", "{!!str kind: norm}"])
def test_harmless_tags_are_refused_too(refuse: Refuse, value: str) -> None:
    assert "line 8" in refuse(text=f"{GOOD}clip: {value}\n")[0]
    assert "tag" in refuse(f"clip={value}")[0]


def test_an_alias_bomb_is_refused_at_once(refuse: Refuse) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    begin = time.perf_counter()
    assert "anchors and aliases" in refuse(text="\n".join(lines))[0]
    assert "without tag or anchor" in refuse(text="{&a run: 1}")[0]
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("bomb", ["[" * 60_000, "{a: " * 15_000, "- " * 30_000, "run: {name: " + "[" * 3_000])
def test_a_nesting_bomb_is_refused_at_once(refuse: Refuse, bomb: str) -> None:
    begin = time.perf_counter()
    assert "nested more than 16 deep" in refuse(text=bomb)[0]
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- 1\n", "[1] is not a mapping"),
        ("5\n", "5 is not a mapping"),
        ("run: [1\nmodel: 2", "line 2, column 6: expected ',' or ']', but got ':'"),
        ("run:\n\tname: a", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("run: 1\n---\nrun: 2", "line 2, column 1: a second document starts"),
        ("[a]: 1", "line 1, column 1: a key is one word"),
        ("a: *b", "line 1, column 4: anchors and aliases"),
        ('a: "\\UFFFFFFFF"', "not YAML"),
        ('a: "\\U00110000"', "not YAML"),
        ('"\\ud800": 1', "line 1, column 1: '\\ud800' has a NUL or half a character in it"),
        ("a: \x07", "unacceptable character #x0007"),
    ],
)
def test_what_is_not_a_configuration_in_yaml_is_refused_with_its_place(refuse: Refuse, text: str, problem: str) -> None:
    (line,) = refuse(text=text)
    assert re.match(r"\S+/a\.yaml: ", line)
    assert problem in line


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "mnist_cnn.yaml").touch()
    with pytest.raises(ConfigError, match=r"mnist_cn\.yaml: no such file; use \S+/mnist_cnn\.yaml$"):
        load_config(tmp_path / "mnist_cn.yaml")
    with pytest.raises(ConfigError, match=r"nowhere/a\.yaml: no such file; use one of configs/"):
        load_config(tmp_path / "nowhere" / "a.yaml")


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    loop, long, latin = tmp_path / "loop.yaml", tmp_path / "long.yaml", tmp_path / "latin.yaml"
    loop.symlink_to(loop)
    long.write_text("#" * (2**18 + 1))
    latin.write_bytes(b"run: {name: \xe9}")
    for path, reason in {
        tmp_path: "Is a directory",
        loop: "symbolic links",
        long: "longer than 262,144 bytes",
        latin: "not UTF-8 at byte 12",
        Path("a\0b"): "null byte",
    }.items():
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"ConfigError: {path}: ")


def test_a_config_is_loaded_within_three_seconds_and_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(GOOD)
    code = "import sys; from harness.config.io import load_config; load_config(sys.argv[1], ['run.seed=1'])"
    command = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules", str(path)]

    def seconds() -> float:
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - begin

    assert any(seconds() < 3 for _ in range(3)), "the machine may be busy once, not each time"


# ---------------------------------------------------------------- for all configurations

TRAPS = ["no", "1e-3", "1:30:00", "null", "~", "0x1f", "010", "- a", "a: b", "#", "", "1_000", "=", "<<", ".inf"]
texts = st.sampled_from(TRAPS) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
names = st.sampled_from(["no", "1e-3", "010", "5", "null", "2024-01-01"]) | st.from_regex(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True
)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
fractions = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 10**12)
widths = st.lists(counts, min_size=1, max_size=3)


def section(kind: str, **keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"kind": st.just(kind)}, optional=keys)


configs = st.fixed_dictionaries(
    {
        "run": st.fixed_dictionaries({"name": names, "max_steps": counts}, optional={"output_root": texts}),
        "model": st.fixed_dictionaries(
            {"kind": st.sampled_from(["mlp", "cnn"]), "hidden": widths},
            optional={"dropout": fractions, "residual": st.booleans()},
        ).map(lambda model: {**model, "channels": [3]} if model["kind"] == "cnn" else model),
        "data": st.fixed_dictionaries(
            {"source": st.just("csv"), "path": texts, "targets": st.lists(texts, min_size=1), "global_batch": counts}
        ),
        "task": st.just({"kind": "regression"}),
        "optim": st.fixed_dictionaries(
            {"kind": st.sampled_from(["adam", "adamw"]), "peak_lr": positive},
            optional={"betas": st.tuples(fractions, fractions).map(list), "eps": positive},
        ),
    },
    optional={
        "schedule": section("cosine", final_lr_fraction=fractions) | section("plateau", metric=texts),
        "clip": section("none") | st.fixed_dictionaries({"kind": st.just("norm"), "max_norm": positive}),
        "early_stopping": st.none() | st.fixed_dictionaries({}, optional={"metric": texts, "min_delta": fractions}),
        "evaluation": st.fixed_dictionaries({}, optional={"every_steps": counts}),
    },
)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "scratch.yaml"


@settings(max_examples=150, deadline=None)
@given(raw=configs)
def test_a_dumped_configuration_reads_back_equal(scratch: Path, raw: dict[str, Any]) -> None:
    config = RunConfig.model_validate(raw)
    assume(not contradictions(config))
    text = dump_config(config)
    scratch.write_text(text, encoding="ascii")
    loaded = load_config(scratch).config
    assert loaded == config
    assert loaded.model_dump_json() == config.model_dump_json()  # the same bits of every float, also of -0.0
    assert ["use", *yaml.safe_load(text)] == list(RunConfig.model_fields)  # which is left out where there is none


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(["ddp", "cnn", "adamw", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers(), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(sorted({key for _, _, key in keys_of_every_section()})) | texts


@st.composite
def mutated_texts(draw: st.DrawFn) -> str:
    """Return the YAML of a good configuration after some keys were set to junk, and perhaps some characters too."""
    raw: dict[str, Any] = draw(configs)
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(sorted(raw)) | texts)
        if isinstance(raw.get(name), dict) and draw(st.booleans()):
            raw[name] = {**raw[name], draw(keys): draw(junk)}
        else:
            raw[name] = draw(junk)
    text = yaml.safe_dump(raw, allow_unicode=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from([*"{}[]:&*!|>'\"#%@`-,?\n\t \\\0", "\\ud800"])) + text[place:]
    return text


override_texts = st.builds(
    "{}.{}={}".format, st.sampled_from(list(RunConfig.model_fields)), keys, texts | junk.map(repr)
) | st.text(st.characters(), max_size=20)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=mutated_texts(), overrides=st.lists(override_texts, max_size=3))
def test_whatever_is_written_is_loaded_or_refused_with_paths(scratch: Path, text: str, overrides: list[str]) -> None:
    scratch.write_text(text, encoding="utf-8", newline="")
    try:
        config = load_config(scratch, overrides, world_size=2).config
    except ConfigError as refusal:
        problem_lines(refusal)
        return
    scratch.write_text(dump_config(config), encoding="ascii")
    assert load_config(scratch).config == config


def test_phases_beyond_total_steps_are_found_though_the_updates_of_the_run_are_not_known(refuse: Refuse) -> None:
    (problem,) = refuse("schedule={kind: cosine, warmup_steps: 20, total_steps: 4}")  # the budget is in epochs
    assert problem.startswith("schedule: warmup_steps 20 is more than total_steps 4; shorten it")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "early_stopping.metric=val/acc",
            "early_stopping.metric: classification has no 'val/acc'; it has val/loss, val/",
        ),
        ("schedule={kind: plateau, metric: val/mse}", "schedule.metric: classification has no 'val/mse'"),
        ("schedule={kind: linear, warmup_steps: 999999}", "schedule: warmup_steps 999,999 is more than the 5 updates"),
        ("data={source: csv, path: a, targets: [y], global_batch: 8}", "model.kind: cnn wants images"),
        ("task={kind: regression}", "task.kind: mnist_5k has labels"),
        (
            "data={source: text, path: a, block: 8, global_batch: 8}",
            "model.kind: cnn does not go with data.source=text; use model.kind=gpt",
        ),
        (
            "task={kind: causal_lm}",
            "data.source: mnist_5k does not go with task.kind=causal_lm; use data.source=text",
        ),
        (
            "model={kind: gpt, layers: 1, width: 8, heads: 2}",
            "task.kind: classification does not go with model.kind=gpt; use task.kind=causal_lm",
        ),
        ("model={kind: gpt, layers: 1, width: 9, heads: 2}", "model.width: 9 does not divide into 2 heads"),
        (
            "model={kind: gpt, layers: 1, width: 6, heads: 2, positions: rotary}",
            "model.positions: rotary turns pairs of features, a head has 3; use an even width / heads",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_found_before_anything_starts(
    refuse: Refuse, override: str, problem: str
) -> None:
    assert any(line.startswith(problem) for line in refuse(override, "run.max_steps=5"))


def test_balanced_sampling_wants_labels(refuse: Refuse) -> None:
    table = "data={source: csv, path: a, targets: [y], global_batch: 8, sampling: balanced}"
    lines = refuse(table, "model={kind: mlp, hidden: [4]}", "task={kind: regression}")
    assert lines == ["data.sampling: balanced wants labels; use data.sampling=uniform, or task.kind=classification"]


def test_order_by_length_and_micro_batches_by_tokens_want_rows_that_say_their_lengths(refuse: Refuse) -> None:
    why = "wants the length of every row, which mnist_5k does not say; use"
    assert refuse("data.sampling=by_length", "strategy.micro_batch_tokens=4096") == [
        f"data.sampling: by_length {why} data.sampling=uniform, or a Dataset of your own with `lengths`",
        f"strategy.micro_batch_tokens: 4,096 {why} strategy.micro_batch, or a Dataset of your own with `lengths`",
    ]


def test_a_micro_batch_is_measured_in_rows_or_in_tokens(refuse: Refuse) -> None:
    assert refuse("strategy.micro_batch=8", "strategy.micro_batch_tokens=4096") == [
        "strategy.micro_batch_tokens: a micro-batch has 4,096 tokens at most or 8 rows, not both; set "
        "strategy.micro_batch or strategy.micro_batch_tokens to null"
    ]


def test_micro_batches_by_tokens_and_batch_norm_over_all_ranks_do_not_go_together(refuse: Refuse) -> None:
    lines = refuse("strategy.micro_batch_tokens=4096", "model.sync_batch_norm=true", "model.norm=batch")
    assert any("model.sync_batch_norm would wait for it" in line for line in lines)

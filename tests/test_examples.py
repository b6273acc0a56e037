"""The configs of configs/ on tables: each trains for real, and comes out as its comment says.

What takes minutes is `long`, and stands beside the part of it that a few epochs show.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from harness.catalogue.mlp.advice import num_layers
from harness.catalogue.mlp.section import MlpModel
from harness.config.io import load_config
from harness.examples.prepare import prepare
from harness.observers.ledger import read_lines
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits
from tests.benchmarks.fraud_variants import VARIANTS, Outcome, measure, train_cold
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main
from tests.sections import load

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_short_and_says_first_what_the_reader_will_see(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 50
    config = load_config(path).config
    assert config.run.name == path.stem.replace("_", "-")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "target", "counts"),
    [
        ("default", 10_000, "default", {"No": 9_667, "Yes": 333}),
        ("fraud", 26_217, "dead", {"alive": 25_037, "dead": 1_180}),
        ("krk", 28_056, "moves", {"fourteen": 4_553, "zero": 27}),
        ("digits", 1_797, "digit", {"3": 183, "8": 174}),
    ],
)
def test_each_example_has_the_rows_and_classes_that_are_published(
    name: str, rows: int, target: str, counts: dict[str, int], prepared_data: Path
) -> None:
    prepare(name, prepared_data)
    (found,) = json.loads((prepared_data / f"{name}.json").read_bytes())["files"].values()
    assert (found["rows"], found["target"]) == (rows, target)
    assert found["classes"].items() >= counts.items()
    assert sum(found["classes"].values()) == rows


Ledger = list[dict[str, Any]]
Outcomes = dict[str, Outcome]
Train = Callable[..., Ledger]


def trained(name: str, *overrides: str, data_root: Path, output_root: Path) -> Ledger:
    """Train a config on two ranks and return the lines of its ledger."""
    path = CONFIGS / f"{name}.yaml"
    data = Path(load_config(path).config.data.path)
    prepare(data.stem, data_root)
    arguments = (f"run.output_root={output_root}", f"data.path={data_root / data.name}", *overrides)
    assert run_ranks(2, train_main, str(path), *arguments, deadline_seconds=300) == [0, 0]
    return read_lines(output_root / name.replace("_", "-") / "ledger.jsonl")


@pytest.fixture
def train(tmp_path: Path, prepared_data: Path) -> Train:
    """`trained` into the folder of the test."""

    def run(name: str, *overrides: str) -> Ledger:
        return trained(name, *overrides, data_root=prepared_data, output_root=tmp_path)

    return run


def evaluations(ledger: Ledger) -> list[dict[str, float]]:
    return [line["metrics"] for line in ledger if line["event"] == "evaluation"]


def best(ledger: Ledger, metric: str) -> dict[str, float]:
    return max(evaluations(ledger), key=lambda metrics: metrics[metric])


def logistic_regression(splits: DataSplits) -> tuple[float, float]:
    """AUC and average precision of class 1 over the validation rows, fitted to the training rows without a penalty."""
    assert isinstance(splits.train, Columns)
    inputs, targets = splits.train.inputs.double(), splits.train.targets
    linear = nn.Linear(inputs.shape[1], 2, dtype=torch.float64)
    fitter = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        fitter.zero_grad()
        loss = F.cross_entropy(linear(inputs), targets)
        loss.backward()
        return loss

    fitter.step(closure)  # type: ignore[no-untyped-call]
    scores = linear(splits.validation.inputs.double()).softmax(dim=1)[:, 1]
    targets = splits.validation.targets
    return float(binary_auroc(scores, targets)), float(binary_average_precision(scores, targets))


@pytest.mark.slow
def test_card_holders_who_default_are_ranked_as_well_as_by_logistic_regression(
    train: Train, prepared_data: Path
) -> None:
    scores = best(train("default_mlp"), "val/average_precision")
    assert scores["val/auc"] >= 0.94
    assert scores["val/average_precision"] >= 0.5
    path = prepared_data / "default.parquet"
    config = load_config(CONFIGS / "default_mlp.yaml", [f"data.path={path}"]).config
    auc, average_precision = logistic_regression(load(config.data, config.task, seed=config.run.seed))
    assert scores["val/auc"] >= auc - 0.005
    assert scores["val/average_precision"] >= average_precision - 0.025  # 83 of the 2,500 rows are positive


def fraud_outcomes(data_root: Path, output_root: Path, *, max_epochs: int, train: Callable[..., object]) -> Outcomes:
    prepare("fraud", data_root)
    places = {"root": data_root, "output_root": output_root}
    overrides = [f"run.max_epochs={max_epochs}"]
    return {name: measure(name, **places, overrides=overrides, train=train) for name in VARIANTS}


def assert_that_class_weights_win(outcomes: Outcomes) -> None:
    others = {**outcomes}
    winner, unweighted = others.pop("both, with class weights"), others["both, without class weights"]
    assert winner.f1 >= 0.22
    assert unweighted.f1 < 0.05
    assert others.pop("class weights only").f1 > winner.f1 - 0.02
    assert all(winner.f1 > other.f1 + 0.02 for other in others.values())
    # The price: who answers "alive" to nearly everybody is right more often.
    assert all(winner.accuracy < other.accuracy for other in others.values())
    # It ranks people no better for the weights, which only draw the line elsewhere.
    assert winner.auc == pytest.approx(unweighted.auc, abs=0.015)


@pytest.mark.slow
def test_after_four_epochs_the_variant_with_class_weights_is_ahead_of_those_without(
    tmp_path: Path, prepared_data: Path
) -> None:
    outcomes = fraud_outcomes(prepared_data, tmp_path, max_epochs=4, train=train_warm)
    assert_that_class_weights_win(outcomes)


@pytest.mark.slow
@pytest.mark.long
def test_of_four_variants_the_one_with_class_weights_wins_and_it_is_the_weights_that_do_it(
    tmp_path: Path, prepared_data: Path
) -> None:
    outcomes = fraud_outcomes(prepared_data, tmp_path, max_epochs=12, train=train_cold)
    assert_that_class_weights_win(outcomes)


def train_warm(*arguments: str) -> None:
    """Train on one rank that need not import anything."""
    assert run_ranks(1, train_main, *arguments) == [0]


@pytest.mark.slow
def test_digits_are_read_in_ten_epochs(train: Train) -> None:
    assert evaluations(train("digits_mlp"))[-1]["val/accuracy"] >= 0.95


def first_layer_gradients(events: Ledger) -> list[float]:
    """The norms of the first weight's gradient over the run, where the diagnostics looked at it."""
    looks = [line["norms"] for line in events if line["event"] == "gradients"]
    return [next(norm for name, norm in look.items() if name.endswith("weight")) for look in looks]


MAJORITY = 4_553 / 28_056  # who always says "fourteen" is right so often


for_each_init = pytest.mark.parametrize(("init", "at_most"), [("torch", 2e-9), ("auto", 1e-7)])


def assert_that_sigmoid_stalls(train: Train, tmp_path: Path, init: str, at_most: float, *overrides: str) -> None:
    ledger = train("krk_sigmoid12", f"model.init={init}", "diagnostics.every_steps=1", *overrides)
    events = read_lines(tmp_path / "krk-sigmoid12/events.jsonl")
    assert evaluations(ledger)[-1]["val/accuracy"] == pytest.approx(MAJORITY, abs=0.005)
    largest = max(first_layer_gradients(events))
    assert at_most / 10 < largest < at_most  # Xavier's is not under 1e-8, and helps as little


@pytest.mark.slow
@for_each_init
def test_in_its_first_epoch_the_first_of_twelve_sigmoid_layers_sees_no_gradient(
    train: Train, tmp_path: Path, init: str, at_most: float
) -> None:
    assert_that_sigmoid_stalls(train, tmp_path, init, at_most, "run.max_epochs=1")


@pytest.mark.slow
@pytest.mark.long
@for_each_init
def test_twelve_sigmoid_layers_stall_at_the_majority_class_since_the_first_sees_no_gradient(
    train: Train, tmp_path: Path, init: str, at_most: float
) -> None:
    assert_that_sigmoid_stalls(train, tmp_path, init, at_most)


WITHOUT_SHORTCUTS = ("model.residual=false", "model.hidden=[128,128,128,128,128,128,128,128,128,128,128]")


def test_with_and_without_shortcuts_there_are_twelve_layers() -> None:
    path = CONFIGS / "krk_residual12.yaml"
    models = [load_config(path, overrides).config.model for overrides in ((), WITHOUT_SHORTCUTS)]
    assert [num_layers(model) for model in models if isinstance(model, MlpModel)] == [12, 12]


def best_accuracies(data_root: Path, output_root: Path, *overrides: str) -> dict[str, float]:
    """Of twelve layers with ReLU: plain with BatchNorm, residual, and as that without shortcuts."""
    runs = {"plain": ("krk_relu12",), "residual": ("krk_residual12",)}
    runs["no shortcuts"] = ("krk_residual12", *WITHOUT_SHORTCUTS)
    ledgers = {
        name: trained(*run, *overrides, data_root=data_root, output_root=output_root / name)
        for name, run in runs.items()
    }
    return {name: best(ledger, "val/accuracy")["val/accuracy"] for name, ledger in ledgers.items()}


@pytest.fixture(scope="module")
def after_two_epochs(tmp_path_factory: pytest.TempPathFactory, prepared_data: Path) -> dict[str, float]:
    return best_accuracies(prepared_data, tmp_path_factory.mktemp("krk"), "run.max_epochs=2")


@pytest.fixture(scope="module")
def deep_accuracies(tmp_path_factory: pytest.TempPathFactory, prepared_data: Path) -> dict[str, float]:
    return best_accuracies(prepared_data, tmp_path_factory.mktemp("krk"))


@pytest.mark.slow
def test_twelve_layers_begin_to_learn_with_relu_and_batch_norm(after_two_epochs: dict[str, float]) -> None:
    assert after_two_epochs["plain"] > 0.45


@pytest.mark.slow
def test_residual_blocks_are_ahead_of_as_many_layers_without_shortcuts(after_two_epochs: dict[str, float]) -> None:
    others = {**after_two_epochs}
    residual = others.pop("residual")
    assert residual > 0.6
    assert all(residual > other + 0.1 for other in others.values())


@pytest.mark.slow
@pytest.mark.long
def test_twelve_layers_learn_with_relu_and_batch_norm(deep_accuracies: dict[str, float]) -> None:
    assert deep_accuracies["plain"] > 0.75


@pytest.mark.slow
@pytest.mark.long
def test_residual_blocks_learn_more_than_as_many_layers_without_shortcuts(deep_accuracies: dict[str, float]) -> None:
    others = {**deep_accuracies}
    residual = others.pop("residual")
    assert residual > 0.85
    assert all(residual > other + 0.05 for other in others.values())

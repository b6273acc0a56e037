"""The configs of configs/ on tables: each trains for real, and comes out as its comment says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.config.io import load_config
from harness.data.prepare import prepare
from harness.observers.ledger import read_lines
from tests.benchmarks.fraud_variants import VARIANTS, Outcome, measure
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_short_and_says_first_what_the_reader_will_see(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 50
    config = load_config(path).config
    assert config.run.name == path.stem.replace("_", "-")


Ledger = list[dict[str, Any]]
Train = Callable[..., Ledger]


@pytest.fixture
def train(tmp_path: Path, prepared_data: Path) -> Train:
    """Trains a config on two ranks and returns the lines of its ledger."""

    def run(name: str, *overrides: str) -> Ledger:
        path = CONFIGS / f"{name}.yaml"
        data = Path(load_config(path).config.data.path)
        prepare(data.stem, prepared_data)
        arguments = (f"run.output_root={tmp_path}", f"data.path={prepared_data / data.name}", *overrides)
        assert run_ranks(2, train_main, str(path), *arguments, deadline_seconds=300) == [0, 0]
        return read_lines(tmp_path / name.replace("_", "-") / "ledger.jsonl")

    return run


def evaluations(ledger: Ledger) -> list[dict[str, float]]:
    return [line["metrics"] for line in ledger if line["event"] == "evaluation"]


def best(ledger: Ledger, metric: str) -> dict[str, float]:
    return max(evaluations(ledger), key=lambda metrics: metrics[metric])


@pytest.mark.slow
def test_card_holders_who_default_are_ranked_as_well_as_by_logistic_regression(train: Train) -> None:
    scores = best(train("default_mlp"), "val/average_precision")
    assert scores["val/auc"] >= 0.94
    assert scores["val/average_precision"] >= 0.5


@pytest.mark.slow
def test_the_dead_of_crashes_are_found_with_weights_norm_and_dropout(train: Train) -> None:
    assert best(train("fraud_mlp"), "val/f1")["val/f1"] >= 0.24


@pytest.mark.slow
def test_of_four_variants_the_one_with_class_weights_wins(tmp_path: Path, prepared_data: Path) -> None:
    prepare("fraud", prepared_data)
    outcomes: dict[str, Outcome] = {
        name: measure(name, root=prepared_data, output_root=tmp_path, overrides=["run.max_epochs=12"])
        for name in VARIANTS
    }
    winner = outcomes.pop("both, with class weights")
    assert all(winner.f1 > other.f1 + 0.05 for other in outcomes.values())
    # The price: who answers "alive" to nearly everybody is right more often.
    assert all(winner.accuracy < other.accuracy for other in outcomes.values())


@pytest.mark.slow
def test_digits_are_read_in_ten_epochs(train: Train) -> None:
    assert evaluations(train("digits_mlp"))[-1]["val/accuracy"] >= 0.95


def first_layer_gradients(events: Ledger) -> list[float]:
    """The norms of the first weight's gradient over the run, where the diagnostics looked at it."""
    looks = [line["norms"] for line in events if line["event"] == "gradients"]
    return [next(norm for name, norm in look.items() if name.endswith("weight")) for look in looks]


MAJORITY = 4_553 / 28_056  # who always says "fourteen" is right so often


@pytest.mark.slow
def test_twelve_sigmoid_layers_stall_at_the_majority_class_since_the_first_sees_no_gradient(
    train: Train, tmp_path: Path
) -> None:
    ledger = train("krk_sigmoid12")
    events = read_lines(tmp_path / "krk-sigmoid12/events.jsonl")
    assert evaluations(ledger)[-1]["val/accuracy"] == pytest.approx(MAJORITY, abs=0.02)
    assert max(first_layer_gradients(events)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accuracy"), [("krk_relu12", 0.55), ("krk_residual12", 0.75)])
def test_twelve_layers_learn_with_relu_and_batch_norm_and_more_so_with_residual_blocks(
    train: Train, name: str, accuracy: float
) -> None:
    assert best(train(name), "val/accuracy")["val/accuracy"] > accuracy

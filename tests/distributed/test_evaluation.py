"""Validation scores: those of a plain pass over the whole split, at any number of ranks, also ranks without rows."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.catalogue.classification.metrics import Auc, AveragePrecision
from harness.loop import evaluate, train_step
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits
from harness.strategy.build import DTYPES
from tests.distributed.ranks import run_standing_ranks
from tests.distributed.scenarios import Spec, assemble_spec

pytestmark = pytest.mark.slow

WORLDS = (1, 2, 8)
NUM_UPDATES = 3


@dataclass(frozen=True)
class ScoreSpec(Spec):
    """A network with BatchNorm, and validation rows of its own."""

    rows: int = 64  # 16 a batch: at least two for every one of 8 ranks, as BatchNorm wants
    validation_rows: int = 37  # no multiple of anything

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5 if self.is_classification else 2)
        )

    def splits(self) -> DataSplits:
        generator = torch.Generator().manual_seed(1)
        train, validation = (
            Columns(torch.randn(rows, 10, generator=generator), self._targets(rows, generator))
            for rows in (self.rows, self.validation_rows)
        )
        return DataSplits(train, validation, (10,), 5 if self.is_classification else 2)

    def _targets(self, rows: int, generator: torch.Generator) -> Tensor:
        if self.is_classification:
            return torch.randint(5, (rows,), generator=generator)
        return torch.randn(rows, 2, generator=generator)


SCORED = (("positive_class", 2), ("confusion_matrix", True))
CLASSES, NUMBERS = ScoreSpec(network="norm_mlp", task=SCORED), ScoreSpec()


@dataclass
class Evaluated:
    """What one rank saw of an evaluation."""

    scores: dict[str, Any]
    before: dict[str, Tensor]
    """This rank's whole state."""
    after: dict[str, Tensor]
    is_training: set[bool]
    """Of every module afterwards."""
    warnings: list[str]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def train_then_evaluate(spec: ScoreSpec) -> Evaluated:
    run = assemble_spec(spec)
    for position in range(NUM_UPDATES):  # BatchNorm's statistics move apart: each rank has rows of its own
        train_step(run, position, run.strategy.tensor(0.01, dtype=torch.float64))
    before = state_of(run.strategy.module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = evaluate(run, step=0)
    modes = {module.training for module in run.strategy.model.modules()}
    return Evaluated(scores, before, state_of(run.strategy.module), modes, [str(w.message) for w in caught])


@cache
def evaluated(spec: ScoreSpec, world_size: int) -> list[Evaluated]:
    found: list[Evaluated] = run_standing_ranks(world_size, train_then_evaluate, spec)
    return found


def plain_scores(spec: ScoreSpec, state: dict[str, Tensor]) -> dict[str, Any]:
    """The definitions, on the whole split at once, of a network with this state."""
    dtype = DTYPES[spec.precision]
    model = spec.model().to(dtype)
    model.load_state_dict(state)
    columns = spec.splits().validation
    with torch.no_grad():
        outputs = model.eval()(columns.inputs.to(dtype))
    if spec.is_classification:
        return classification_scores(outputs, columns.targets, positive=dict(spec.task).get("positive_class"))
    targets = columns.targets.to(dtype)
    mse, mae = F.mse_loss(outputs, targets).item(), F.l1_loss(outputs, targets).item()
    # numpy's division: without variation there is nothing to explain, and the answer is not finite
    with np.errstate(divide="ignore", invalid="ignore"):
        residual, variation = (outputs - targets).square().sum(0), (targets - targets.mean(0)).square().sum(0)
        r2 = float(np.mean(1 - residual.double().numpy() / variation.double().numpy()))
    return {"val/loss": mse, "val/mse": mse, "val/mae": mae, "val/r2": r2}


def classification_scores(outputs: Tensor, targets: Tensor, *, positive: int | None) -> dict[str, Any]:
    """By counting, in plain python."""
    predicted = outputs.argmax(dim=1).tolist()
    pairs = list(zip(targets.tolist(), predicted, strict=True))

    def f1(c: int) -> float:
        hits = sum(true == found == c for true, found in pairs)
        return 2 * hits / sum((true == c) + (found == c) for true, found in pairs) if hits else 0.0

    scores: dict[str, Any] = {
        "val/loss": F.cross_entropy(outputs, targets).item(),
        "val/accuracy": sum(true == found for true, found in pairs) / len(pairs),
        "val/macro_f1": np.mean([f1(c) for c in {c for pair in pairs for c in pair}]),
    }
    if positive is None:
        return scores
    matrix = [[sum(pair == (true, found) for pair in pairs) for found in range(5)] for true in range(5)]
    hits, num_predicted, num_true = matrix[positive][positive], predicted.count(positive), sum(matrix[positive])
    chances = outputs.double().softmax(dim=1)[:, positive].tolist()
    of_class = [chance for chance, (true, _) in zip(chances, pairs, strict=True) if true == positive]
    others = [chance for chance, (true, _) in zip(chances, pairs, strict=True) if true != positive]
    auc = average_precision = math.nan
    if of_class and others:
        # How often a row of the class is ranked above another; how pure the rows are down to each row of the class.
        auc = np.mean([(a > b) + 0.5 * (a == b) for a in of_class for b in others])
        average_precision = np.mean([sum(b >= a for b in of_class) / sum(b >= a for b in chances) for a in of_class])
    return {
        **scores,
        "val/f1": f1(positive),
        "val/precision": hits / num_predicted if num_predicted else 0.0,
        "val/recall": hits / num_true if num_true else 0.0,
        "val/auc": auc,
        "val/average_precision": average_precision,
        "val/confusion_matrix": matrix,
    }


def assert_scores(found: dict[str, Any], wanted: dict[str, Any], *, rel: float) -> None:
    assert found.keys() == wanted.keys()
    for name, score in wanted.items():
        if name == "val/confusion_matrix":
            assert found[name] == score
        elif math.isfinite(score):
            assert found[name] == pytest.approx(score, rel=rel, abs=rel), name
        else:
            assert not math.isfinite(found[name]), name


@pytest.mark.parametrize("spec", [CLASSES, NUMBERS], ids=["classification", "regression"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_scores_are_those_of_a_plain_pass_over_the_whole_split(world_size: int, spec: ScoreSpec) -> None:
    ranks = evaluated(spec, world_size)
    wanted = plain_scores(spec, ranks[0].before)
    assert_scores(ranks[0].scores, wanted, rel=1e-6)
    numbers = {name for name in wanted if name != "val/confusion_matrix"}
    assert numbers == set(spec.config.task.metric_names), "what can drive early stopping is what an evaluation has"


@pytest.mark.parametrize("network", ["norm_mlp", "mlp"])
@pytest.mark.parametrize("validation_rows", [1, 3, 16])
def test_ranks_without_validation_rows_change_nothing(validation_rows: int, network: str) -> None:
    task = SCORED if network == "norm_mlp" else ()
    spec = ScoreSpec(network=network, validation_rows=validation_rows, task=task)
    ranks = evaluated(spec, 8)
    assert_scores(ranks[0].scores, plain_scores(spec, ranks[0].before), rel=1e-6)


@pytest.mark.parametrize("world_size", [1, 8])
def test_a_weighted_validation_loss_is_torchs_mean_over_the_whole_split(world_size: int) -> None:
    weights = (0.2, 1.0, 5.0, 0.7, 30.0)
    spec = ScoreSpec(network="norm_mlp", task=(("class_weights", weights), ("label_smoothing", 0.1)))
    found = evaluated(spec, world_size)[0]
    model, columns = spec.model(), spec.splits().validation
    model.load_state_dict(found.before)
    with torch.no_grad():
        outputs = model.eval()(columns.inputs)
    wanted = F.cross_entropy(outputs, columns.targets, weight=torch.tensor(weights), label_smoothing=0.1).item()
    assert found.scores["val/loss"] == pytest.approx(wanted, rel=1e-6)


def test_in_double_precision_nothing_but_rounding_is_left() -> None:
    spec = ScoreSpec(precision="fp64")
    ranks = evaluated(spec, 8)
    assert_scores(ranks[0].scores, plain_scores(spec, ranks[0].before), rel=1e-12)


@pytest.mark.parametrize("metric", [Auc, AveragePrecision])
def test_rows_of_which_a_network_is_nearly_certain_are_still_ranked(metric: type[Auc | AveragePrecision]) -> None:
    margins = torch.tensor([20.0, 22.0, 24.0, 26.0])  # in single precision the probability is 1 in all
    score = metric(1)
    score.update(torch.stack([-margins, torch.zeros(4)], dim=1), torch.tensor([0, 0, 1, 1]))
    assert float(score.compute()) == 1.0


EVERY_EVALUATION = pytest.mark.parametrize(
    ("spec", "world_size"),
    [
        *[(spec, world_size) for spec in (CLASSES, NUMBERS) for world_size in WORLDS],
        (ScoreSpec(network="norm_mlp", validation_rows=3, task=SCORED), 8),
        (ScoreSpec(validation_rows=3), 8),
    ],
)


@EVERY_EVALUATION
def test_every_rank_has_the_same_scores_to_the_bit(spec: ScoreSpec, world_size: int) -> None:
    ranks = evaluated(spec, world_size)
    assert all(repr(rank.scores) == repr(ranks[0].scores) for rank in ranks)  # NaN is not equal to itself


@EVERY_EVALUATION
def test_no_warning_escapes(spec: ScoreSpec, world_size: int) -> None:
    assert [text for rank in evaluated(spec, world_size) for text in rank.warnings] == []


@EVERY_EVALUATION
def test_the_model_goes_on_in_training_mode(spec: ScoreSpec, world_size: int) -> None:
    assert [rank.is_training for rank in evaluated(spec, world_size)] == [{True}] * world_size


@EVERY_EVALUATION
def test_evaluation_leaves_the_parameters_and_rank_zeros_statistics_untouched(spec: ScoreSpec, world_size: int) -> None:
    ranks = evaluated(spec, world_size)
    parameters = [name for name, _ in spec.model().named_parameters()]
    assert all(torch.equal(rank.before[name], rank.after[name]) for rank in ranks for name in parameters)
    assert all(torch.equal(tensor, ranks[0].after[name]) for name, tensor in ranks[0].before.items())


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_every_rank_evaluates_with_the_batch_norm_statistics_of_rank_zero(world_size: int) -> None:
    ranks = evaluated(CLASSES, world_size)
    for statistic in ("1.running_mean", "1.running_var"):
        assert not torch.equal(ranks[1].before[statistic], ranks[0].before[statistic]), "they are to differ before"
        assert all(torch.equal(rank.after[statistic], ranks[0].before[statistic]) for rank in ranks)

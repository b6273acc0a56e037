"""The average of the weights: its formula, under every strategy, through checkpoints, in evaluations and exports."""

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config.io import load_config
from harness.errors import CheckpointError
from harness.export import load_exported, main
from harness.loop import evaluate
from harness.observers.ledger import read_lines
from tests.distributed.ranks import run_ranks, run_standing_ranks
from tests.distributed.scenarios import (
    PoisonedSpec,
    Spec,
    assemble_spec,
    cost_of_spec,
    load_and_train,
    plain_pytorch,
    save_after,
    train_main,
    train_updates,
)
from tests.distributed.test_checkpoints import rewrite
from tests.distributed.test_export import write_config
from tests.sections import load

DECAY = 0.7
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
every_strategy = pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(stage, marks=pytest.mark.slow) for stage in STRATEGIES[1:])]
)
State = dict[str, Tensor]


def a_spec(**options: Any) -> Spec:
    return Spec(**{"network": "odd", "ema_decay": DECAY, **options})


def state_of(run: Any, kind: str) -> State:
    return {
        key.removeprefix(kind): tensor.detach().cpu().clone()
        for key, tensor in run.strategy.state()
        if key.startswith(kind)
    }


def weights_and_averages(spec: Spec) -> tuple[list[State], list[State]]:
    """Return the trainable weights, and their average, after every update."""
    run, weights, averages = assemble_spec(spec), [], []
    for position in range(spec.updates):
        train_updates(run, range(position, position + 1))
        weights.append({name: state_of(run, "model/")[name] for name in run.strategy.parameter_names})
        averages.append(state_of(run, "ema/weight/"))
    return weights, averages


@every_strategy
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_average_is_the_sum_of_its_formula(strategy: str, world_size: int) -> None:
    for weights, averages in run_standing_ranks(world_size, weights_and_averages, a_spec(strategy=strategy)):
        for n in range(1, len(weights) + 1):
            shares = [DECAY ** (n - k) for k in range(1, n + 1)]
            for name, average in averages[n - 1].items():
                parts = [share * of_update[name].double() for share, of_update in zip(shares, weights, strict=False)]
                wanted = sum(parts[1:], start=parts[0]) / sum(shares)
                torch.testing.assert_close(average.double(), wanted, rtol=0, atol=1e-6)
            assert averages[n - 1].keys() == weights[0].keys(), "what is frozen has no average"
        assert torch.equal(averages[0]["first.weight"], weights[0]["first.weight"]), "the first weights never count"
        assert not torch.allclose(averages[-1]["first.weight"], weights[-1]["first.weight"], atol=1e-5)


@dataclass(frozen=True)
class PoisonedSpecWithAverage(PoisonedSpec):
    ema_decay: float | None = DECAY


def averages_around(spec: Spec, positions: int) -> list[tuple[bool, float, State]]:
    """Return of every attempted update whether it was applied, and the count and the average after it."""
    run, found = assemble_spec(spec), []
    update = run.strategy.update

    def note(learning_rate: Tensor, **options: Any) -> Any:
        report = update(learning_rate, **options)
        assert run.strategy.average is not None
        found.append((bool(report.applied), run.strategy.average.count.item(), state_of(run, "ema/weight/")))
        return report

    run.strategy.update = note  # type: ignore[method-assign]
    train_updates(run, range(positions))
    return found


@every_strategy
def test_a_skipped_update_does_not_move_the_average(strategy: str) -> None:
    spec = PoisonedSpecWithAverage(strategy=strategy, poisoned_rows=(5, 17, 40), updates=8)
    (found, _) = run_standing_ranks(2, averages_around, spec, 10)
    applied = [is_applied for is_applied, _, _ in found]
    assert {True, False} == set(applied)
    assert [count for _, count, _ in found] == [sum(applied[: n + 1]) for n in range(10)]
    for (_, _, before), (is_applied, _, after) in pairwise(found):
        assert all(torch.equal(before[name], after[name]) for name in before) is not is_applied
        assert all(tensor.isfinite().all() for tensor in after.values())


def test_an_update_that_is_averaged_reads_nothing_to_the_host(tmp_path: Path) -> None:
    for cost in run_ranks(2, cost_of_spec, Spec(updates=1000, rows=640, ema_decay=0.9), str(tmp_path)):
        assert "host reads" not in cost["updates"]
        assert {name for name in cost["updates"] if name.startswith("c10d")} == {"c10d::allreduce_"}


def evaluated(spec: Spec) -> tuple[float, State, State, State]:
    """Return the loss of an evaluation after some updates, the weights before and after it, and the average."""
    run = assemble_spec(spec)
    train_updates(run, range(spec.updates))
    before, average = state_of(run, "model/"), state_of(run, "ema/weight/")
    loss = evaluate(run, step=0)["val/loss"]
    after = state_of(run, "model/")
    train_updates(run, range(spec.updates, spec.updates + 1))
    return loss, before, after, average


@every_strategy
@pytest.mark.parametrize("kept_whole", [0, 60])  # under ZeRO-3 every weight is cut up, or the small ones are not
def test_the_average_is_evaluated_and_the_weights_come_back_to_the_same_bits(strategy: str, kept_whole: int) -> None:
    spec = a_spec(strategy=strategy, kept_whole=kept_whole)
    without = replace(spec, ema_decay=None)
    wanted = run_standing_ranks(2, save_after_evaluation, without)[0]
    for loss, before, after, average in run_standing_ranks(2, evaluated, spec):
        assert all(torch.equal(before[name], after[name]) for name in before)
        network, columns = spec.model().eval(), spec.columns()
        network.load_state_dict({**before, **average}, strict=False)
        by_hand = torch.nn.functional.mse_loss(network(columns.inputs), columns.targets).item()
        assert loss == pytest.approx(by_hand, rel=1e-6)
    found = run_standing_ranks(2, save_after_evaluation, spec)[0]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted), "training goes on as if nothing had been"


def save_after_evaluation(spec: Spec) -> State:
    """Return weights and moments after an evaluation and an update that comes after it."""
    run = assemble_spec(spec)
    train_updates(run, range(4))
    evaluate(run, step=0)
    train_updates(run, range(4, 6))
    return {**state_of(run, "model/"), **state_of(run, "optim/")}


@pytest.mark.slow
def test_an_average_goes_round_all_strategies_and_world_sizes_bit_for_bit(tmp_path: Path) -> None:
    ring = [("ddp", 2), ("zero1", 1), ("zero2", 2), ("zero3", 4), ("ddp", 1)]
    strategy, world_size = ring[0]
    saved = run_standing_ranks(world_size, save_after, a_spec(strategy=strategy), str(tmp_path / "0"), 3)[0]
    assert saved["ema/count"] == 3
    for hop, (strategy, world_size) in enumerate(ring[1:], start=1):
        spec = a_spec(strategy=strategy)
        before, after = str(tmp_path / str(hop - 1)), str(tmp_path / str(hop))
        loaded, _, _ = run_standing_ranks(world_size, load_and_train, spec, before, 3, after)[0]
        assert loaded.keys() == saved.keys()
        for key, tensor in saved.items():
            assert torch.equal(loaded[key], tensor), f"{key} at {strategy} on {world_size} ranks"


@every_strategy
def test_a_resumed_average_has_the_bits_of_one_left_alone(tmp_path: Path, strategy: str) -> None:
    spec = a_spec(strategy=strategy)
    run_standing_ranks(2, save_after, spec, str(tmp_path / "cut"), 3)
    wanted = run_standing_ranks(2, save_after, spec, str(tmp_path / "whole"), 7)[0]
    _, found, losses = run_standing_ranks(2, load_and_train, spec, str(tmp_path / "cut"), 7)[0]
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    assert losses == pytest.approx(plain_pytorch(spec).losses[3:7], rel=1e-5), "averaging changes no update"


@every_strategy
def test_an_average_may_begin_or_end_where_a_run_is_resumed(tmp_path: Path, strategy: str) -> None:
    without, spec = a_spec(strategy=strategy, ema_decay=None), a_spec(strategy=strategy)
    run_standing_ranks(1, save_after, without, str(tmp_path / "a"), 3)
    first, last, _ = run_standing_ranks(1, load_and_train, spec, str(tmp_path / "a"), 5)[0]
    assert (first["ema/count"], last["ema/count"]) == (0, 2)
    assert all(torch.equal(first[f"ema/weight/{name}"], first[f"model/{name}"]) for name in ("first.bias", "last.bias"))
    run_standing_ranks(1, save_after, spec, str(tmp_path / "b"), 3)
    first, _, losses = run_standing_ranks(1, load_and_train, without, str(tmp_path / "b"), 5)[0]
    assert not any(key.startswith("ema/") for key in first)
    assert all(math.isfinite(loss) for loss in losses)


def restore_as_said(spec: Spec, directory: str) -> str:
    run = assemble_spec(spec, directory)
    loaded = run.checkpoints.load()
    assert loaded is not None
    with pytest.raises(CheckpointError) as caught:
        run.checkpoints.restore(loaded)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight/last.bias": torch.zeros(3)}, "weight/last.bias: saved [3], wanted [1]"),
        ({"weight/nothing": torch.zeros(1)}, "weight/nothing: saved [1], wanted none"),
        ({"count": torch.zeros(2)}, "count: saved [2], wanted []"),
        ({"count": torch.tensor(3)}, "ema/count: saved as I64, wanted BF16 or F16 or F32 or F64"),
        ({"count": torch.tensor(-1.0)}, "ema/count: saved -1.0, wanted a count"),
        ({"count": torch.tensor(torch.nan)}, "ema/count: saved nan, wanted a count"),
    ],
)
def test_an_average_of_another_size_or_of_no_number_of_updates_is_refused(
    tmp_path: Path, change: State, sentence: str
) -> None:
    run_standing_ranks(1, save_after, a_spec(), str(tmp_path), 3)
    checkpoint = tmp_path / "checkpoints/step-00000003"
    rewrite(checkpoint, "ema-00000.safetensors", lambda tensors: tensors.update(change))
    (said,) = run_standing_ranks(1, restore_as_said, a_spec(), str(tmp_path))
    assert "1 tensors differ" in said
    assert sentence in said


@every_strategy
def test_the_average_is_exported_with_the_live_buffers(strategy: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, strategy)
    assert run_ranks(2, train_main, str(config), "ema.decay=0.9", "run.max_steps=10") == [0, 0]
    assert main([str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--from", "latest"]) == 0
    metrics = json.loads((tmp_path / "out/config.json").read_bytes())["metrics"]
    evaluations = [line for line in read_lines(tmp_path / "run/ledger.jsonl") if line["event"] == "evaluation"]
    assert evaluations[-1]["metrics"] == metrics
    loaded = load_config(str(config)).config
    rows = load(loaded.data, loaded.task, seed=loaded.run.seed).validation
    with torch.no_grad():
        outputs = load_exported(tmp_path / "out")(rows.inputs.float())
    loss = torch.nn.functional.mse_loss(outputs, rows.targets.float()).item()
    assert loss == pytest.approx(metrics["val/loss"], rel=1e-5)

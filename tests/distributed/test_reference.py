"""The arithmetic of an update, against plain PyTorch on the whole global batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.schedule import learning_rate
from tests.distributed.ranks import run_standing_ranks
from tests.distributed.scenarios import Spec, Trace, harness_trace, plain_pytorch
from tests.distributed.test_loop import plan_of

WORLDS = (1, 2, 4, pytest.param(8, marks=pytest.mark.slow))


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def assert_same(found: Trace, wanted: Trace, *, gradient: float, norm: float, parameter: float) -> None:
    assert len(found.gradients) == len(wanted.gradients) > 0
    differences = [largest_difference(f, w) for f, w in zip(found.gradients, wanted.gradients, strict=True)]
    worst = max(difference / max(1.0, norm) for difference, norm in zip(differences, wanted.norms, strict=True))
    assert worst <= gradient, f"an element of a gradient differs by {worst:.1e} of the gradient's norm"
    assert found.norms == pytest.approx(wanted.norms, rel=norm, abs=norm)
    assert found.coefficients == pytest.approx(wanted.coefficients, rel=norm, abs=norm)
    assert found.losses == pytest.approx(wanted.losses, rel=norm, abs=norm)
    worst = largest_difference(found.parameters, wanted.parameters)
    assert worst <= parameter, f"a parameter differs by {worst:.1e}"


def assert_ranks_agree(traces: list[Trace]) -> None:
    for trace in traces[1:]:
        assert largest_difference(trace.parameters, traces[0].parameters) == 0.0
        assert (trace.norms, trace.losses) == (traces[0].norms, traces[0].losses)


def test_the_few_updates_of_a_spec_are_of_every_kind() -> None:
    spec, plan = Spec(), plan_of(Spec())
    assert [plan.rows_at(position) for position in range(spec.updates)] == [16, 16, 16, 16, 3, 16, 16]
    options = {"peak_lr": 1.0, "total_updates": spec.updates, "updates_per_epoch": plan.steps_per_epoch}
    rates = [learning_rate(update, spec.config.schedule, **options) for update in range(1, spec.updates + 1)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.25]), "a warm-up, and a cosine that falls"
    assert max(plain_pytorch(spec).coefficients) < 1, "every one is clipped"


NETWORKS = ("mlp", "cnn", "gpt")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_an_update_is_that_of_plain_pytorch_on_the_whole_batch(world_size: int, network: str) -> None:
    # One and two micro-batches take turns along both, so each meets every number of ranks and every network.
    accumulation = 1 + (world_size.bit_length() + NETWORKS.index(network)) % 2
    spec = Spec(network=network, micro_batch=16 // world_size // accumulation)
    traces = run_standing_ranks(world_size, harness_trace, spec)
    assert_ranks_agree(traces)
    assert_same(traces[0], plain_pytorch(spec), gradient=1e-7, norm=1e-6, parameter=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_every_strategy_makes_the_same_update(strategy: str) -> None:
    spec = Spec(strategy=strategy, micro_batch=4)
    traces = run_standing_ranks(2, harness_trace, spec)
    assert_ranks_agree(traces)
    assert_same(traces[0], plain_pytorch(spec), gradient=1e-6, norm=1e-6, parameter=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_in_double_precision_nothing_but_rounding_is_left(world_size: int, optimizer: str) -> None:
    spec = Spec(precision="fp64", micro_batch=2, optimizer=optimizer)
    traces = run_standing_ranks(world_size, harness_trace, spec)
    assert_same(traces[0], plain_pytorch(spec), gradient=1e-14, norm=1e-12, parameter=1e-12)


WEIGHTED = (("class_weights", (0.2, 1.0, 5.0, 0.7, 30.0)), ("label_smoothing", 0.1))


@pytest.mark.parametrize("task", [WEIGHTED, WEIGHTED[:1], WEIGHTED[1:], (("class_weights", "balanced"),)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_weighted_loss_is_torchs_mean_over_the_whole_batch(
    world_size: int, task: tuple[tuple[str, Any], ...]
) -> None:
    # The last batch of an epoch has 7 rows: on three ranks 2, 2 and 3, in two micro-batches.
    spec = Spec(network="deep_mlp", task=task, global_batch=12, micro_batch=2, precision="fp64")
    traces = run_standing_ranks(world_size, harness_trace, spec)
    assert_ranks_agree(traces)
    assert_same(traces[0], plain_pytorch(spec), gradient=1e-14, norm=1e-12, parameter=1e-12)


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
@pytest.mark.parametrize("rows", [1, 67])
def test_a_weighted_loss_is_that_mean_under_every_strategy_and_on_ranks_without_rows(rows: int, strategy: str) -> None:
    spec = Spec(network="deep_mlp", task=WEIGHTED, rows=rows, global_batch=12, strategy=strategy, optimizer="sgd")
    traces = run_standing_ranks(3, harness_trace, spec)
    assert_same(traces[0], plain_pytorch(spec), gradient=1e-6, norm=5e-6, parameter=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 17, 64])
def test_ranks_without_rows_change_nothing(rows: int) -> None:
    spec = Spec(rows=rows, precision="fp64", updates=6, micro_batch=2)
    traces = run_standing_ranks(8, harness_trace, spec)
    assert_same(traces[0], plain_pytorch(spec), gradient=1e-14, norm=1e-12, parameter=1e-12)


def test_one_rank_gives_the_bits_of_the_hand_written_loop() -> None:
    spec = Spec(rows=64)
    found, wanted = run_standing_ranks(1, harness_trace, spec)[0], plain_pytorch(spec)
    assert largest_difference(found.parameters, wanted.parameters) == 0.0


def test_without_clipping_the_norm_is_still_that_of_the_whole_gradient() -> None:
    spec = Spec(max_norm=None, updates=5)
    found, wanted = run_standing_ranks(4, harness_trace, spec)[0], plain_pytorch(spec)
    assert found.norms == pytest.approx(wanted.norms, rel=1e-6)
    assert set(found.coefficients) == {1.0}


def traces(specs: list[Spec]) -> list[Trace]:
    found = []
    for spec in specs:
        torch.manual_seed(0)  # of the dropout
        found.append(harness_trace(spec))
    return found


def test_activations_computed_again_are_those_of_the_first_time_also_where_a_rank_has_no_row() -> None:
    kept = Spec(network="gpt_dropout", rows=17, updates=4)
    kept_trace, again = run_standing_ranks(4, traces, [kept, replace(kept, activation_checkpointing=True)])[0]
    assert again.losses == kept_trace.losses
    assert again.norms == kept_trace.norms
    for name, weights in kept_trace.parameters.items():
        assert torch.equal(again.parameters[name], weights)

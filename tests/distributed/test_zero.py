"""ZeRO-1, 2 and 3 against plain PyTorch, against DDP, and across one another's checkpoints."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.observers.ledger import read_lines
from tests.distributed.ranks import run_ranks, run_standing_ranks
from tests.distributed.scenarios import (
    MODELS,
    PoisonedSpec,
    Spec,
    Trace,
    build_with,
    fit_spec,
    harness_trace,
    load_and_train,
    plain_pytorch,
    save_after,
    train_main,
    weights_after_evaluation,
)
from tests.distributed.test_loop import plan_of
from tests.distributed.test_reference import assert_ranks_agree, assert_same
from tests.distributed.test_saving import write_config

pytestmark = pytest.mark.slow  # test_reference.py has one test of each stage for the quick tier

STAGES = ("zero1", "zero2", "zero3")
STRATEGIES = ("ddp", *STAGES)
SavedBy = Callable[[str, str], tuple[str, dict[str, Tensor]]]
# A bias before BatchNorm and the bias of attention's keys have no gradient but rounding, which Adam would scale up.
OPTIMIZER = {
    **{"mlp": "adamw", "cnn": "adamw", "odd": "adamw", "norm_mlp": "sgd", "transformer": "sgd"},
    **{"gpt": "sgd", "gpt_swiglu": "sgd", "gpt_experts": "sgd", "gpt_ngrams": "sgd"},
}


@pytest.mark.parametrize(
    ("network", "accumulation"),
    [
        ("mlp", 3),
        ("cnn", 1),
        ("cnn", 3),
        ("transformer", 3),
        ("odd", 3),
        ("gpt", 3),
        ("gpt_swiglu", 1),
        ("gpt_experts", 3),
        ("gpt_ngrams", 3),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_update_is_that_of_plain_pytorch_under_every_strategy(
    strategy: str, network: str, accumulation: int
) -> None:
    optimizer = OPTIMIZER[network]
    micro_batch = 12 // accumulation
    spec = Spec(strategy=strategy, network=network, optimizer=optimizer, global_batch=24, micro_batch=micro_batch)
    traces = run_standing_ranks(2, harness_trace, spec)
    assert_ranks_agree(traces)
    assert_same(traces[0], plain_pytorch(spec), gradient=1e-6, norm=1e-6, parameter=1e-5)


@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_kind_of_network_learns_as_under_plain_pytorch_under_every_strategy(strategy: str, network: str) -> None:
    has_batch_norm = network == "robust_mlp"
    spec = Spec(strategy=strategy, network=network, optimizer="sgd", rows=80, micro_batch=None if has_batch_norm else 4)
    traces = run_standing_ranks(2, harness_trace, spec)
    assert_ranks_agree(traces)
    wanted = plain_pytorch(spec, num_slices=2 if has_batch_norm else 1)
    assert_same(traces[0], wanted, gradient=1e-6, norm=1e-6, parameter=1e-5)


AT_8 = {"zero1": "transformer", "zero2": "gpt", "zero3": "cnn"}


@pytest.mark.parametrize("network", ["mlp", "cnn", "norm_mlp", "gpt", "transformer"])
@pytest.mark.parametrize("strategy", STAGES)
def test_an_update_is_that_of_plain_pytorch_at_every_world_size(strategy: str, network: str) -> None:
    # Every stage meets every network, and 1, 4 and 8 ranks.
    world_size = 1 if network == "mlp" else 8 if network == AT_8[strategy] else 4
    # The third and last batch of an epoch has 19 rows.
    spec = Spec(strategy=strategy, network=network, optimizer=OPTIMIZER[network], global_batch=24, updates=4)
    traces = run_standing_ranks(world_size, harness_trace, spec, deadline_seconds=180)
    assert_ranks_agree(traces)
    wanted = plain_pytorch(spec, num_slices=world_size if network == "norm_mlp" else 1)
    assert_same(traces[0], wanted, gradient=1e-6, norm=1e-6, parameter=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_coefficient_that_is_told_is_the_one_that_was_applied_also_where_nothing_is_clipped(
    strategy: str,
) -> None:
    spec = Spec(strategy=strategy, optimizer="sgd", max_norm=2.7)
    trace, wanted = run_standing_ranks(2, harness_trace, spec)[0], plain_pytorch(spec)
    assert_same(trace, wanted, gradient=1e-6, norm=1e-6, parameter=1e-6)
    is_whole = [norm < 2.7 for norm in wanted.norms]
    assert set(is_whole) == {True, False}
    assert [coefficient == 1.0 for coefficient in trace.coefficients] == is_whole


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_norm_sees_each_ranks_rows(strategy: str) -> None:
    spec = Spec(strategy=strategy, network="norm_mlp", optimizer="sgd", rows=80)
    traces = run_standing_ranks(2, harness_trace, spec)
    assert_same(traces[0], plain_pytorch(spec, num_slices=2), gradient=1e-6, norm=1e-6, parameter=1e-5)


@pytest.mark.parametrize("strategy", STAGES)
def test_an_update_with_a_nan_on_one_rank_is_skipped_as_under_ddp(tmp_path: Path, strategy: str) -> None:
    spec = PoisonedSpec(poisoned_rows=(5,), updates=8)
    for kind in ("ddp", strategy):
        (tmp_path / kind).mkdir()
    ddp, zero = (
        run_standing_ranks(2, fit_spec, replace(spec, strategy=kind), str(tmp_path / kind))[0]
        for kind in ("ddp", strategy)
    )
    assert (zero["reason"], zero["step"], zero["position"]) == (ddp["reason"], ddp["step"], ddp["position"])
    assert zero["position"] > zero["step"] == 8
    for name, parameter in ddp["parameters"].items():
        torch.testing.assert_close(zero["parameters"][name], parameter, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: pytest.TempPathFactory) -> SavedBy:
    """Return the folder with a strategy's checkpoint of a network at update 3, and the state that was saved."""

    @cache
    def save(strategy: str, network: str) -> tuple[str, dict[str, Tensor]]:
        folder = str(tmp_path_factory.mktemp("saved"))
        return folder, run_standing_ranks(2, save_after, Spec(strategy=strategy, network=network), folder, 3)[0]

    return save


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gpt_with_tied_embeddings_goes_through_a_checkpoint_of_zero3(saved_by: SavedBy, strategy: str) -> None:
    folder, saved = saved_by("zero3", "gpt")
    assert "model/head.weight" not in saved, "what is tied is saved once"
    loaded, _, losses = run_standing_ranks(2, load_and_train, Spec(strategy=strategy, network="gpt"), folder, 6)[0]
    assert all(torch.equal(loaded[key], tensor) for key, tensor in saved.items())
    assert losses == pytest.approx(plain_pytorch(Spec(network="gpt")).losses[3:6], rel=1e-5)


@pytest.mark.parametrize("loads", STRATEGIES)
@pytest.mark.parametrize("saves", STRATEGIES)
def test_a_checkpoint_of_any_strategy_loads_in_any_other_bit_for_bit(saved_by: SavedBy, saves: str, loads: str) -> None:
    folder, saved = saved_by(saves, "odd")
    assert {key.rpartition("/")[2] for key in saved if key.startswith("optim/")} == {"exp_avg", "exp_avg_sq", "step"}
    loaded, _, losses = run_standing_ranks(2, load_and_train, Spec(strategy=loads, network="odd"), folder, 6)[0]
    assert loaded.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor), key
    assert losses == pytest.approx(plain_pytorch(Spec(network="odd")).losses[3:6], rel=1e-5)


@pytest.mark.parametrize("network", ["transformer", "gpt"])
@pytest.mark.parametrize("strategy", STAGES)
def test_resuming_under_the_same_stage_and_world_size_is_bitwise(tmp_path: Path, strategy: str, network: str) -> None:
    spec = Spec(strategy=strategy, network=network)
    run_standing_ranks(2, save_after, spec, str(tmp_path / "cut"), 3)
    wanted = run_standing_ranks(2, save_after, spec, str(tmp_path / "whole"), 7)[0]
    _, found, _ = run_standing_ranks(2, load_and_train, spec, str(tmp_path / "cut"), 7)[0]
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_is_autocast_with_fp32_weights_and_fp32_reduction_under_every_strategy(strategy: str) -> None:
    spec = Spec(strategy=strategy, network="cnn", optimizer="sgd", precision="bf16")
    trace = run_standing_ranks(2, harness_trace, spec)[0]
    wanted = plain_pytorch(spec, num_slices=2)  # rounded to bf16 row by row, as the ranks do
    assert_same(trace, wanted, gradient=1e-6, norm=1e-5, parameter=1e-5)
    fp32 = plain_pytorch(Spec(network="cnn", optimizer="sgd"))
    assert trace.losses != pytest.approx(fp32.losses, rel=1e-5)
    assert trace.losses == pytest.approx(fp32.losses, rel=2e-2)


@pytest.mark.parametrize("network", ["transformer", "gpt", "gpt_many_experts"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recomputing_activations_changes_no_number(strategy: str, network: str) -> None:
    spec = Spec(strategy=strategy, network=network, optimizer="sgd", updates=2)
    kept, recomputed = (
        run_standing_ranks(2, harness_trace, replace(spec, activation_checkpointing=again))[0]
        for again in (False, True)
    )
    assert recomputed.losses == kept.losses
    assert recomputed.norms == kept.norms


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipping_by_value_limits_every_element_of_the_reduced_gradient(strategy: str) -> None:
    spec = Spec(strategy=strategy, network="odd", max_norm=None, max_value=0.01)
    trace, wanted = run_standing_ranks(2, harness_trace, spec)[0], plain_pytorch(spec)
    assert_same(trace, wanted, gradient=1e-6, norm=1e-6, parameter=1e-5)
    assert all(coefficient < 1 for coefficient in trace.coefficients)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_a_gradient_of_zeros_everything_is_left_by_clipping(strategy: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, clip={"kind": "value", "max_value": 1.0}, strategy={"kind": strategy})
    (tmp_path / "rows.csv").write_text("a,b,y\n" + "0,0,0\n" * 64)  # first biases are 0, and so is the loss
    assert run_ranks(2, train_main, str(config), "run.max_steps=2") == [0, 0]
    updates = [line for line in read_lines(tmp_path / "run/ledger.jsonl") if line["event"] == "update"]
    assert [(line["grad_norm"], line["clip_coefficient"], line["applied"]) for line in updates] == [(0, 1, True)] * 2


@cache  # one for all mutants
def honest_trace(spec: Spec, /) -> Trace:
    trace: Trace = run_standing_ranks(2, harness_trace, spec)[0]
    return trace


@pytest.mark.parametrize(
    "mutant", ["clip_before_the_reduction", "norm_of_the_local_gradient", "loss_averaged_per_rank"]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_reference_catches_the_mutant_under_every_strategy(strategy: str, mutant: str) -> None:
    # 11 rows for 2 ranks: one has 5, the other 6.
    spec = Spec(strategy=strategy, rows=11, updates=1, optimizer="sgd")
    wanted = plain_pytorch(spec)
    tolerance = {"gradient": 1e-6, "norm": 1e-6, "parameter": 1e-7}
    assert_same(honest_trace(spec), wanted, **tolerance)
    with pytest.raises(AssertionError):
        assert_same(run_standing_ranks(2, harness_trace, replace(spec, mutant=mutant))[0], wanted, **tolerance)


@pytest.mark.parametrize("loss_too", [True, False])
@pytest.mark.parametrize("strategy", STAGES)
def test_a_run_gives_up_and_names_rank_and_parameter(tmp_path: Path, strategy: str, loss_too: bool) -> None:
    plan = plan_of(Spec(), world_size=2)
    on_rank_one = tuple(int(plan.sample_ids(position, 1)[0]) for position in (1, 2, 3, 4))
    spec = PoisonedSpec(strategy=strategy, loss_too=loss_too, updates=30, poisoned_rows=on_rank_one)
    results = run_standing_ranks(2, fit_spec, spec, str(tmp_path))
    assert {result["step"] for result in results} == {1}
    (error,) = {result["error"] for result in results}
    assert error.startswith("6 NonFiniteError: ")
    assert "on rank 1 of 2" in error
    assert "first.weight" in error


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_whose_norm_overflows_is_skipped_under_every_strategy(tmp_path: Path, strategy: str) -> None:
    spec = Spec(strategy=strategy, network="steep", optimizer="sgd", max_norm=None)
    results = run_standing_ranks(2, fit_spec, spec, str(tmp_path))
    wanted = dict(spec.model().named_parameters())
    for result in results:
        assert result["step"] == 0
        assert result["error"].startswith("6 NonFiniteError")
        assert all(torch.equal(result["parameters"][name], parameter) for name, parameter in wanted.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_optimization": {"stage": 1}}, "the ZeRO stage of what was built is 1, wanted 2"),
        ({"gradient_clipping": 0.5}, "the clipping norm of what was built is 0.5, wanted 0.05"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            "autocast of what was built is True",
        ),
        ({"bf16": {"enabled": True}}, "the type of the weights"),
        ({"zero_optimization": {"allgather_bucket_size": 7}}, "DeepSpeed refuses what it was given"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_refused_before_the_first_update(
    changes: dict[str, object], words: str
) -> None:
    for said in run_ranks(2, build_with, Spec(strategy="zero2"), changes):
        assert words in said


def test_an_engine_that_is_what_was_asked_for_is_not_refused() -> None:
    assert run_ranks(2, build_with, Spec(strategy="zero2"), {}) == ["", ""]


def test_evaluating_under_zero3_leaves_weights_partitioned() -> None:
    for after_update, after_evaluation, in_all in run_standing_ranks(
        2, weights_after_evaluation, Spec(strategy="zero3")
    ):
        assert in_all == 10 * 64 + 64 + 64 + 1
        assert after_update == after_evaluation == 0


def test_small_weights_may_stay_whole_under_zero3() -> None:
    spec = Spec(strategy="zero3", kept_whole=100_000)
    assert_same(
        run_standing_ranks(2, harness_trace, spec)[0], plain_pytorch(spec), gradient=1e-6, norm=1e-6, parameter=1e-5
    )
    for after_update, _, in_all in run_standing_ranks(2, weights_after_evaluation, spec):
        assert after_update == in_all


def saved_groups(directory: Path) -> Any:
    return json.loads((directory / "checkpoints/step-00000003/trainer.json").read_bytes())["optimizer"]


def test_a_state_goes_round_all_strategies_and_world_sizes_bit_for_bit_and_trains_on_from_each(tmp_path: Path) -> None:
    ring = [("ddp", 8), ("zero1", 4), ("zero2", 2), ("zero3", 8), ("ddp", 1)]
    strategy, world_size = ring[0]
    saved = run_standing_ranks(world_size, save_after, Spec(strategy=strategy, network="odd"), str(tmp_path / "0"), 3)[
        0
    ]
    groups = saved_groups(tmp_path / "0")
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    wanted = plain_pytorch(Spec(network="odd")).losses[3:6]
    for hop, (strategy, world_size) in enumerate(ring[1:], start=1):
        spec, before, after = Spec(strategy=strategy, network="odd"), tmp_path / str(hop - 1), tmp_path / str(hop)
        loaded, _, losses = run_standing_ranks(world_size, load_and_train, spec, str(before), 6, str(after))[0]
        assert loaded.keys() == saved.keys()
        for key, tensor in saved.items():
            assert torch.equal(loaded[key], tensor), f"{key} at {strategy} on {world_size} ranks"
        assert saved_groups(after) == groups, f"at {strategy} on {world_size} ranks"
        assert losses == pytest.approx(wanted, rel=1e-6), f"at {strategy} on {world_size} ranks"

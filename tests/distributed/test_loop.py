"""The loop: closed forms, skipped updates, and what an update costs."""

import json
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.agenda import Agenda
from harness.config.run import Evaluation
from harness.config.run_config import RunConfig
from harness.observers.ledger import read_lines
from harness.ranks import join as joining
from harness.ranks.group import Ranks
from harness.ranks.process import let_go_of_frames
from harness.rows.order import BatchPlan
from harness.schedule import learning_rate
from harness.strategy import build
from tests.distributed.ranks import run_ranks, run_standing_ranks
from tests.distributed.scenarios import (
    PoisonedSpec,
    Spec,
    assemble_spec,
    cost_of_spec,
    evaluate_with_a_liar,
    fit_dirty,
    fit_spec,
    harness_trace,
    load_and_train,
    neuron_update,
    plain_pytorch,
    save_after,
    train_main,
    train_updates,
)
from tests.distributed.test_saving import write_config


@pytest.mark.parametrize("rows", [1, 8])  # on eight ranks: seven without a row, or one row each
@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize(("rate", "weight"), [(0.1, 0.3), (0.01, 0.48)])
def test_one_neuron_learns_as_computed_by_hand(world_size: int, rows: int, rate: float, weight: float) -> None:
    # relu(0.5 * 2 + 0.5) = 1.5; (1.5 - 1)^2 = 0.25; dL/dw = 2 (1.5 - 1) 2 = 2; w - rate * 2
    for found in run_standing_ranks(world_size, neuron_update, rate, rows):
        assert found["loss"] == pytest.approx(0.25, abs=1e-7)
        assert found["gradient"] == pytest.approx(2.0, abs=1e-6)
        assert found["weight"] == pytest.approx(weight, abs=1e-7)


def textbook_script() -> dict[str, Any]:
    """The loop of an introductory chapter: full batch, cosine over 50 epochs, clipping, early stopping."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    torch.manual_seed(42)
    x, y, x_val, y_val = torch.randn(200, 10), torch.randn(200, 1), torch.randn(50, 10), torch.randn(50, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    best, best_epoch, wait, losses, val_losses = math.inf, 0, 0, [], []
    for epoch in range(50):
        model.train()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            val_loss = nn.functional.mse_loss(model(x_val), y_val).item()
        losses.append(loss.item())
        val_losses.append(val_loss)
        if val_loss < best:
            best, best_epoch, wait = val_loss, epoch, 0
        else:
            wait += 1
            if wait >= 5:
                break
    data = {"train": (x, y), "validation": (x_val, y_val)}
    return {"losses": losses, "val_losses": val_losses, "best": best, "best_epoch": best_epoch, "data": data}


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_textbook_loop_as_a_config_stops_at_the_same_epoch(tmp_path: Path, world_size: int) -> None:
    import pandas

    wanted = textbook_script()
    assert wanted["losses"][0] == pytest.approx(1.0200164, abs=1e-6)
    assert wanted["val_losses"][0] == pytest.approx(1.4862860, abs=1e-6)
    assert len(wanted["losses"]) - 1 == 5
    for split, (x, y) in wanted["data"].items():
        frame = pandas.DataFrame(x.numpy(), columns=[f"x{i}" for i in range(10)]).assign(y=y.numpy())
        frame.to_parquet(tmp_path / f"{split}.parquet")
    config = {
        "run": {"name": "textbook", "output_root": str(tmp_path), "seed": 0, "max_epochs": 50},
        "model": {"kind": "mlp", "hidden": [64], "init": "torch"},
        "data": {
            "source": "parquet",
            "path": str(tmp_path / "train.parquet"),
            "validation_path": str(tmp_path / "validation.parquet"),
            "targets": ["y"],
            "global_batch": 200,
        },
        "task": {"kind": "regression"},
        "optim": {"kind": "adam", "peak_lr": 1e-3},
        "schedule": {"kind": "cosine"},
        "clip": {"kind": "norm", "max_norm": 1.0},
        "early_stopping": {"metric": "val/loss", "patience_evaluations": 5},
    }
    (tmp_path / "textbook.yaml").write_text(json.dumps(config))  # JSON is YAML
    assert run_ranks(world_size, train_main, str(tmp_path / "textbook.yaml")) == [0] * world_size
    lines = read_lines(tmp_path / "textbook/ledger.jsonl")
    losses = [line["loss"] for line in lines if line["event"] == "update"]
    val_losses = [line["metrics"]["val/loss"] for line in lines if line["event"] == "evaluation"]
    assert losses == pytest.approx(wanted["losses"], abs=1e-6)
    assert val_losses == pytest.approx(wanted["val_losses"], abs=1e-6)
    assert json.loads((tmp_path / "textbook/exit.json").read_text())["reason"] == "early_stopping"
    best = json.loads((tmp_path / "textbook/checkpoints/BEST").read_text())["step"]
    assert best - 1 == wanted["best_epoch"]
    assert val_losses[best - 1] == pytest.approx(wanted["best"], abs=1e-6)


# ---------------------------------------------------------------- gradients that are not finite


def plan_of(spec: Spec, world_size: int = 1) -> BatchPlan:
    return BatchPlan(
        num_rows=spec.rows, global_batch=spec.global_batch, world_size=world_size, micro_batch=None, seed=3
    )


@pytest.mark.parametrize("loss_too", [True, False])
@pytest.mark.parametrize("world_size", [1, 4])
def test_an_update_with_a_nan_is_skipped_by_all_ranks_and_counts_as_none(
    tmp_path: Path, world_size: int, loss_too: bool
) -> None:
    spec = PoisonedSpec(poisoned_rows=(5,), loss_too=loss_too, updates=8, precision="fp64")
    results = run_standing_ranks(world_size, fit_spec, spec, str(tmp_path))
    assert {(result["reason"], result["step"]) for result in results} == {("budget", 8)}
    plan = plan_of(spec)
    bad = [position for position in range(results[0]["position"]) if 5 in plan.sample_ids(position, 0)]
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if line["event"] == "update"]
    skipped = [line for line in lines if not line["applied"]]
    assert [line["samples_seen"] for line in skipped] == [plan.samples_before(position + 1) for position in bad]
    assert [line["step"] for line in lines if line["applied"]] == list(range(1, 9))
    assert results[0]["position"] == 8 + len(bad)

    # The same by hand: the bad batch is passed over, and the rate goes by the applied updates.
    schedule = spec.config.schedule
    rates = [learning_rate(step, schedule, peak_lr=1e-3, total_updates=8, updates_per_epoch=5) for step in range(1, 9)]
    assert [line["learning_rate"] for line in lines if line["applied"]] == rates
    model, columns = spec.model().double(), spec.columns()
    groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) is d], "weight_decay": w} for d, w in
              ((True, 0.1), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    applied = 0
    for position in range(results[0]["position"]):
        if position in bad:
            continue
        ids = torch.from_numpy(plan.sample_ids(position, 0))
        loss = nn.functional.mse_loss(model(columns.inputs[ids].double()), columns.targets[ids].double())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = rates[applied]
        optimizer.step()
        applied += 1
    for result in results:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result["parameters"][name], parameter.detach(), rtol=0, atol=1e-12)


def test_how_often_reports_are_read_changes_no_bit_even_with_skipped_updates(tmp_path: Path) -> None:
    spec = PoisonedSpec(poisoned_rows=(5, 40), updates=12)
    ends = []
    for every in (1, 3, 100):
        (tmp_path / str(every)).mkdir()
        ends.append(run_standing_ranks(2, fit_spec, spec, str(tmp_path / str(every)), every)[0])
    for end in ends[1:]:
        assert all(torch.equal(end["parameters"][name], p) for name, p in ends[0]["parameters"].items())


@pytest.mark.parametrize("loss_too", [True, False])
def test_a_run_gives_up_after_three_in_a_row_and_names_rank_and_parameter(tmp_path: Path, loss_too: bool) -> None:
    spec = PoisonedSpec(loss_too=loss_too, updates=30)
    plan = plan_of(spec, world_size=4)
    on_rank_two = [int(plan.sample_ids(position, 2)[0]) for position in (1, 2, 3, 4)]
    spec = PoisonedSpec(loss_too=loss_too, updates=30, poisoned_rows=tuple(on_rank_two))
    results = run_standing_ranks(4, fit_spec, spec, str(tmp_path))
    assert {result["step"] for result in results} == {1}
    (error,) = {result["error"] for result in results}
    assert error.startswith("6 NonFiniteError: ")
    assert "on rank 2 of 4" in error
    assert "first.weight" in error
    assert "update 2 " in error
    after_one = run_standing_ranks(4, harness_trace, PoisonedSpec(updates=30), 1)[0].parameters
    for result in results:  # the weights are those after the one good update
        assert all(torch.equal(result["parameters"][name], parameter) for name, parameter in after_one.items())
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if line["event"] == "update"]
    assert [line["applied"] for line in lines] == [True, False, False, False], "the ledger tells how it came to that"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_that_one_rank_was_asked_for_stops_all_at_the_same_update(tmp_path: Path, rank: int) -> None:
    ends = run_standing_ranks(3, fit_spec, Spec(updates=50), str(tmp_path), 10, 0, rank)
    assert {(end["reason"], end["step"]) for end in ends} == {("interrupted", ends[0]["step"])}
    assert 0 < ends[0]["step"] < 50


def fit_at_a_pace_of_ones_own(spec: Spec, directory: str) -> dict[str, Any]:
    """Fit a spec whose ranks believe that they are of very different speed."""
    updates = 3 if os.environ["RANK"] == "0" else 1
    Agenda.updates_in_a_second = lambda _: updates  # type: ignore[method-assign]
    return fit_spec(spec, directory)


def test_the_ranks_of_an_interval_go_by_the_pace_of_rank_zero(tmp_path: Path) -> None:
    run_ranks(2, fit_at_a_pace_of_ones_own, Spec(updates=4), str(tmp_path))
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if line["event"] == "update"]
    # The first interval is of one update, since no pace is known.
    assert [line["step"] for line in lines if "memory_bytes" in line] == [1, 4]


@dataclass(frozen=True)
class OftenEvaluatedSpec(PoisonedSpec):
    """Evaluated at every step."""

    @property
    def config(self) -> RunConfig:
        return super().config.model_copy(update={"evaluation": Evaluation(every_steps=1)})


def test_after_a_skipped_update_the_same_weights_are_not_evaluated_again(tmp_path: Path) -> None:
    spec = OftenEvaluatedSpec(poisoned_rows=(5,), updates=8)
    (result,) = run_ranks(1, fit_spec, spec, str(tmp_path))
    assert result["position"] > result["step"] == 8
    lines = read_lines(tmp_path / "ledger.jsonl")
    assert [line["step"] for line in lines if line["event"] == "evaluation"] == list(range(1, 9))


@dataclass(frozen=True)
class ImagesSpec(Spec):
    """Images of which the last batch of an epoch has one for two ranks, and a network with BatchNorm."""

    network: str = "cnn"
    rows: int = 33
    updates: int = 6  # two epochs

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 6 * 6, 5))


def updates_in_statistics(spec: Spec) -> int:
    """Return how many batches this rank's BatchNorm has seen after the updates of a spec."""
    run = assemble_spec(spec)
    train_updates(run, range(spec.updates))
    return int(dict(run.strategy.module.named_buffers())["1.num_batches_tracked"])


def test_a_rank_without_rows_takes_no_statistics_of_that_update_and_of_every_other() -> None:
    # In two of six updates the first rank has no row.
    assert run_standing_ranks(2, updates_in_statistics, ImagesSpec()) == [4, 6]


def test_an_update_after_a_resume_has_the_bits_of_one_in_an_undisturbed_run(tmp_path: Path) -> None:
    # On more than two ranks the order of a sum depends on the place in DDP's buckets, which it changes after one pass.
    run_standing_ranks(4, save_after, Spec(), str(tmp_path / "cut"), 3)
    wanted = run_standing_ranks(4, save_after, Spec(), str(tmp_path / "whole"), 4)[0]
    _, found, _ = run_standing_ranks(4, load_and_train, Spec(), str(tmp_path / "cut"), 4)[0]
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "muon"])
def test_a_first_update_that_is_skipped_leaves_nothing_behind(tmp_path: Path, optimizer: str) -> None:
    first = tuple(int(row) for row in plan_of(Spec()).sample_ids(0, 0)[:1])
    spec = PoisonedSpec(poisoned_rows=first, updates=3, optimizer=optimizer)
    ends = [end["parameters"] for end in run_ranks(2, fit_dirty, spec, str(tmp_path))]
    for name, parameter in ends[0].items():
        assert torch.equal(ends[1][name], parameter)
        assert parameter.abs().max() < 1
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if line["event"] == "update"]
    assert [line["applied"] for line in lines] == [False, True, True, True]


def test_an_infinite_loss_with_a_finite_gradient_is_skipped_too(tmp_path: Path) -> None:
    spec = PoisonedSpec(poisoned_rows=(5,), updates=4, loss_only=True)
    results = run_standing_ranks(2, fit_spec, spec, str(tmp_path))
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if line["event"] == "update"]
    bad = [position for position in range(len(lines)) if 5 in plan_of(spec).sample_ids(position, 0)]
    assert [position for position, line in enumerate(lines) if not line["applied"]] == bad
    assert bad
    assert {result["step"] for result in results} == {4}


def test_the_norms_of_every_parameter_are_told_when_asked_for(tmp_path: Path) -> None:
    run_standing_ranks(2, fit_spec, Spec(updates=6), str(tmp_path), 10, 3)
    told = [line for line in read_lines(tmp_path / "events.jsonl") if line["event"] == "gradients"]
    assert [line["step"] for line in told] == [3, 6]
    wanted = plain_pytorch(Spec(updates=6)).gradients
    for line in told:
        norms = {name: gradient.norm().item() for name, gradient in wanted[line["step"] - 1].items()}
        assert line["norms"] == pytest.approx(norms, rel=1e-5)


def test_rank_zeros_scores_count_whatever_the_others_compute() -> None:
    honest, *others = run_ranks(3, evaluate_with_a_liar, Spec())
    assert others == [honest, honest]
    assert honest["val/loss"] == pytest.approx(run_ranks(1, evaluate_with_a_liar, Spec())[0]["val/loss"])


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize(("world_size", "precision"), [(1, "fp32"), (2, "fp32"), (2, "fp16")])
def test_an_update_reads_nothing_to_the_host_and_the_interval_reads_once(
    tmp_path: Path, world_size: int, precision: str
) -> None:
    spec = Spec(updates=1000, rows=640, precision=precision)
    for cost in run_ranks(world_size, cost_of_spec, spec, str(tmp_path)):
        assert cost["length"] == 10
        assert "host reads" not in cost["updates"]
        assert cost["settle"]["host reads"] == 1
        collectives = {name: n for name, n in cost["updates"].items() if name.startswith("c10d")}
        assert collectives == ({"c10d::allreduce_": 10} if world_size > 1 else {})  # one bucket: one all-reduce each
        at_the_end = sum(n for name, n in cost["settle"].items() if name.startswith("c10d"))
        assert at_the_end == (1 if world_size > 1 else 0)


def test_class_weights_cost_one_small_collective_an_update_and_no_read(tmp_path: Path) -> None:
    spec = Spec(network="deep_mlp", updates=1000, rows=640, task=(("class_weights", "balanced"),))
    for cost in run_ranks(2, cost_of_spec, spec, str(tmp_path)):
        assert "host reads" not in cost["updates"]
        collectives = {name: n for name, n in cost["updates"].items() if name.startswith("c10d")}
        assert collectives == {"c10d::allreduce_": 10, "c10d::_allgather_base_": 10}


def diverge_and_look_who_lives(config: str) -> tuple[int, list[bool]]:
    """Train to an error; return the exit code, and whether what DDP wrapped lives when the rank leaves the others."""
    wrap, leave = build._wrap, joining.leave_ranks
    wrapped: list[weakref.ref[nn.Module]] = []
    lives: list[bool] = []

    def wrap_and_note(module: nn.Module, ranks: Ranks) -> nn.Module:
        model = wrap(module, ranks)
        wrapped.append(weakref.ref(model))
        return model

    def look_and_leave() -> None:
        lives.extend(model() is not None for model in wrapped)
        leave()

    build._wrap = wrap_and_note
    joining.leave_ranks = look_and_leave
    return train_main(config), lives


def test_errors_that_come_from_each_other_are_let_go_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []

    def clear(frames: object) -> None:
        cleared.append(frames)
        assert len(cleared) <= 60, "there are no more"

    monkeypatch.setattr("traceback.clear_frames", clear)
    first, *others = (ValueError(str(number)) for number in range(60))
    last = first
    for error in others:  # each is raised from the one before, while that is handled
        error.__cause__ = error.__context__ = last
        last = error
    first.__cause__ = last
    let_go_of_frames(last)
    assert len(cleared) == 60


def test_a_run_that_fails_lets_go_of_its_network_before_it_leaves_the_other_ranks(tmp_path: Path) -> None:
    config = write_config(tmp_path, optim={"kind": "sgd", "peak_lr": 1e30})
    assert run_ranks(2, diverge_and_look_who_lives, str(config)) == [(6, [False])] * 2

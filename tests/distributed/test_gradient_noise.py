"""Noise in the gradient: its law, the same on every rank and in every launch, added to the clipped gradient."""

from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config.training import GradientNoise
from harness.strategy.noise import NoiseSource
from tests.distributed.ranks import run_ranks, run_standing_ranks
from tests.distributed.scenarios import (
    PoisonedSpec,
    Spec,
    assemble_spec,
    cost_of_spec,
    fit_spec,
    load_and_train,
    save_after,
    train_updates,
)

ETA, GAMMA = 0.09, 0.55
SPEC = Spec(network="odd", optimizer="sgd", updates=4, max_norm=0.05, noise_eta=ETA)  # a constant rate of 1e-3


def drawn(position: int, size: int = 100_000, *, seed: int = 3) -> Tensor:
    noise = torch.zeros(size)
    NoiseSource(GradientNoise(eta=ETA, gamma=GAMMA), seed=seed, device=noise.device).add([noise], position=position)
    return noise


@pytest.mark.parametrize("position", [0, 1, 99])
def test_the_noise_is_gaussian_with_the_variance_of_its_formula(position: int) -> None:
    noise = drawn(position)
    std = sqrt(ETA / (1 + position) ** GAMMA)
    assert noise.std().item() == pytest.approx(std, rel=0.02)  # 1 / sqrt(2 n) is 0.002
    assert abs(noise.mean().item()) < 5 * std / sqrt(len(noise))
    assert (noise.abs() < std).double().mean().item() == pytest.approx(0.6827, abs=0.01)


def test_the_noise_of_two_positions_or_seeds_has_nothing_in_common() -> None:
    first = drawn(0)
    for other in (drawn(1), drawn(0, seed=4)):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1].item()) < 0.02
    assert torch.equal(first, drawn(0))


def test_the_noise_does_not_depend_on_other_random_numbers_nor_touch_them() -> None:
    torch.manual_seed(1)
    first, state = drawn(0), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(drawn(0), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def first_update(spec: Spec) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float, float]:
    """Return the weights before and after an update, its gradient, clipping coefficient and norm."""
    run = assemble_spec(spec)
    named = {name: p for name, p in run.strategy.module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    torch.manual_seed(run.strategy.rank)  # ranks have random states of their own
    gradients: dict[str, Tensor] = {}
    reports: list[Any] = []
    update = run.strategy.update

    def look(learning_rate: Tensor, *, position: int) -> Any:
        gradients.update({name: gradient.clone() for name, gradient in run.strategy.gradients()})
        reports.append(update(learning_rate, position=position))
        return reports[-1]

    run.strategy.update = look  # type: ignore[method-assign]
    train_updates(run, range(1))
    after = {name: p.detach().clone() for name, p in named.items()}
    return before, after, gradients, reports[0].coefficient.item(), reports[0].total.item()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_update_follows_the_clipped_gradient_and_the_noise(world_size: int) -> None:
    results = run_standing_ranks(world_size, first_update, SPEC)
    generator_of = NoiseSource(GradientNoise(eta=ETA, gamma=GAMMA), seed=3, device=torch.device("cpu"))
    for before, after, gradients, coefficient, norm in results:
        assert coefficient == pytest.approx(SPEC.max_norm / norm, rel=1e-4), "the norm is that without the noise"
        assert coefficient < 1
        steps = {name: coefficient * gradient for name, gradient in gradients.items()}
        generator_of.add(list(steps.values()), position=0)
        for name, step in steps.items():
            decay = 0.1 if before[name].dim() >= 2 else 0.0
            wanted = before[name] - 1e-3 * (step + decay * before[name])
            torch.testing.assert_close(after[name], wanted, rtol=0, atol=1e-7)
            assert torch.equal(after[name], results[0][1][name]), "every rank draws the same"
    quiet = run_standing_ranks(world_size, first_update, replace(SPEC, noise_eta=None))[0]
    assert (quiet[1]["last.bias"] - results[0][1]["last.bias"]).abs().max() > 1e-5


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    spec = replace(SPEC, updates=7)
    run_standing_ranks(2, save_after, spec, str(tmp_path / "cut"), 3)
    wanted = run_standing_ranks(2, save_after, spec, str(tmp_path / "whole"), 7)[0]
    _, found, _ = run_standing_ranks(2, load_and_train, spec, str(tmp_path / "cut"), 7)[0]
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


def test_a_gradient_that_is_not_finite_is_skipped_in_spite_of_noise(tmp_path: Path) -> None:
    spec = PoisonedSpec(poisoned_rows=(5,), updates=8, noise_eta=ETA)
    for result in run_standing_ranks(2, fit_spec, spec, str(tmp_path)):
        assert (result["reason"], result["step"]) == ("budget", 8)
        assert result["position"] > 8
        assert all(parameter.isfinite().all() for parameter in result["parameters"].values())


def test_noise_reads_nothing_to_the_host(tmp_path: Path) -> None:
    for cost in run_ranks(2, cost_of_spec, Spec(updates=1000, rows=640, noise_eta=ETA), str(tmp_path)):
        assert "host reads" not in cost["updates"]
        assert {name for name in cost["updates"] if name.startswith("c10d")} == {"c10d::allreduce_"}

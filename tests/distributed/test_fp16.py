"""fp16 with a scaled loss, against torch's autocast and GradScaler: the same updates, skips and scales everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from harness.observers.ledger import read_lines
from harness.strategy import build
from harness.strategy.loss_scale import LossScale
from tests.distributed.ranks import run_ranks, run_standing_ranks
from tests.distributed.scenarios import PoisonedSpec, Spec, fit_spec, harness_trace, plain_pytorch, train_main
from tests.distributed.test_reference import largest_difference
from tests.distributed.test_saving import write_config
from tests.helpers import plain_ledger

STRATEGIES = ("ddp", *(pytest.param(f"zero{stage}", marks=pytest.mark.slow) for stage in (1, 2, 3)))
TOO_LARGE = (("init_scale", 2.0**24), ("growth_interval", 3))
"""So large that the first updates overflow, and so soon doubled again that later ones do."""


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("network", ["mlp", "cnn", "gpt"])
def test_one_rank_gives_the_bits_of_torchs_own_scaler(network: str, optimizer: str) -> None:
    spec = Spec(network=network, precision="fp16", optimizer=optimizer, rows=64, updates=20, loss_scale=TOO_LARGE)
    (found,), wanted = run_standing_ranks(1, harness_trace, spec), plain_pytorch(spec)
    assert found.scales == wanted.scales
    assert falls_and_rises(found.scales)
    assert largest_difference(found.parameters, wanted.parameters) == 0.0
    assert found.losses == wanted.losses


def falls_and_rises(scales: list[float]) -> bool:
    changes = [after / before for before, after in pairwise(scales)]
    return 0.5 in changes and 2.0 in changes


@pytest.mark.parametrize("network", ["mlp", "cnn", "gpt"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_skips_and_scales_as_torch_does_with_the_same_micro_batches(strategy: str, network: str) -> None:
    spec = Spec(network=network, strategy=strategy, precision="fp16", optimizer="sgd", rows=64, micro_batch=4)
    spec = replace(spec, updates=20, loss_scale=TOO_LARGE)
    traces, wanted = run_standing_ranks(2, harness_trace, spec), plain_pytorch(spec, num_slices=4)
    found = traces[0]
    assert all(trace.scales == wanted.scales for trace in traces)
    applied = [math.isfinite(norm) for norm in wanted.norms]
    assert 5 < sum(applied) < len(applied) - 5
    assert [math.isfinite(norm) for norm in found.norms] == applied
    for index in (index for index, is_applied in enumerate(applied) if is_applied):
        assert found.norms[index] == pytest.approx(wanted.norms[index], rel=1e-5)
        difference = largest_difference(found.gradients[index], wanted.gradients[index])
        assert difference <= 1e-5 * wanted.norms[index]
    assert largest_difference(found.parameters, wanted.parameters) <= 1e-6


def fit_with_scale(spec: Spec, directory: str, scale: float, growth_interval: int) -> dict[str, Any]:
    with patch.object(build, "LossScale", partial(LossScale, scale=scale, growth_interval=growth_interval)):
        return fit_spec(spec, directory, log_every_steps=3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_overflows_cost_updates_and_do_not_end_a_run(strategy: str, tmp_path: Path) -> None:
    spec = Spec(precision="fp16", strategy=strategy, updates=12)
    ended = run_standing_ranks(2, fit_with_scale, spec, str(tmp_path), 2.0**34, 2)[0]
    assert (ended["reason"], ended["step"], ended["error"]) == ("budget", 12, None)
    lines = [line for line in read_lines(tmp_path / "ledger.jsonl") if line["event"] == "update"]
    lost = [line for line in lines if not line["applied"]]
    assert len(lost) == ended["position"] - 12 > 10
    assert [line["loss_scale"] for line in lost[:3]] == [2.0**34, 2.0**33, 2.0**32]
    for line, after in pairwise(lines):
        assert after["loss_scale"] / line["loss_scale"] in ((1.0, 2.0) if line["applied"] else (0.5,))
    events = read_lines(tmp_path / "events.jsonl")
    assert [line["loss_scale"] for line in events if line["event"] == "overflow"] == [
        line["loss_scale"] for line in lost
    ]
    assert not [line for line in events if line["event"] == "nonfinite"]
    assert [line["step"] for line in lines if line["applied"]] == list(range(1, 13))


ALL_ROWS = tuple(range(67))


@pytest.mark.parametrize(("loss_too", "updates"), [(False, 10 + 3), (True, 3)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_no_scale_mends_ends_the_run_and_a_loss_that_is_not_finite_at_once(
    strategy: str, loss_too: bool, updates: int, tmp_path: Path
) -> None:
    spec = PoisonedSpec(precision="fp16", strategy=strategy, poisoned_rows=ALL_ROWS, loss_too=loss_too)
    ended = run_standing_ranks(2, fit_with_scale, spec, str(tmp_path), 2.0**10, 2000)[0]
    assert ended["error"].startswith("6 NonFiniteError")
    assert (ended["step"], ended["position"]) == (0, updates)


def train_with_scale(*arguments: str) -> int:
    with patch.object(build, "LossScale", partial(LossScale, scale=2.0**22, growth_interval=4)):
        return train_main(*arguments)


BUDGET = 12
"""Updates in which the scale falls, rises, falls and rises again."""


def outcome(run: Path) -> tuple[list[dict[str, Any]], list[bytes], dict[str, Any]]:
    newest = run / f"checkpoints/step-{BUDGET:08d}"
    files = [path.read_bytes() for path in sorted(newest.glob("*.safetensors"))]
    lines = [line for line in plain_ledger(run / "ledger.jsonl") if line["event"] == "update"]
    return lines, files, json.loads((newest / "trainer.json").read_bytes())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scaled")
    clip, checkpoint = {"kind": "norm", "max_norm": 1.0}, {"every_steps": 3}
    return str(write_config(folder, strategy={"kind": "ddp", "precision": "fp16"}, checkpoint=checkpoint, clip=clip))


@pytest.fixture(scope="module")
def left_alone(config: str) -> Callable[[str], Path]:
    """Return the directory of a run under a strategy that nobody stops."""

    @cache
    def run(strategy: str) -> Path:
        arguments = (f"run.name=alone-{strategy}", f"strategy.kind={strategy}", f"run.max_steps={BUDGET}")
        assert run_ranks(2, train_with_scale, config, *arguments) == [0, 0]
        return Path(config).parent / f"alone-{strategy}"

    return run


@pytest.mark.parametrize(
    ("strategy", "stops"),  # where one, three and two updates were applied since the scale changed
    [
        ("ddp", (2, 4, 9)),
        *(pytest.param(f"zero{stage}", (stop,), marks=pytest.mark.slow) for stage, stop in ((1, 2), (2, 4), (3, 9))),
    ],
)
def test_a_scaled_run_is_resumed_to_the_same_bits_and_the_same_scale(
    left_alone: Callable[[str], Path], config: str, strategy: str, stops: tuple[int, ...]
) -> None:
    parts = Path(config).parent / f"parts-{strategy}"
    for budget in (*stops, BUDGET):
        arguments = (f"run.name={parts.name}", f"strategy.kind={strategy}", f"run.max_steps={budget}")
        assert run_ranks(2, train_with_scale, config, *arguments) == [0, 0]
    (lines, files, trainer), (found_lines, found_files, found_trainer) = (
        outcome(run) for run in (left_alone(strategy), parts)
    )
    assert found_lines == lines
    assert found_files == files
    assert found_trainer["loss_scale"] == trainer["loss_scale"]
    scales = [line["loss_scale"] for line in lines]
    assert falls_and_rises(scales)


@pytest.mark.slow
def test_a_scaled_run_goes_on_under_every_strategy_and_with_or_without_scaling(
    left_alone: Callable[[str], Path], config: str
) -> None:
    parts = Path(config).parent / "parts"

    def train(budget: int, *arguments: str) -> None:
        arguments = (f"run.name={parts.name}", f"run.max_steps={budget}", *arguments)
        assert run_ranks(2, train_with_scale, config, *arguments) == [0, 0]

    for budget, strategy in ((2, "ddp"), (4, "zero2"), (7, "zero3"), (9, "zero1"), (BUDGET, "ddp")):
        train(budget, f"strategy.kind={strategy}")
    (lines, _, trainer), (found_lines, _, found_trainer) = (outcome(run) for run in (left_alone("ddp"), parts))
    assert [line["loss_scale"] for line in found_lines] == [line["loss_scale"] for line in lines]
    assert [line["loss"] for line in found_lines] == pytest.approx([line["loss"] for line in lines], rel=1e-5)
    assert found_trainer["loss_scale"] == trainer["loss_scale"]
    train(BUDGET + 2, "strategy.precision=fp32")
    train(BUDGET + 4, "strategy.precision=fp16")
    last = [line for line in read_lines(parts / "ledger.jsonl") if line["event"] == "update"]
    by_step = {line["step"]: line for line in last}
    assert "loss_scale" not in by_step[BUDGET + 1]
    first = [line["step"] for line in last].index(BUDGET + 3)
    assert last[first]["loss_scale"] == 2.0**22, "another precision starts anew"

"""What an update costs beside a hand-written torch loop: `make bench`.

Both train the same network on the same rows with the same optimizer, schedule and clipping, in one process and in turn,
so that a busy machine slows both. A second hand-written loop beside the first shows the noise.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.assemble import assemble
from harness.config.run_config import RunConfig
from harness.loop import fit
from harness.observers.base import Observer, Observers
from harness.observers.ledger import Ledger
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits
from harness.state import TrainState
from harness.stopping import StopSignals
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import cost_of_updates, join
from tests.sections import build_model

LOG_EVERY = 10
WORKLOADS: dict[str, dict[str, Any]] = {
    "mlp 10-64-1": {
        "model": {"kind": "mlp", "hidden": [64]},
        "task": {"kind": "regression"},
        "shape": (10,),
        "updates": 400,
    },
    "mnist cnn": {
        "model": {"kind": "cnn", "channels": [16, 32], "hidden": [128], "dropout": 0.25},
        "task": {"kind": "classification", "num_classes": 10},
        "shape": (1, 28, 28),
        "updates": 40,
    },
}
Stamps = list[tuple[float, float]]


class Clock(Observer):
    """Notes (wall, CPU) seconds at the end of every interval."""

    def __init__(self) -> None:
        self.stamps: Stamps = []

    def on_settled(self) -> None:
        self.stamps.append((time.perf_counter(), time.process_time()))


def columns_of(workload: dict[str, Any], rows: int) -> Columns:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, *workload["shape"], generator=generator)
    if workload["task"]["kind"] == "regression":
        return Columns(inputs, torch.randn(rows, 1, generator=generator))
    return Columns(inputs, torch.randint(10, (rows,), generator=generator))


def config_of(workload: dict[str, Any], world_size: int) -> RunConfig:
    values = {
        "run": {"name": "bench", "max_steps": workload["updates"]},
        "model": workload["model"],
        "data": {"source": "mnist_5k", "global_batch": 32 * world_size},
        "task": workload["task"],
        "optim": {"kind": "adamw", "peak_lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 10},
        "clip": {"kind": "norm", "max_norm": 1.0},
        "evaluation": {"every_steps": 10**6},  # updates are what is measured
        "tracking": {"log_every_steps": LOG_EVERY},
    }
    return RunConfig.model_validate(values)


def by_hand(workload: dict[str, Any], columns: Columns, model: nn.Module, world_size: int, rank: int) -> Stamps:
    """The loop that a person writes who knows torch: DDP, fused AdamW, clipping, cosine, a look at the loss."""
    updates, batch = workload["updates"], 32
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.01},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / 10 if t < 10 else 0.5 * (1 + math.cos(math.pi * (t - 10) / (updates - 10)))
    )
    is_regression = columns.targets.is_floating_point()
    loss_of: Callable[..., torch.Tensor] = nn.functional.mse_loss if is_regression else nn.functional.cross_entropy
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0))
    per_epoch = len(columns) // (batch * world_size)
    stamps: Stamps = []
    model.train()
    for step in range(updates):
        start = (step % per_epoch * world_size + rank) * batch
        ids = order[start : start + batch]
        loss = loss_of(model(columns.inputs[ids]), columns.targets[ids])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % LOG_EVERY == 0:
            loss.item()
            stamps.append((time.perf_counter(), time.process_time()))
    return stamps


def measure(name: str, rounds: int, directory: str) -> list[dict[str, tuple[float, float]]]:
    """Return seconds an update, (wall, CPU), of every contender in every round, on this rank."""
    workload, ranks = WORKLOADS[name], join()
    columns = columns_of(workload, 32 * ranks.world_size * 64)
    config = config_of(workload, ranks.world_size)
    splits = DataSplits(columns, columns, workload["shape"], 1 if columns.targets.is_floating_point() else 10)

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build_model(config.model, input_shape=splits.input_shape, num_outputs=splits.num_outputs)

    def harness() -> Stamps:
        run = assemble(config, ranks, splits, fresh(), directory=Path(directory), signals=StopSignals())
        # What is measured is updates: the evaluation and the save at the end come after the last stamp.
        clock = Clock()
        ledger = [Ledger(Path(directory), keep_bytes=0)] if ranks.rank == 0 else []
        run.observers = Observers([*ledger, clock])
        run.agenda.updates_until_vote, run.agenda.seconds_per_update = 10**9, 1e-9
        run.checkpoints.save = lambda *_, **__: Path(directory)  # type: ignore[method-assign]
        fit(run, TrainState())
        return clock.stamps

    def hand_written() -> Stamps:
        model = fresh()
        wrapped = DistributedDataParallel(model) if ranks.world_size > 1 else model
        return by_hand(workload, columns, wrapped, ranks.world_size, ranks.rank)

    contenders = {"hand-written": hand_written, "harness": harness, "hand-written again": hand_written}
    measured = []
    for number in range(rounds + 1):
        names = list(contenders)
        found = {}
        for contender in names[number % 3 :] + names[: number % 3]:
            ranks.gather_objects(None)  # start together
            (wall, cpu), (wall_end, cpu_end) = (stamps := contenders[contender]())[0], stamps[-1]
            updates = workload["updates"] - LOG_EVERY
            found[contender] = ((wall_end - wall) / updates, (cpu_end - cpu) / updates)
        if number:  # the first round is a warm-up
            measured.append(found)
    return measured


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"{rounds} rounds, medians; torch {torch.__version__}, {os.cpu_count()} cores, one thread a rank")
    print(f"{'workload':14}{'ranks':>6}{'by hand us':>12}{'harness us':>12}{'wall ratio':>12}{'CPU ratio':>11}"
          f"{'CPU by hand/by hand':>21}{'host reads':>12}{'at log':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        for name in WORKLOADS:
            for world_size in (1, 2):
                measured = run_ranks(world_size, measure, name, rounds, directory, deadline_seconds=500)[0]
                reads = run_ranks(world_size, reads_of, name, directory)[0]

                def ratio(contender: str, which: int, measured: Any = measured) -> float:
                    return statistics.median(m[contender][which] / m["hand-written"][which] for m in measured)

                by_hand_us, harness_us = (
                    1e6 * statistics.median(m[contender][0] for m in measured)
                    for contender in ("hand-written", "harness")
                )
                print(f"{name:14}{world_size:>6}{by_hand_us:>12.0f}{harness_us:>12.0f}{ratio('harness', 0):>12.3f}"
                      f"{ratio('harness', 1):>11.3f}{ratio('hand-written again', 1):>21.3f}"
                      f"{reads['updates'].get('host reads', 0):>12}{reads['settle']['host reads']:>8}")  # fmt: skip


def reads_of(name: str, directory: str) -> dict[str, Any]:
    """Count the host reads of one interval."""
    workload, ranks = WORKLOADS[name], join()
    columns = columns_of(workload, 32 * ranks.world_size * 64)
    config = config_of(workload, ranks.world_size)
    splits = DataSplits(columns, columns, workload["shape"], 1 if columns.targets.is_floating_point() else 10)
    model = build_model(config.model, input_shape=splits.input_shape, num_outputs=splits.num_outputs)
    return cost_of_updates(assemble(config, ranks, splits, model, directory=Path(directory), signals=StopSignals()))


if __name__ == "__main__":
    main()

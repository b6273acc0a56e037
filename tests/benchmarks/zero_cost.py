"""What each strategy holds and sends: `python -m tests.benchmarks.zero_cost` prints one markdown table.

Memory is counted by walking real tensors after the last backward pass of an update, before its step; traffic by
wrapping every collective, those of DDP's reducer in C++ too. `tests/distributed/test_zero_bytes.py` compares both with
the arithmetic of the ZeRO paper (arXiv:1910.02054). Only the last column is a timing.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.config.run_config import RunConfig
from harness.loop import train_step
from harness.run import Run
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import Spec, assemble_spec

WIDTH, DEPTH = 112, 24
# Weights and biases of 10 -> WIDTH, of DEPTH layers WIDTH -> WIDTH, of WIDTH -> 1.
NUM_PARAMETERS = (10 * WIDTH + WIDTH) + DEPTH * (WIDTH * WIDTH + WIDTH) + (WIDTH + 1)  # 305,089
LARGEST_PARAMETER = WIDTH * WIDTH  # 12,544, a 24th of all
ELEMENT_BYTES = 4
MICRO_BATCH = 4


@dataclass(frozen=True)
class Variant(Spec):
    """A strategy with the options that its bytes depend on, and a network of even layers."""

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """Other keys of the section `strategy`."""
    payloads: int = 2
    """How often all parameters cross the wire in an update of the paper's; an all-reduce counts as two."""

    @property
    def config(self) -> RunConfig:
        values = super().config.model_dump(mode="json")
        return RunConfig.model_validate({**values, "strategy": {**values["strategy"], **self.options}})

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(10, WIDTH), nn.ReLU()]
        for _ in range(DEPTH):
            layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


# Buckets smaller than the model, as they are for a model that is worth partitioning.
_BUCKETS = {"reduce_bucket_elements": 50_000}
_ZERO12 = {**_BUCKETS, "allgather_bucket_elements": 50_000}
# By default weights below 100,000 elements stay whole, which here is every one.
_ZERO3 = {**_BUCKETS, "persistence_threshold_elements": 0}


def variants(directory: str, *, world_size: int, accumulation: int = 1) -> dict[str, Variant]:
    """Return the rows of the table by name; `directory` gets the file that one of them needs."""
    released = Path(directory, "released.json")
    section = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    released.write_text(json.dumps({"zero_optimization": section}))

    def variant(name: str, options: dict[str, Any], *, payloads: int = 2) -> Variant:
        batch = MICRO_BATCH * accumulation * world_size
        return Variant(
            name=name,
            strategy=name.partition(",")[0],
            options=options,
            payloads=payloads,
            rows=batch,
            global_batch=batch,
            micro_batch=MICRO_BATCH,
        )

    rows = (
        variant("ddp", {}),
        variant("zero1", _ZERO12),
        variant("zero1, multi_rank_buckets", {**_ZERO12, "multi_rank_buckets": True}),
        variant("zero2", _ZERO12),
        variant("zero2, multi_rank_buckets", {**_ZERO12, "multi_rank_buckets": True}),
        variant("zero3", _ZERO3, payloads=3),
        variant("zero3, weights released", {**_ZERO3, "deepspeed_overrides": str(released)}, payloads=3),
        variant("zero3, small weights kept", {**_BUCKETS, "persistence_threshold_elements": 100_000}, payloads=3),
    )
    return {row.name: row for row in rows}


def ring_share(world_size: int) -> float:
    """Return (N-1)/N, the part of a payload that each rank of a ring sends."""
    return (world_size - 1) / world_size


# ---------------------------------------------------------------- bytes on the wire

CROSSINGS = {
    "allreduce_": 2,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "_allgather_base_": 1,
    "allgather_": 1,
    "reduce_": 1,
    "broadcast_": 1,
}
"""How often the payload of a collective crosses a ring, on average over ranks."""


class Wire(TorchDispatchMode):
    """Adds up the payloads, in bytes, of collectives by their names: the size of the tensor that is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.payloads: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            assert name in CROSSINGS, f"nobody has said what {name} sends"
            # Of what goes in and what comes out the larger is whole; a list is one tensor in pieces.
            whole = max(sum(t.numel() * t.element_size() for t in _tensors(argument)) for argument in args)
            self.payloads[name] = self.payloads.get(name, 0) + whole
        return func(*args, **(kwargs or {}))

    def bytes_per_rank(self, world_size: int) -> float:
        """Return what a ring sends from each rank for all that was counted."""
        return sum(CROSSINGS[name] * ring_share(world_size) * payload for name, payload in self.payloads.items())


def _tensors(*values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and values of dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(*value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(*value)


# ---------------------------------------------------------------- bytes in memory

Storages = dict[int, int]
"""Bytes of each piece of memory, by its address."""


def storages(tensors: Iterable[Tensor], *, known: Storages | None = None) -> Storages:
    """Return the memory behind real tensors, each piece once, without what is `known`."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return {address: size for address, size in found.items() if address not in (known or {})}


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds at some moment."""

    parameters: int
    gradients: int
    optimizer: int
    """Moments, and under ZeRO the copy of the rank's own parameters that the optimizer updates."""
    buckets: int
    """Buffers of collectives; their size is an option of the config whatever the model."""
    rest: int
    """Every other tensor of the process."""


def held_by(run: Run) -> Held:
    """Walk the tensors of a run on this rank."""
    strategy: Any = run.strategy
    weights, optimizer = list(strategy.module.parameters()), strategy.optimizer
    parameters = storages(_tensors([[p.data, getattr(p, "ds_tensor", None)] for p in weights]))
    gradients = storages(_tensors([[p.grad, getattr(p, "grad_accum", None)] for p in weights]))
    buckets: Storages = {}
    if hasattr(strategy.model, "zero_optimization_stage"):
        # Private names of DeepSpeed 0.19.8; what a next version keeps elsewhere turns up in `rest`.
        engine = strategy.model.optimizer
        names = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer")
        gradients |= storages(_tensors(*(getattr(engine, name, None) for name in names)))
        buckets = storages(_tensors(*(bucket.buffer for bucket in engine.ipg_buckets.values())), known=gradients)
    moments = storages(_tensors(list(optimizer.state.keys()), list(optimizer.state.values())), known=parameters)
    gc.collect()
    # A thread of gloo lets go of a tensor a moment after its collective has ended: what is seen once need not be held.
    deadline = time.monotonic() + 5
    while True:
        alive = (item for item in gc.get_objects() if issubclass(type(item), Tensor))
        rest = storages(alive, known=parameters | gradients | moments | buckets)
        if sum(rest.values()) < LARGEST_PARAMETER * ELEMENT_BYTES or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return Held(*(sum(found.values()) for found in (parameters, gradients, moments, buckets, rest)))


# ---------------------------------------------------------------- one update on one rank


@dataclass(frozen=True)
class Cost:
    """What one update costs one rank."""

    held: list[Held]
    """After the backward pass of each micro-batch."""
    wire_bytes: float

    @property
    def crossings(self) -> float:
        """Bytes sent over bytes of the parameters."""
        return self.wire_bytes / (NUM_PARAMETERS * ELEMENT_BYTES)


def cost(variant: Variant) -> Cost:
    """Count one update, the third: in the first ones DDP lays out its buckets and ZeRO-3 its order of gathering."""
    run = assemble_spec(variant)
    strategy: Any = run.strategy
    backward, held = strategy.backward, []

    def backward_and_look(loss: Tensor) -> None:
        backward(loss)
        held.append(held_by(run))

    rate = strategy.tensor(1e-3, dtype=torch.float64)
    for position in range(2):
        train_step(run, position, rate)
    strategy.backward = backward_and_look
    with (wire := Wire()):
        train_step(run, 2, rate)
    return Cost(held, wire.bytes_per_rank(strategy.world_size))


def seconds_per_update(variant: Variant, updates: int) -> float:
    """Return the median wall time of an update, after three that are not timed."""
    run = assemble_spec(variant)
    rate = run.strategy.tensor(1e-3, dtype=torch.float64)
    stamps = []
    for position in range(3 + updates):
        stamps.append(time.perf_counter())
        train_step(run, position, rate)
    stamps.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(stamps[3:]))


# ---------------------------------------------------------------- the table


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    arguments = parser.parse_args()
    print(
        f"{NUM_PARAMETERS:,} fp32 parameters, AdamW, clipping by norm; torch {torch.__version__} on gloo, "
        f"{os.cpu_count()} cores, one thread a rank; medians of {arguments.rounds} rounds, each of {arguments.updates} "
        "updates of every row in turn.\n"
    )
    print("| strategy | ranks | parameter MiB | gradient MiB | optimizer MiB | wire bytes / (P x 4 bytes) "
          "| paper's figure | step time / ddp |\n|---" + "|---:" * 7 + "|")  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        for world_size in arguments.ranks:
            rows = variants(directory, world_size=world_size)
            ratios = step_time_ratios(rows, world_size, rounds=arguments.rounds, updates=arguments.updates)
            for name, row in rows.items():
                costs = run_ranks(world_size, cost, row, deadline_seconds=300)
                cells = [name, str(world_size)]
                for kind in ("parameters", "gradients", "optimizer"):
                    cells.append(f"{max(getattr(found.held[-1], kind) for found in costs) / 2**20:.2f}")
                cells += [f"{costs[0].crossings:.3f}", f"{row.payloads * ring_share(world_size):.3f}"]
                print(f"| {' | '.join(cells)} | {ratios[name]:.2f} |", flush=True)


def step_time_ratios(rows: dict[str, Variant], world_size: int, *, rounds: int, updates: int) -> dict[str, float]:
    """Return each row's median over rounds of its step time to that of DDP in the same round."""
    ratios: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        seconds = {
            name: max(run_ranks(world_size, seconds_per_update, row, updates, deadline_seconds=300))
            for name, row in rows.items()
        }
        for name, found in seconds.items():
            ratios[name].append(found / seconds["ddp"])
    return {name: statistics.median(found) for name, found in ratios.items()}


if __name__ == "__main__":
    main()

"""Whether native shards would be a faster path: `python -m tests.benchmarks.shards_cost` prints one markdown table.

The harness has one checkpoint format, by parameter name, and DeepSpeed one file a rank that fits the same stage and
number of ranks only. Both save and load the same 50,378,752 fp32 parameters with Adam's two moments, in turn, on the
same ranks. DeepSpeed's time ends when its files are written, ours when they are hashed and on the disk; ours are
verified before they are loaded and compared with what was loaded.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness.assemble import assemble
from harness.checkpoint.store import CheckpointStore
from harness.config.run import Checkpoint
from harness.stopping import StopSignals
from harness.strategy.base import Strategy
from tests.benchmarks.save_cost import Large
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import join, train_updates

COLUMNS = ("blocked", "saved", "loaded", "MB")
"""Seconds for which training waits, until the files are there, and to load them; and their size."""


def of_harness(strategy: Strategy, directory: Path) -> list[float]:
    """Save and load with the harness."""
    store = CheckpointStore(directory, strategy, Checkpoint(keep_last=1))
    began = time.perf_counter()
    store.begin(2, {"step": 2, "optimizer": strategy.optimizer_settings()}, is_best=False)
    blocked = time.perf_counter() - began
    result = store.finish()
    assert result is not None
    assert result.problem is None
    saved = time.perf_counter() - began
    began = time.perf_counter()
    loaded = store.load()
    assert loaded is not None
    store.restore(loaded)
    store.close()
    return [blocked, saved, time.perf_counter() - began]


def of_deepspeed(strategy: Any, directory: Path) -> list[float]:
    """Save and load with DeepSpeed's engine."""
    engine = strategy.model
    began = time.perf_counter()
    engine.save_checkpoint(str(directory), tag="t", client_state={"step": 2})
    saved = time.perf_counter() - began
    began = time.perf_counter()
    path, _ = engine.load_checkpoint(str(directory), tag="t")
    assert path is not None
    return [saved, saved, time.perf_counter() - began]


CONTENDERS: dict[str, Callable[[Any, Path], list[float]]] = {"harness": of_harness, "DeepSpeed": of_deepspeed}


def measure(strategy: str, rounds: int, directory: str) -> dict[str, list[list[float]]]:
    """Return what each contender took on this rank, round by round after one that is not counted."""
    spec = replace(Large(), strategy=strategy, rows=16, global_batch=8)
    ranks = join(strategy)
    run = assemble(spec.config, ranks, spec.splits(), spec.model(), directory=Path(directory), signals=StopSignals())
    train_updates(run, range(2))
    found: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):
        for name, contender in CONTENDERS.items():
            folder = Path(directory, name)
            if ranks.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                os.sync()
            ranks.gather_objects(None)  # start together
            seconds = contender(run.strategy, folder)
            ranks.gather_objects(None)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            found[name].append([*seconds, size / 1e6])
            ranks.gather_objects(None)
    return {name: rows[1:] for name, rows in found.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["zero1", "zero2", "zero3"])
    parser.add_argument("--directory", default=".", help="on the disk to measure")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; slowest rank, median of {arguments.rounds} rounds.\n")
    print(f"| strategy | ranks | format | {' | '.join(COLUMNS)} |\n|---|---:|---{'|---:' * len(COLUMNS)}|")
    for strategy in arguments.strategies:
        for world_size in arguments.ranks:
            with tempfile.TemporaryDirectory(dir=arguments.directory, prefix=".shards-cost-") as directory:
                ranks = run_ranks(world_size, measure, strategy, arguments.rounds, directory, deadline_seconds=600)
            for name in CONTENDERS:
                rounds = zip(*(rank[name] for rank in ranks), strict=True)
                slowest = [[max(column) for column in zip(*rows, strict=True)] for rows in rounds]
                cells = (f"{statistics.median(column):.2f}" for column in zip(*slowest, strict=True))
                print(f"| {strategy} | {world_size} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""What rows of a Dataset cost beside torch's DataLoader with the same rows, and what a far resume costs.

    python -m tests.benchmarks.loader_cost [--rounds 9]

Both take the same batches of 64 in the same order, in turns, in one process; the least CPU time of all rounds counts:
of the rank, and of its workers too where there are some. `--memory` trains on 10,000 updates instead, and prints how
much memory the rank and its workers have at every thousandth.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harness.rows.batches import TrainingBatches
from harness.rows.dataset import DatasetRows
from harness.rows.order import BatchPlan

BATCH, NUM_ROWS = 64, 64 * 256
TICKS = os.sysconf("SC_CLK_TCK")


class InMemory(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, *shape: int) -> None:
        self.inputs = torch.randn(NUM_ROWS, *shape)
        self.targets = torch.randint(0, 10, (NUM_ROWS,))

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]


class Augmented(InMemory):
    """Draws one number a row, as a random flip does."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        inputs, target = super().__getitem__(i)
        return (inputs.flip(-1) if torch.rand(()) < 0.5 else inputs), target


def plan() -> BatchPlan:
    return BatchPlan(num_rows=NUM_ROWS, global_batch=BATCH, world_size=1, micro_batch=None, seed=0)


def ours(dataset: Dataset[tuple[Tensor, Tensor]], *, workers: int, position: int = 0) -> TrainingBatches:
    rows = DatasetRows(dataset, seed=0, workers=workers)
    rows.look()
    batches = TrainingBatches(rows, plan(), rank=0, device=torch.device("cpu"), dtype=torch.float32)
    batches.start(position)
    return batches


def theirs(dataset: Dataset[tuple[Tensor, Tensor]], *, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    ids = plan().sample_ids(0, 0, num_positions=plan().steps_per_epoch).tolist()
    return DataLoader(dataset, batch_size=BATCH, sampler=ids, num_workers=workers, persistent_workers=workers > 0)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def cpu_seconds() -> float:
    """Of this process and its children that live."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in children()]
    return time.process_time() + sum(int(fields[11]) + int(fields[12]) for fields in stats) / TICKS


def timed(take: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    take()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def compare(dataset: Dataset[tuple[Tensor, Tensor]], *, workers: int, rounds: int) -> None:
    batches, loader = ours(dataset, workers=workers), theirs(dataset, workers=workers)
    updates = plan().steps_per_epoch
    positions: Iterator[int] = itertools.count()

    def take_ours() -> None:
        for _ in range(updates):
            batches.at(next(positions))

    def take_theirs() -> None:
        for _ in loader:
            pass

    take_ours(), take_theirs()
    rounds_of = {name: [] for name in ("ours", "theirs")}  # type: dict[str, list[tuple[float, float]]]
    for _ in range(rounds):
        rounds_of["theirs"].append(timed(take_theirs))
        rounds_of["ours"].append(timed(take_ours))
    batches.close()
    least = {
        name: [min(column) / updates * 1e6 for column in zip(*times, strict=True)] for name, times in rounds_of.items()
    }
    (wall, cpu), (their_wall, their_cpu) = least["ours"], least["theirs"]
    print(
        f"{type(dataset).__name__} {tuple(dataset[0][0].shape)}, workers {workers}: "
        f"CPU {cpu:.0f} us a batch, DataLoader {their_cpu:.0f}, ratio {cpu / their_cpu:.2f}; "
        f"wall {wall:.0f} and {their_wall:.0f}, ratio {wall / their_wall:.2f}"
    )


def far(*, workers: int, rounds: int) -> None:
    """Print what the first batch costs after a start at step 0 and at step 1,000,000."""
    dataset = InMemory(64)
    seconds: dict[int, list[float]] = {0: [], 10**6: []}
    for _ in range(rounds):
        for position, times in seconds.items():
            began = time.perf_counter()
            batches = ours(dataset, workers=workers, position=position)
            batches.at(position)
            times.append(time.perf_counter() - began)
            batches.close()
    near, there = (min(times) * 1e3 for times in seconds.values())
    print(
        f"first batch, workers {workers}: {near:.1f} ms at step 0, {there:.1f} ms at step 1,000,000, "
        f"{there / near:.2f} x"
    )


def memory(*, workers: int) -> None:
    batches = ours(Augmented(64), workers=workers)
    for position in range(10_001):
        batches.at(position)
        if position % 1000 == 0:
            megabytes = [_resident(pid) for pid in (os.getpid(), *children())]
            print(
                f"update {position:,}: rank {megabytes[0]:.1f} MB, "
                f"workers {', '.join(f'{each:.1f}' for each in megabytes[1:])}"
            )
    batches.close()


def _resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        memory(workers=2)
        return
    for dataset in (InMemory(64), InMemory(3, 32, 32), Augmented(3, 32, 32)):
        for workers in (0, 2):
            compare(dataset, workers=workers, rounds=arguments.rounds)
    for workers in (0, 2):
        far(workers=workers, rounds=arguments.rounds)


if __name__ == "__main__":
    main()

"""What a save costs: for how long training waits, and when the disk has it all.

`python -m tests.benchmarks.save_cost [--ranks 1 2] [--rounds 5]` prints one markdown table. All save the same
50,378,752 fp32 parameters with Adam's two moments (604 MB), in one process, in turn, while nothing else runs; the disk
is synced and what was written deleted before each. In the first round memory is allocated that some of them keep;
the asynchronous save of the harness comes after its synchronous one, and has it already.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from harness.assemble import assemble
from harness.checkpoint.store import CheckpointStore
from harness.config.run import Checkpoint
from harness.run import Run
from harness.stopping import StopSignals
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import Spec, join, train_updates

WIDTH, DEPTH = 2048, 12
Seconds = tuple[float, float]
"""For which training waits, and until all is on the disk."""


@dataclass(frozen=True)
class Large(Spec):
    """A network of a few large layers."""

    rows: int = 4
    global_batch: int = 2
    updates: int = 4

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
        return nn.Sequential(nn.Linear(10, WIDTH, bias=False), *layers, nn.Linear(WIDTH, 1, bias=False))


class Contenders:
    """Ways to save a run on this rank; each returns what it took."""

    def __init__(self, run: Run, directory: Path) -> None:
        self.run, self.directory = run, directory
        self.strategy: Any = run.strategy
        self.store = CheckpointStore(directory / "harness", run.strategy, Checkpoint(keep_last=1))
        self.step = 0
        self.copies: dict[str, Tensor] = {}

    def all(self) -> dict[str, Callable[[], Seconds]]:
        return {
            "copy in memory (no save)": self.copy,
            "write + fsync, rank 0": self.write,
            "torch.save + fsync, rank 0": self.torch_save,
            "DCP save": self.dcp_save,
            "DCP async_save": self.dcp_async_save,
            "harness, synchronous": self.harness_synchronous,
            "harness, asynchronous": self.harness,
        }

    def copy(self) -> Seconds:
        began = time.perf_counter()
        for key, tensor in self.strategy.state():
            if key not in self.copies:
                self.copies[key] = torch.empty_like(tensor)
            self.copies[key].copy_(tensor)
        return time.perf_counter() - began, 0.0

    def write(self) -> Seconds:
        began = time.perf_counter()
        if self.strategy.rank == 0:
            with (self.directory / "plain").open("wb", buffering=0) as file:
                for _, tensor in self.strategy.state():
                    content = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
                    while content:
                        content = content[file.write(content) :]
                os.fsync(file.fileno())
        self.strategy.gather_objects(None)
        return (seconds := time.perf_counter() - began), seconds

    def torch_save(self) -> Seconds:
        began = time.perf_counter()
        if self.strategy.rank == 0:
            with (self.directory / "torch").open("wb") as file:
                torch.save([self.strategy.module.state_dict(), self.strategy.optimizer.state_dict()], file)
                file.flush()
                os.fsync(file.fileno())
        self.strategy.gather_objects(None)
        return (seconds := time.perf_counter() - began), seconds

    def _dcp_state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.strategy.module, self.strategy.optimizer)
        return {"model": model, "optimizer": optimizer}

    def dcp_save(self) -> Seconds:
        began = time.perf_counter()
        dcp.save(self._dcp_state(), checkpoint_id=self.directory / "dcp")
        return (seconds := time.perf_counter() - began), seconds

    def dcp_async_save(self) -> Seconds:
        began = time.perf_counter()
        saving: Any = dcp.async_save(self._dcp_state(), checkpoint_id=self.directory / "dcp-async")
        blocked = time.perf_counter() - began
        saving.result()
        return blocked, time.perf_counter() - began

    def _begin(self) -> None:
        self.step += 1
        self.store.directory.path.mkdir(exist_ok=True)
        trainer = {"step": self.step, "optimizer": self.strategy.optimizer_settings()}
        self.store.begin(self.step, trainer, is_best=False)

    def harness_synchronous(self) -> Seconds:
        self._begin()
        result = self.store.finish()
        assert result is not None
        assert result.problem is None
        return result.blocked_seconds, result.seconds

    def harness(self) -> Seconds:
        self._begin()
        result = None
        while result is None:  # as the loop does where it reads its reports
            while any(self.strategy.gather_objects(not self.store.vote())):
                time.sleep(0.02)
            result = self.store.advance()
        assert result.problem is None
        return result.blocked_seconds, result.seconds


def measure(rounds: int, directory: str) -> list[dict[str, Seconds]]:
    """Return what each contender took on this rank, round by round."""
    spec = Large()
    ranks = join("zero1")  # DCP wants a process group, for one rank too
    run = assemble(spec.config, ranks, spec.splits(), spec.model(), directory=Path(directory), signals=StopSignals())
    train_updates(run, range(2))
    contenders = Contenders(run, Path(directory))
    measured = []
    for _ in range(rounds + 1):
        found = {}
        for name, contender in contenders.all().items():
            if ranks.rank == 0:
                for left in Path(directory).iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                os.sync()
            ranks.gather_objects(None)  # start together
            found[name] = contender()
        measured.append(found)
    contenders.store.close()
    return measured


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--directory", default=".", help="on the disk to measure")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; seconds over {arguments.rounds} rounds, slowest rank.\n")
    print(
        "| save | ranks | blocked, first | min | median | on disk, min | median |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    for world_size in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix=".save-cost-") as directory:
            ranks = run_ranks(world_size, measure, arguments.rounds, directory, deadline_seconds=600)
        for name in ranks[0][0]:
            of_rounds = [[rank[number][name] for rank in ranks] for number in range(arguments.rounds + 1)]
            blocked, durable = ([max(each[which] for each in found) for found in of_rounds] for which in (0, 1))
            cells = [blocked[0], min(blocked[1:]), statistics.median(blocked[1:])]
            cells += [min(durable[1:]), statistics.median(durable[1:])]
            print(f"| {name} | {world_size} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()

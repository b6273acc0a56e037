"""Our own checkpoints, as the loop drives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from harness.assemble import assemble
from harness.checkpoint import rng, snapshot
from harness.checkpoint.store import CheckpointStore
from harness.config.run import Checkpoint
from harness.ranks.env import placement
from harness.ranks.join import join_ranks
from harness.stopping import StopSignals
from tests.distributed.scenarios import Spec, train_updates
from tests.faults.jobs import COLLECTIVES_TIME_OUT, ROWS, System, network


@dataclass(frozen=True)
class SameNetwork(Spec):
    """The network that the others train."""

    rows: int = 60
    global_batch: int = ROWS
    updates: int = 30

    def model(self) -> nn.Module:
        return network()


class Harness(System):
    """Two ranks under DDP; what a checkpoint looks like is the same under ZeRO."""

    def __init__(self, directory: Path, *, keep_one: bool) -> None:
        snapshot.STRIPE_BYTES = 2**13  # so that both ranks have something to write
        spec, ranks = SameNetwork(), join_ranks(placement(), timeout_seconds=COLLECTIVES_TIME_OUT.total_seconds())
        self.run = assemble(spec.config, ranks, spec.splits(), spec.model(), directory=directory, signals=StopSignals())
        self.store = CheckpointStore(
            directory / "checkpoints", self.run.strategy, Checkpoint(keep_last=1 if keep_one else 2)
        )
        self.store.directory.path.mkdir(parents=True, exist_ok=True)

    def train(self, positions: range) -> None:
        train_updates(self.run, positions)

    def save(self, step: int) -> str:
        trainer = {"step": step, "optimizer": self.run.strategy.optimizer_settings()}
        self.store.begin(step, trainer, is_best=False)
        result = self.store.finish()
        assert result is not None
        return str(result.problem or "")

    def load(self, step: int | None = None) -> int | None:
        """Resume; there is no call for a step of one's own choice, as broken ones are passed over."""
        loaded = self.store.load()
        if loaded is None:
            return None
        self.store.restore(loaded)
        return loaded.step

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.run.strategy.state()
        yield from ((f"random/{name}", tensor) for name, tensor in rng.capture().items())

    @staticmethod
    def folder(directory: Path, step: int) -> Path:
        return directory / f"checkpoints/step-{step:08d}"

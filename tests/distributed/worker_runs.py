"""Whole runs whose rows are read by workers: started, killed by SIGKILL where it hurts, and compared."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from harness.config.io import load_config
from harness.ranks.group import Ranks
from harness.record.json_lines import read_events
from harness.rows.dataset import DatasetRows
from harness.rows.lengths import lengths_of
from harness.rows.order import BatchPlan, RowsByLength, permutation_key, random_bits
from tests.distributed.own import EXAMPLES, seeded
from tests.distributed.ranks import free_port, run_standing_ranks, start_rank
from tests.distributed.scenarios import train_main
from tests.distributed.starts import train_on_standing_ranks
from tests.distributed.told_columns import COLUMNS
from tests.helpers import plain_ledger

TOLD = Path(__file__).parent / "told_rows.py"


@dataclass(frozen=True)
class Example:
    """A run of an example whose rows tell what they draw; it saves after every update."""

    name: str
    rows: str
    task: str
    updates: int
    settings: tuple[str, ...]

    def arguments(self, folder: Path, run: str, *more: str) -> list[str]:
        """Return what `harness.train` is given."""
        given = [
            f"use=[{EXAMPLES / self.name / f'{self.name}.py'},{TOLD}]",
            *("data.source=told_rows", f"data.of={self.rows}", f"task={{kind: told_task, of: {self.task}}}"),
            *("early_stopping=null", "schedule={kind: constant}", "run.max_epochs=null"),
            "checkpoint={every_steps: 1, keep_last: 1}",
            *self.settings,
            *(f"run.max_steps={self.updates}", f"run.output_root={folder}", f"run.name={run}", *more),
        ]
        by_key = {setting.partition("=")[0]: setting for setting in given}
        return [str(EXAMPLES / self.name / "run.yaml"), *by_key.values()]

    def train(self, world_size: int, folder: Path, run: str, *more: str) -> None:
        """Train to the end."""
        answers = train_on_standing_ranks(world_size, *self.arguments(folder, run, *more))
        assert [code for code, _ in answers] == [0] * world_size, answers

    def kill(self, world_size: int, folder: Path, run: str, *more: str, after: int, victims: Sequence[int]) -> None:
        """Start or go on, and kill these ranks as soon as rank zero has published the checkpoint of an update.

        The others end by themselves, and so do all workers.
        """
        given = (*self.arguments(folder, run, *more),)
        port = free_port()
        started = [
            start_rank(rank, world_size, port, _train_and_be_killed, (after, tuple(victims), *given))
            for rank in range(world_size)
        ]
        for rank, (process, connection) in enumerate(started):
            process.join(60)
            process.kill()
            assert (process.exitcode == -signal.SIGKILL) == (rank in victims), f"rank {rank}: {process.exitcode}"
            connection.close()

    def expected(self) -> tuple[list[dict[str, int]], list[int]]:
        """Return the sums over the rows of each update of what they are to tell, and how many targets they have.

        They are computed with nothing of the harness but its order of rows and its seeds.
        """
        found: tuple[list[dict[str, int]], list[int]] = run_standing_ranks(1, _expected, self)[0]
        return found


RAGGED = Example(
    "ragged",
    rows="ragged.Walks",
    task="ragged.Tag",
    updates=9,  # an epoch has three, the last of eight rows
    settings=(
        *("data.noisy=steps", "data.num_rows=32", "data.global_batch=12"),
        "strategy={kind: ddp, precision: fp64, micro_batch_tokens: 60}",
    ),
)
SEGMENTATION = Example(
    "segmentation",
    rows="segmentation.Shapes",
    task="segmentation.Segment",
    updates=6,  # an epoch has three, the last of two rows
    settings=(
        *("data.num_rows=14", "data.global_batch=6", "model.hidden=2"),
        "strategy={kind: ddp, precision: fp64, micro_batch: 1}",
    ),
)


def _train_and_be_killed(after: int, victims: Sequence[int], *arguments: str) -> int:
    rename, gather = os.rename, Ranks.gather_objects
    pids: list[int] = []

    def gather_with_pids(self: Ranks, value: Any) -> list[Any]:
        if not pids:
            pids.extend(gather(self, os.getpid()))
        return gather(self, value)

    def rename_and_kill(source: Any, target: Any) -> None:
        rename(source, target)
        if str(target).endswith(f"step-{after:08d}"):
            for pid in sorted((pids[rank] for rank in victims), key=lambda pid: pid == os.getpid()):  # oneself last
                os.kill(pid, signal.SIGKILL)

    Ranks.gather_objects = gather_with_pids  # type: ignore[method-assign]
    os.rename = rename_and_kill
    return train_quietly(*arguments)


def train_quietly(*arguments: str) -> int:
    """Train on this rank, with nothing on the terminal."""
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return train_main(*arguments)


def _expected(example: Example) -> tuple[list[dict[str, int]], list[int]]:
    path, *overrides = example.arguments(Path("/nowhere"), "none")
    config = load_config(path, overrides).config
    splits = config.data.open(config.task, seed=config.run.seed)
    task = config.task.build(splits, device=None, dtype=None)._part  # type: ignore[arg-type, attr-defined]
    rows, seed = splits.train, config.run.seed
    assert isinstance(rows, DatasetRows)
    lengths = lengths_of(rows) if config.data.sampling == "by_length" else None
    batch = config.data.global_batch
    order = None if lengths is None else RowsByLength(lengths, global_batch=batch, seed=seed)
    plan = BatchPlan(num_rows=len(rows), global_batch=batch, world_size=1, micro_batch=None, seed=seed, order=order)
    sums, targets = [], []
    for position in range(example.updates):
        ids = plan.sample_ids(position, 0)
        seeds = random_bits(ids, key=permutation_key(seed, plan.epoch_of(position), "row"))
        taken = [seeded(rows._dataset, *each) for each in zip(ids.tolist(), seeds.tolist(), strict=True)]
        told = np.sum([row["told"].numpy() for row in taken], axis=0)
        sums.append(dict(zip(COLUMNS, map(int, told), strict=True)))
        weights = [task.weights({name: leaf.unsqueeze(0) for name, leaf in row.items()}).sum() for row in taken]
        targets.append(int(sum(weights)))
    return sums, targets


def copied(run: Path, name: str) -> None:
    """Copy a run directory, and what lies beside it, as it is now under another name."""
    shutil.copytree(run, run.with_name(name), symlinks=True)


def lines(run: Path, event: str = "update") -> list[dict[str, Any]]:
    """Return the lines of a ledger, without what is measured."""
    return [line for line in plain_ledger(run / "ledger.jsonl") if line["event"] == event]


def starts(run: Path) -> list[int]:
    """Return after which update each launch of a run has begun."""
    return [line["step"] for line in read_events(run) if line["event"] == "started"]


def sums(run: Path, targets: Sequence[int]) -> list[dict[str, int]]:
    """Return the sums over the rows of each update of what they told.

    The ledger has them by target, so that they are exact, since they are whole numbers, when they are rounded.

    Args:
        targets: of each update, how many its rows have.
    """
    return [
        {name: round(line[name] * count) for name in COLUMNS} for line, count in zip(lines(run), targets, strict=True)
    ]


def tensors(run: Path, step: int) -> dict[str, Any]:
    """Return weights and moments of a checkpoint, in arrays."""
    files = sorted((run / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    return {name: array for path in files if "rng" not in path.name for name, array in load_file(path).items()}


def files(run: Path, step: int) -> list[bytes]:
    """Return weights, moments and random state of a checkpoint."""
    found = sorted((run / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    assert found
    return [path.read_bytes() for path in found]


@contextmanager
def without_leftovers() -> Iterator[None]:
    """Delete what killed workers leave in the temporary folder: an empty folder of multiprocessing's each."""
    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("pymp-*"))
    yield
    for path in set(folder.glob("pymp-*")) - before:
        shutil.rmtree(path)


def assert_close(found: Mapping[str, Any], wanted: Mapping[str, Any], *, rel: float) -> None:
    """See that arrays are those of another run to rounding, as told by the largest number of each."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.abs(found[name] - array).max(initial=0) <= rel * np.abs(array).max(initial=1e-3), name

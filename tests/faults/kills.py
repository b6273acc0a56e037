"""Kills every rank at every call to the disk that a save makes, and starts again.

Production code has no hooks: the calls of the operating system are wrapped in the processes that are to die.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.checkpoint import snapshot
from harness.checkpoint.store import CheckpointStore
from harness.config.run import Checkpoint
from harness.record.manifest import checkpoint_problems
from tests.distributed.ranks import free_port, run_ranks, start_rank
from tests.distributed.scenarios import Spec, assemble_spec, save_now, train_updates
from tests.faults.corruption import Digests, digests

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
WORLD_SIZE = 2
OLDER, NEWEST, END = 6, 11, 14
"""The steps that are saved, the second to be killed, and the last; an epoch has four."""
KEEP = Checkpoint(keep_last=1)
"""So that the save that is killed also moves BEST and deletes the one before."""

Point = tuple[int, int, str]
"""Rank, number of its call to the disk, and `before`, `within` or `after` it."""


def spec_of(strategy: str) -> Spec:
    return Spec(strategy=strategy, updates=END, rows=64)


class Disk:
    """Counts this rank's calls to the disk, and calls `die` at one of them."""

    CALLS = ("mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")

    def __init__(self, point: Point | None, rank: int, die: Callable[[], None]) -> None:
        self.calls: list[str] = []
        self._at = point[1:] if point and point[0] == rank else None
        self._die = die
        self._originals = {name: getattr(os, name) for name in self.CALLS}

    def __enter__(self) -> Disk:
        for name, call in self._originals.items():
            setattr(os, name, self._counted(name, call))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self._originals.items():
            setattr(os, name, call)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if self._at == (number, "before"):
                self._die()
            if self._at == (number, "within"):  # half of what is to be written
                call(args[0], args[1][: len(args[1]) // 2])
                self._die()
            result = call(*args, **kwargs)
            if self._at == (number, "after"):
                self._die()
            return result

        return counted


def save_and_be_killed(strategy: str, directory: str, point: Point | None) -> tuple[list[str], dict[int, Digests]]:
    """Save a step, then another with all ranks dying at `point`; without one, return the calls and what was saved."""
    snapshot.STRIPE_BYTES = 1024
    run = assemble_spec(spec_of(strategy), directory)
    pids = run.strategy.gather_objects(os.getpid())

    def kill_all_ranks() -> None:
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # oneself last
            os.kill(pid, signal.SIGKILL)

    store = CheckpointStore(Path(directory) / "checkpoints", run.strategy, KEEP)
    saved = {}
    train_updates(run, range(OLDER))
    save_now(store, OLDER)
    saved[OLDER] = digests(run)
    train_updates(run, range(OLDER, NEWEST))
    with Disk(point, run.strategy.rank, kill_all_ranks) as disk:
        save_now(store, NEWEST, is_best=True)
    saved[NEWEST] = digests(run)
    train_updates(run, range(NEWEST, END))
    saved[END] = digests(run)
    return disk.calls, saved


def resume_all(strategy: str, folders: list[str], saved: dict[int, Digests]) -> list[str]:
    """Load what each kill has left, and train to the end; return what was found."""
    run = assemble_spec(spec_of(strategy))
    found = []
    for folder in folders:
        store = CheckpointStore(Path(folder) / "checkpoints", run.strategy, KEEP)
        loaded = store.load()
        if loaded is None:
            found.append("UNUSABLE: no checkpoint")
            continue
        store.restore(loaded)
        is_right = digests(run) == saved[loaded.step]
        train_updates(run, range(loaded.step, END))
        is_right = is_right and digests(run) == saved[END]
        leftovers = [path.name for path in store.directory.path.glob(".*")]
        if loaded.step == NEWEST and store.directory.named_by("BEST") != f"step-{NEWEST:08d}":
            found.append("BEST IS LOST")
        elif loaded.rejected or leftovers:
            found.append(f"UNTIDY: {loaded.rejected} {leftovers}")
        else:
            found.append(f"resumed from step {loaded.step}" if is_right else f"WRONG STATE of step {loaded.step}")
    return found


def points_of(calls_of_ranks: list[list[str]]) -> list[Point]:
    """Every moment at which a save can be cut: before and after each call, and in the middle of each write."""
    return [
        (rank, number, moment)
        for rank, calls in enumerate(calls_of_ranks)
        for number, name in enumerate(calls)
        for moment in ("before", *(["within"] if name == "write" else []), "after")
        if moment != "after" or name in ("rename", "replace", "fsync")  # after any other is before the next
    ]


def campaign(strategy: str, *, every: int = 1) -> Counter[str]:
    """Kill at every, or every n-th, point of a save, and count what came of it; what begins with a capital must not be.

    Between the kill and the next start, at least one checkpoint has to be whole as it lies there.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        ranks = run_ranks(WORLD_SIZE, save_and_be_killed, strategy, f"{temporary}/undisturbed", None)
        saved = ranks[0][1]
        points = points_of([calls for calls, _ in ranks])[::every]
        folders = []
        for index, point in enumerate(points):
            folder = f"{temporary}/killed-{index}"
            port = free_port()
            arguments = (strategy, folder, point)
            started = [start_rank(rank, WORLD_SIZE, port, save_and_be_killed, arguments) for rank in range(WORLD_SIZE)]
            for process, connection in started:
                process.join(60)
                counts["NOT KILLED"] += process.exitcode != -signal.SIGKILL
                process.kill()
                connection.close()
            whole = [path for path in Path(folder).glob("checkpoints/step-*") if not checkpoint_problems(path)]
            counts["NO WHOLE CHECKPOINT LEFT"] += not whole
            folders.append(folder)
        found = run_ranks(WORLD_SIZE, resume_all, strategy, folders, saved, deadline_seconds=200)
        for answers in zip(*found, strict=True):
            counts[answers[0] if len(set(answers)) == 1 else f"RANKS DISAGREE: {answers}"] += 1
        counts["kills in a save"] = len(points)
        for folder in folders:
            shutil.rmtree(folder)
    return +counts

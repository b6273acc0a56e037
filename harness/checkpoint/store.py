"""Saving beside the training, and restoring what was verified. Every rank calls everything; rank zero publishes.

A save goes through two phases, each in a thread: every rank writes its share, then rank zero publishes the whole. The
ranks agree that a phase is over where they vote anyway (`vote`, `advance`), so no thread takes part in a collective.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.checkpoint import rng
from harness.checkpoint.layout import check_layout
from harness.checkpoint.snapshot import Snapshot
from harness.checkpoint.tensors import SavedState, TensorFiles, tensor_digest, write_tensors
from harness.config.run import Checkpoint
from harness.errors import CheckpointError, StorageError
from harness.record.checkpoints import CheckpointDirectory, step_of
from harness.record.files import json_bytes, storage_errors, write_durably
from harness.record.manifest import (
    COMMIT,
    KINDS,
    TRAINER,
    FileEntry,
    Manifest,
    checkpoint_problems,
    commit_digest,
    read_manifest,
    read_trainer,
    tensor_file,
)
from harness.strategy.base import Strategy

SECONDS_BETWEEN_VOTES = 1.0
"""How often ranks that wait for a save hear that the others still write: a slow disk is no dead peer."""


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint."""

    directory: Path
    manifest: Manifest
    trainer: Mapping[str, Any]
    rejected: list[str]
    """Newer checkpoints that could not be used, each with the reason."""

    @property
    def step(self) -> int:
        """Applied updates when it was saved."""
        return self.manifest.step


@dataclass(frozen=True)
class SaveResult:
    """How a save ended; the same on every rank."""

    directory: Path
    step: int
    is_best: bool
    problem: StorageError | None
    """Why there is no new checkpoint; older ones are untouched, and nothing half-written stays."""
    notice: str
    """What the disk refused beside it, on rank zero; the next save tries again."""
    blocked_seconds: float
    """For which training waited, on this rank."""
    seconds: float
    """From the beginning until the ranks agreed on its end."""


@dataclass(frozen=True)
class Written:
    """What one rank wrote."""

    files: list[FileEntry]
    tensors: dict[str, str]


@dataclass
class _Save:
    """A save in flight."""

    step: int
    is_best: bool
    temporary: Path
    writing: "Future[Written | None]"
    began: float
    blocked_seconds: float
    publishing: "Future[str] | None" = None
    problem: StorageError | None = None

    @property
    def phase(self) -> "Future[Any]":
        return self.publishing or self.writing


class CheckpointStore:
    """Saves and restores a run; at most one save is in flight."""

    def __init__(self, directory: Path, strategy: Strategy, config: Checkpoint) -> None:
        self.directory = CheckpointDirectory(directory)
        self._strategy, self._config = strategy, config
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None
        self._newest_step: int | None = None
        self._best_step: int | None = None
        """Of the best checkpoint, which every checkpoint says as well as BEST; rank zero knows it."""
        self._source: Path | None = None
        """What this launch resumed from; it is never deleted."""

    # -------------------------------------------------------- save

    def begin(
        self, step: int, trainer: Mapping[str, Any], *, is_best: bool, also_sync: Callable[[], None] = lambda: None
    ) -> None:
        """Copy the state of the run; writing it as `step-N` goes on beside the training. Collective.

        The step of the newest checkpoint is not written again; it may become the best.

        Args:
            trainer: JSON values; they are encoded here.
            also_sync: makes durable what the checkpoint refers to; called in the thread.
        """
        if self._save is not None:
            raise RuntimeError("a save is in flight; finish() it first")
        began = time.perf_counter()
        temporary = self.directory.temporary(step, self._strategy.broadcast(uuid.uuid4().hex[:8]))
        writing: Future[Written | None]
        if step == self._newest_step:
            writing = self._thread.submit(lambda: None)
        else:
            self._strategy.share_buffers()
            share = self._snapshot.take(self._strategy)
            best = {"best_step": step if is_best else self._best_step}
            arguments = (temporary, share, rng.capture(), json_bytes({**trainer, **best}), also_sync)
            writing = self._thread.submit(self._write, *arguments)
        self._save = _Save(step, is_best, temporary, writing, began, time.perf_counter() - began)

    def vote(self) -> bool:
        """Whether this rank has done its part of the present phase; reads a flag."""
        return self._save is None or self._save.phase.done()

    def advance(self) -> SaveResult | None:
        """Enter the next phase, after every rank voted that it may; return how the save ended, if it did. Collective.

        Without a save in flight this is free.
        """
        save, strategy = self._save, self._strategy
        if save is None:
            return None
        began = time.perf_counter()
        result: Written | str | None = None
        try:
            with strategy.raise_on_all_ranks("saving"):
                result = save.phase.result()
        except StorageError as problem:
            save.problem = save.problem or problem
        if save.publishing is None:
            parts = strategy.gather_objects(result)
            save.publishing = self._thread.submit(self._publish, save, [part for part in parts if part])
            save.blocked_seconds += time.perf_counter() - began
            return None
        self._save = None
        if save.problem is None:
            self._newest_step = save.step
            self._best_step = save.step if save.is_best else self._best_step
        blocked, seconds = save.blocked_seconds, time.perf_counter() - save.began
        directory, notice = self.directory.step(save.step), str(result or "")
        return SaveResult(directory, save.step, save.is_best, save.problem, notice, blocked, seconds)

    def check_room(self, num_bytes: int) -> None:
        """Refuse to start where not even one checkpoint would fit. Collective.

        Args:
            num_bytes: of the state; the random state of every rank comes to it.
        Raises:
            StorageError: says how much is wanted.
        """
        with self._strategy.raise_on_all_ranks("looking for room"), storage_errors("look at", self.directory.path):
            if self._strategy.rank == 0:
                self.directory.check_room(num_bytes + self._strategy.world_size * rng.NUM_BYTES)

    def finish(self) -> SaveResult | None:
        """Wait for the save in flight; return how it ended, None if there was none. Collective."""
        result = None
        while self._save is not None:
            began = time.perf_counter()
            wait([self._save.phase], timeout=SECONDS_BETWEEN_VOTES)
            is_over = all(self._strategy.gather_objects(self.vote()))  # so that no rank waits for long in a collective
            self._save.blocked_seconds += time.perf_counter() - began
            result = self.advance() if is_over else None
        return result

    def close(self) -> None:
        """Wait for what this rank's thread is doing; a save that the ranks did not agree on is not published."""
        self._thread.shutdown()

    def _write(
        self,
        temporary: Path,
        share: Mapping[str, Tensor],
        random_state: Mapping[str, Tensor],
        trainer: bytes,
        also_sync: Callable[[], None],
    ) -> Written:
        rank, files = self._strategy.rank, []
        with storage_errors("write", temporary, advice=""):
            temporary.mkdir(exist_ok=True)
            for kind in KINDS:
                part = {name: share[key] for key in share if (name := key.removeprefix(f"{kind}/")) != key}
                if part or (rank == 0 and kind != "ema"):
                    files.append(write_tensors(temporary / tensor_file(kind, rank), part))
            files.append(write_tensors(temporary / tensor_file("rng", rank), random_state))
            if rank == 0:
                also_sync()
                files.append(FileEntry(TRAINER, *write_durably(temporary / TRAINER, [trainer])))
        return Written(files, {key: tensor_digest(tensor) for key, tensor in share.items()})

    def _publish(self, save: _Save, parts: list[Written]) -> str:
        """Publish what all ranks wrote, on rank zero; without any, the step is there and may become the best.

        Returns:
            What the disk refused afterwards.
        """
        if self._strategy.rank != 0:
            return ""
        try:
            if save.problem is not None:
                return ""
            with storage_errors("publish", self.directory.step(save.step), advice=""):
                files = [entry for part in parts for entry in part.files]
                tensors = {key: digest for part in parts for key, digest in part.tensors.items()}
                is_new = parts and self.directory.publish(save.temporary, Manifest(save.step, tuple(files), tensors))
                if save.is_best and not is_new:  # its own files do not say so
                    self.directory.point("BEST", self.directory.step(save.step).name)
            keep = self._config
            return self.directory.tidy(
                keep_last=keep.keep_last, keep_every_steps=keep.keep_every_steps, keep=self._source
            )
        finally:
            # What a broken disk does not let us delete is swept away at the next start.
            shutil.rmtree(save.temporary, ignore_errors=True)

    # -------------------------------------------------------- load

    def load(
        self,
        *,
        on_broken: Callable[[str], None] = lambda _: None,
        misfit: Callable[[int, Mapping[str, Any]], str | None] = lambda *_: None,
    ) -> Loaded | None:
        """Find the newest checkpoint whose every file is what was written; None on a fresh start. Collective.

        Broken ones are moved to `quarantine/`, and so are whole ones from which the run cannot go on as soon as there
        is an older one from which it can: what is saved from there on comes in their place.

        Args:
            on_broken: hears on rank zero which one and why, before it is moved.
            misfit: says on rank zero of the step and the trainer.json of a whole one why the run cannot go on from it.
        Raises:
            CheckpointError: there are checkpoints, none can be used.
            StorageError: a broken one cannot be moved, or the ranks do not see the same disk; then nothing is moved.
        """
        strategy, names = self._strategy, []
        with strategy.raise_on_all_ranks("looking for checkpoints"), storage_errors("clean", self.directory.path):
            if strategy.rank == 0:
                self.directory.prepare()
                names = [path.name for path in self.directory.steps()]
        rejected: list[str] = []
        unfit: dict[Path, str] = {}
        names = strategy.broadcast(names)
        self._check_same_disk(
            self.directory.path, lambda path: str(bool(names or (path.is_dir() and self.directory.steps())))
        )
        for name in names:
            directory = self.directory.path / name
            self._check_same_disk(directory, commit_digest)
            with strategy.raise_on_all_ranks("verifying a checkpoint"):
                mine = checkpoint_problems(directory, share=slice(strategy.rank, None, strategy.world_size))
            problems = [problem for problems in strategy.gather_objects(mine) for problem in problems]
            if problems:
                rejected.append(f"{name}: {problems[0]}")
                self._set_aside(directory, rejected[-1], on_broken)
                continue
            with strategy.raise_on_all_ranks("comparing a checkpoint with the run"), storage_errors("read", directory):
                reason = misfit(step_of(name), read_trainer(directory)) if strategy.rank == 0 else None
            reason = strategy.broadcast(reason)
            if reason:
                unfit[directory] = f"{name}: {reason}"
                continue
            for newer, reason in unfit.items():
                rejected.append(reason)
                self._set_aside(newer, reason, on_broken)
            return self._found(directory, rejected)
        problem = strategy.broadcast(self.directory.unusable(rejected, unfit))
        if problem:
            raise CheckpointError(problem)
        return None

    def _set_aside(self, directory: Path, reason: str, on_broken: Callable[[str], None]) -> None:
        with self._strategy.raise_on_all_ranks("setting a checkpoint aside"):
            if self._strategy.rank == 0:
                on_broken(reason)
                with storage_errors("set aside the checkpoint", directory):
                    self.directory.quarantine(directory)

    def _check_same_disk(self, directory: Path, look: Callable[[Path], str]) -> None:
        """Refuse to judge what some ranks see and others do not. Collective.

        Raises:
            StorageError: names a rank that sees something else than rank zero.
        """
        with self._strategy.raise_on_all_ranks("looking at a checkpoint"), storage_errors("read", directory):
            seen = look(directory)
        views = self._strategy.gather_objects(seen)
        others = [rank for rank, view in enumerate(views) if view != views[0]]
        if others:
            raise StorageError(
                f"rank {others[0]} of {len(views)} does not see the same in {directory} as rank 0: is run.output_root "
                "on a disk that all machines share and have mounted? Nothing was moved; mend that, then start the same "
                "command again"
            )

    def _found(self, directory: Path, rejected: list[str]) -> Loaded:
        with self._strategy.raise_on_all_ranks("reading a checkpoint"), storage_errors("read", directory):
            loaded = Loaded(directory, read_manifest(directory), read_trainer(directory), rejected)
        with self._strategy.raise_on_all_ranks("mending LATEST and BEST"), storage_errors("write in", directory.parent):
            if self._strategy.rank == 0:
                self._best_step = self.directory.mend_pointers()
        self._source, self._newest_step = directory, loaded.step
        return loaded

    def kept_steps(self) -> set[int]:
        """Return the steps whose checkpoints are there."""
        return {step_of(path.name) for path in self.directory.steps()}

    def name_best(self, step: int) -> None:
        """Have BEST name a checkpoint that is there. On rank zero.

        Raises:
            StorageError: the disk refuses.
        """
        with storage_errors("write in", self.directory.path):
            self.directory.point("BEST", self.directory.step(step).name)
        self._best_step = step

    def restore(self, loaded: Loaded) -> None:
        """Put weights, optimizer and random state of a verified checkpoint into this rank. Collective.

        Raises:
            CheckpointError: its tensors are not those of this model, or do not read back from it as they were saved.
        """
        strategy = self._strategy
        with strategy.raise_on_all_ranks("loading a checkpoint"):
            saved = SavedState(loaded.directory, loaded.manifest)
            check_layout(saved, loaded.directory, manifest=loaded.manifest, strategy=strategy)
        strategy.restore(saved)
        self._check_restored(saved, loaded)
        with strategy.raise_on_all_ranks("restoring the random state"):
            self._restore_random(loaded)

    def _restore_random(self, loaded: Loaded) -> None:
        own = tensor_file("rng", self._strategy.rank)
        if own not in loaded.manifest.names("rng"):  # at another world size, ranks beyond the old ones keep their seed
            return
        try:
            rng.restore(dict(TensorFiles(loaded.directory, [own])))
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{loaded.directory / own} is no random state ({error!r}), though its digest is the one in {COMMIT}: "
                "this harness has not written it. Take another checkpoint"
            ) from error

    def _check_restored(self, saved: SavedState, loaded: Loaded) -> None:
        """Compare everything that this rank holds now with the digests of the manifest."""
        strategy, wanted = self._strategy, dict(loaded.manifest.tensors)
        if strategy.average is None:  # the run goes on without one
            wanted = {key: digest for key, digest in wanted.items() if not key.startswith("ema/")}
        different = []
        for key, tensor in strategy.state():
            digest = wanted.pop(key, None)
            if digest is None:
                continue  # state of an optimizer that had none then
            if saved[key].dtype != tensor.dtype:  # the run goes on in another precision
                digest = tensor_digest(saved[key].to(tensor.dtype))
            if tensor_digest(tensor) != digest:
                different.append(key)
        different += wanted  # never taken up
        with strategy.raise_on_all_ranks("comparing the state with the checkpoint"):
            if different:
                raise CheckpointError(
                    f"{len(different)} tensors are not what {loaded.directory} holds after loading it, such as "
                    f"{different[0]}. That is a bug of the harness: report it, and resume with the strategy and number "
                    f"of ranks that saved ({loaded.trainer.get('strategy')} on {loaded.trainer.get('world_size')})"
                )

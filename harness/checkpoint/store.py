"""Saving, finding and keeping checkpoints. Every rank calls; rank zero publishes.

A save is written to `.tmp-step-N-NONCE/`, synced, and renamed: whoever looks sees all of it or nothing.
"""

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from harness.checkpoint import format, rng
from harness.errors import CheckpointError, StorageError
from harness.files import json_bytes, replace_durably, storage_errors, sync_directory
from harness.strategy.base import Strategy

_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint."""

    directory: Path
    step: int
    trainer: Mapping[str, Any]
    files: frozenset[str]
    """The names that its COMMIT.json lists; nothing else in the directory is read."""
    rejected: list[str]
    """Newer checkpoints that could not be used, each with the reason."""


class CheckpointStore:
    """The `checkpoints/` directory of a run."""

    def __init__(self, directory: Path, strategy: Strategy, *, keep_last: int) -> None:
        self.directory = directory
        self._strategy = strategy
        self._keep_last = keep_last

    # -------------------------------------------------------- save

    def save(self, step: int, trainer: Mapping[str, Any], *, is_best: bool) -> Path:
        """Write the whole state of the run as `step-N`, unless it is there; then it may become the best. Collective.

        Raises:
            StorageError: on every rank; nothing half-written stays, older checkpoints are untouched.
        """
        strategy = self._strategy
        strategy.share_buffers()
        final = self.directory / f"step-{step:08d}"
        if strategy.broadcast(final.exists()):
            with strategy.together("saving"), storage_errors("point to", final):
                if strategy.rank == 0:
                    self._point(final, step=step, is_best=is_best)
            return final
        temporary = self.directory / f".tmp-{final.name}-{strategy.broadcast(uuid.uuid4().hex[:8])}"
        with strategy.together("saving"), storage_errors("create", temporary):
            if strategy.rank == 0:
                temporary.mkdir(parents=True)
        # Collective: every rank takes part in gathering what only rank zero writes.
        state = {key: tensor.detach().cpu() for key, tensor in strategy.state() if strategy.rank == 0}
        try:
            with strategy.together("saving"), storage_errors("write", temporary):
                written = self._write(temporary, state, trainer)
            files = [entry for entries in strategy.gather_objects(written) for entry in entries]
            with strategy.together("saving"), storage_errors("publish", final):
                if strategy.rank == 0:
                    self._publish(temporary, final, files, step=step, is_best=is_best)
        except StorageError:
            if strategy.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def _write(
        self, directory: Path, state: Mapping[str, Tensor], trainer: Mapping[str, Any]
    ) -> list[format.FileEntry]:
        rank = self._strategy.rank
        written = [format.write_tensors(directory / format.rng_file(rank), rng.capture())]
        if rank == 0:
            for prefix, name in (("model/", format.MODEL), ("optim/", format.OPTIM)):
                part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                written.append(format.write_tensors(directory / name, part))
            written.append(format.write_file(directory / format.TRAINER, json_bytes(trainer)))
        return written

    def _publish(
        self, temporary: Path, final: Path, files: list[format.FileEntry], *, step: int, is_best: bool
    ) -> None:
        format.write_commit(temporary, files, step=step)
        sync_directory(temporary)
        os.rename(temporary, final)
        sync_directory(self.directory)
        self._point(final, step=step, is_best=is_best)
        self._retire()

    def _point(self, final: Path, *, step: int, is_best: bool) -> None:
        for name in ("LATEST", "BEST") if is_best else ("LATEST",):
            replace_durably(self.directory / name, json_bytes({"directory": final.name, "step": step}))

    def _retire(self) -> None:
        """Delete all but the newest and the best, each by renaming it first."""
        steps = self._steps()
        best = self.best()
        for directory in steps[self._keep_last :]:
            if directory.name != best:
                trash = directory.with_name(f".trash-{directory.name}")
                os.rename(directory, trash)
                shutil.rmtree(trash)

    # -------------------------------------------------------- load

    def load(self) -> Loaded | None:
        """Find the newest checkpoint whose every file is what was written; None on a fresh start. Collective.

        Broken ones are moved to `quarantine/`.

        Raises:
            CheckpointError: there are checkpoints, none can be used.
        """
        strategy = self._strategy
        with strategy.together("looking for checkpoints"), storage_errors("clean", self.directory):
            if strategy.rank == 0:
                self._sweep()
        names = strategy.broadcast([path.name for path in self._steps()])
        in_quarantine = strategy.broadcast(len(list(self.directory.glob("quarantine/*"))))
        rejected: list[str] = []
        for name in names:
            directory = self.directory / name
            problems = [p for problems in strategy.gather_objects(self._problems(directory)) for p in problems]
            if not problems:
                trainer = format.read_json(directory / format.TRAINER)
                files = frozenset(entry.name for entry in format.read_commit(directory))
                if rejected:
                    with strategy.together("looking for checkpoints"), storage_errors("write in", self.directory):
                        if strategy.rank == 0:
                            self._mend_pointers(directory, step=int(trainer["step"]))
                return Loaded(directory, int(trainer["step"]), trainer, files, rejected)
            rejected.append(f"{name}: {problems[0]}")
            with strategy.together("setting a broken checkpoint aside"), storage_errors("move", directory):
                if strategy.rank == 0:
                    self._quarantine(directory)
        if rejected or in_quarantine:
            reasons = "".join(f"\n  {reason}" for reason in rejected)
            raise CheckpointError(
                f"none of the {len(rejected) or in_quarantine} checkpoints in {self.directory} can be used; they are "
                f"in quarantine/ now{reasons}\nPut a good copy back as {self.directory}/step-N, or start afresh under "
                "another run.name"
            )
        return None

    def restore(self, loaded: Loaded) -> None:
        """Put weights, optimizer and random state of a verified checkpoint into this rank. Collective.

        Raises:
            CheckpointError: its tensors are not those of this model.
        """
        strategy = self._strategy
        with strategy.together("loading a checkpoint"):
            saved = format.SavedState(loaded.directory)
            self._check_shapes(saved, loaded.directory)
            strategy.restore(saved)
            own = format.rng_file(strategy.rank)
            if own in loaded.files:  # ranks that the run did not have before keep their fresh random state
                rng.restore(safetensors.torch.load_file(loaded.directory / own))

    def best(self) -> str:
        """Return the name of the best checkpoint, or "" if none is named; BEST is a hint and may be broken."""
        try:
            name = str(format.read_json(self.directory / "BEST")["directory"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return ""
        return name if _STEP.fullmatch(name) and (self.directory / name).is_dir() else ""

    def _check_shapes(self, saved: format.SavedState, directory: Path) -> None:
        wanted = {name: list(shape) for name, shape in self._strategy.model_shapes().items()}
        found = saved.shapes("model")
        if found == wanted:
            return
        differ = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
        lines = [f"  {name}: saved {found.get(name, 'none')}, wanted {wanted.get(name, 'none')}" for name in differ]
        raise CheckpointError(
            f"{directory} was made by another model; {len(differ)} tensors differ:\n" + "\n".join(lines[:8]) + "\n"
            "Use the config it was made with (config.yaml in the run directory), or another run.name"
        )

    def _problems(self, directory: Path) -> list[str]:
        """Verify this rank's share of the files."""
        try:
            files = format.read_commit(directory)
            share = files[self._strategy.rank :: self._strategy.world_size]
            return [problem for entry in share if (problem := format.file_problem(directory, entry))]
        except (ValueError, OSError) as error:  # OSError: the disk cannot read it
            return [str(error)]

    def _quarantine(self, directory: Path) -> None:
        aside = self.directory / "quarantine"
        aside.mkdir(exist_ok=True)
        os.rename(directory, aside / f"{directory.name}-{uuid.uuid4().hex[:8]}")

    def _mend_pointers(self, newest: Path, *, step: int) -> None:
        """Have LATEST name the newest good checkpoint, and BEST nothing that was set aside."""
        self._point(newest, step=step, is_best=False)
        if not self.best():
            (self.directory / "BEST").unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what dead saves left behind."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for pattern in (".tmp-*", ".trash-*"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover)
        for pattern in (".LATEST.tmp-*", ".BEST.tmp-*"):
            for leftover in self.directory.glob(pattern):
                leftover.unlink()

    def _steps(self) -> list[Path]:
        """Return the published checkpoints, newest first."""
        found = [path for path in self.directory.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

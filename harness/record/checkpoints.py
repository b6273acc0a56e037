"""The `checkpoints/` directory: what rank zero does there. Nothing else in the house names these files.

A save is written to `.tmp-step-N-NONCE/`, synced, and renamed: whoever looks sees all of it or nothing.
"""

import errno
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import StorageError
from harness.record.files import (
    json_bytes,
    make_directory_durably,
    replace_durably,
    storage_errors,
    sync_directory,
    write_durably,
)
from harness.record.manifest import COMMIT, MAX_COUNT, TRAINER, Manifest, read_json, too_large

_STEP = re.compile(r"step-(\d{8,})")


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def step_of(name: str) -> int:
    """Return the step of a checkpoint by its name."""
    return int(name.removeprefix("step-"))


def _fields(path: Path) -> dict[str, Any]:
    """Return what a JSON file of hints holds, nothing if it is damaged or gone."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove(path: Path) -> None:
    """Delete a folder with all that is in it, a file, or a link, and nothing that a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _refuse_other_than_folder(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is no folder, and in the way")


class CheckpointDirectory:
    """Publishes, finds and retires checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.path / f"step-{step:08d}"

    def temporary(self, step: int, nonce: str) -> Path:
        """Return where a save is written before it is published."""
        return self.path / f".tmp-step-{step:08d}-{nonce}"

    def steps(self) -> list[Path]:
        """Return the published checkpoints, newest first."""
        found = [path for path in self.path.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: step_of(path.name), reverse=True)

    def newest(self) -> str:
        """Return the newest checkpoint; empty if there is none."""
        return next((path.name for path in self.steps()), "")

    def named_by(self, pointer: str) -> str:
        """Return the checkpoint that LATEST or BEST names, a hint; empty if there is none."""
        content = _fields(self.path / pointer)
        name = self._published(content.get("step"))
        return name if name == content.get("directory") else ""

    def best(self) -> str:
        """Return the best checkpoint; empty if there is none.

        BEST and the newest checkpoint both say which; what was said later is right, and BEST tells after which
        checkpoint it was written (of earlier versions: its own). Only BEST knows of a step that became the best when it
        was saved already, only the newest checkpoint where the disk refused BEST or damaged it.
        """
        newest, named = self.newest(), self.named_by("BEST")
        saved = self._published(_fields(self.path / newest / TRAINER).get("best_step")) if newest else ""
        if not (named and saved):
            return named or saved
        written_after = _fields(self.path / "BEST").get("after", step_of(named))
        return saved if type(written_after) is int and written_after < step_of(newest) else named

    def _published(self, step: Any) -> str:
        name = self.step(step).name if type(step) is int and 0 <= step <= MAX_COUNT else ""
        return name if name and (self.path / name).is_dir() else ""

    # -------------------------------------------------------- save

    def publish(self, temporary: Path, manifest: Manifest) -> bool:
        """Make a checkpoint of what was written: COMMIT.json last, then the rename.

        Returns:
            False if it is there: an earlier try has failed only after that.
        Raises:
            OSError: the disk refuses, or does not have here what every rank wrote.
        """
        if (self.step(manifest.step) / COMMIT).exists():
            return False
        for entry in manifest.files:
            if (size := _size_of(temporary / entry.name)) != entry.size:
                raise OSError(
                    errno.EIO,
                    f"{entry.name} has {size} bytes here, the rank that wrote it wrote {entry.size:,} (is "
                    "run.output_root on a disk that all machines share?)",
                )
        commit = manifest.to_bytes()
        for name, size in ((COMMIT, len(commit)), *((entry.name, entry.size) for entry in manifest.files)):
            if name in (COMMIT, TRAINER) and (problem := too_large(name, size)):
                raise OSError(errno.EFBIG, f"{problem}, with {len(manifest.tensors):,} tensors: no start could read it")
        write_durably(temporary / COMMIT, [commit])
        sync_directory(temporary)
        os.rename(temporary, self.step(manifest.step))
        sync_directory(self.path)
        return True

    def point(self, pointer: str, name: str) -> None:
        """Have LATEST or BEST name a checkpoint, unless it does."""
        if self.named_by(pointer) != name:
            content = {"directory": name, "step": step_of(name), "after": step_of(self.newest())}
            replace_durably(self.path / pointer, json_bytes(content))

    def tidy(self, *, keep_last: int, keep_every_steps: int | None, keep: Path | None) -> str:
        """Point to the newest and the best checkpoint, and delete old ones.

        Args:
            keep_last: how many of the newest stay; so does the best.
            keep_every_steps: those whose step is a multiple of it stay.
            keep: one more that stays.
        Returns:
            What the disk refused: the checkpoints stand without it.
        """
        refused = []
        tasks: dict[str, Callable[[], object]] = {
            "LATEST and BEST cannot be written": self.mend_pointers,
            "old checkpoints cannot be deleted": lambda: self._retire(keep_last, keep_every_steps, keep),
        }
        for failure, task in tasks.items():
            try:
                task()
            except OSError as error:
                refused.append(f"{failure}: {error}")
        return "; ".join(refused)

    def _retire(self, keep_last: int, keep_every_steps: int | None, keep: Path | None) -> None:
        best = self.best()
        for directory in self.steps()[keep_last:]:
            is_kept = keep_every_steps and step_of(directory.name) % keep_every_steps == 0
            if is_kept or directory == keep or directory.name == best:
                continue
            trash = directory.with_name(f".trash-{directory.name}")
            os.rename(directory, trash)
            shutil.rmtree(trash)

    # -------------------------------------------------------- load

    def prepare(self) -> None:
        """Make the directory, and remove what dead saves left behind.

        Raises:
            OSError: it cannot be made.
            StorageError: something that is left cannot be removed.
        """
        _refuse_other_than_folder(self.path)
        make_directory_durably(self.path)
        for pattern in (".tmp-step-*", ".trash-step-*", ".LATEST.tmp-*", ".BEST.tmp-*"):
            for leftover in self.path.glob(pattern):
                with storage_errors("remove", leftover):
                    _remove(leftover)

    def check_room(self, num_bytes: int) -> None:
        """Refuse to start where not even one checkpoint would fit.

        Raises:
            StorageError: says how much is wanted.
        """
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise StorageError(
                f"{self.path} has {free:,} bytes free, one checkpoint of this run takes {num_bytes:,}. Free some, or "
                "set run.output_root to a larger disk"
            )

    def num_in_quarantine(self) -> int:
        """Return how many checkpoints were set aside, now or earlier."""
        return len(list(self.path.glob("quarantine/*")))

    def quarantine(self, directory: Path) -> None:
        """Set a checkpoint aside that cannot be used."""
        aside = self.path / "quarantine"
        _refuse_other_than_folder(aside)
        aside.mkdir(exist_ok=True)
        os.rename(directory, aside / f"{directory.name}-{uuid.uuid4().hex[:8]}")

    def unusable(self, broken: Sequence[str], unfit: Mapping[Path, str]) -> str:
        """Return what there is to say where there are checkpoints and none can be used; empty if there are none.

        Args:
            broken: what was set aside just now, each with the reason.
            unfit: whole ones from which the run cannot go on, newest first, each with the reason.
        """
        in_quarantine = self.num_in_quarantine()
        if not (in_quarantine or unfit):
            return ""
        reasons = [*unfit.values(), *broken]
        if in_quarantine > len(broken):
            earlier = in_quarantine - len(broken)
            reasons.append(f"why {earlier} were set aside at an earlier start: {self.path.parent / 'events.jsonl'}")
        where = f"none of the {in_quarantine + len(unfit)} checkpoints in {self.path} can be used"
        where += f"; {in_quarantine} are in quarantine/ now" if in_quarantine else ""
        advice = f"Put a good copy back as {self.path}/step-N, or start afresh under another run.name"
        if unfit:
            newest, run = next(iter(unfit)), self.path.parent
            new = run.with_name(f"{run.name}-from-{step_of(newest.name)}")
            advice = (
                f"Put the whole ledger.jsonl back; or go on from update {step_of(newest.name):,} as a new run, whose "
                f"ledger begins there: {shlex.join(['mkdir', '-p', f'{new}/checkpoints'])} && "
                f"{shlex.join(['cp', '-r', str(newest), f'{new}/checkpoints/'])} and then the same command with "
                f"run.name={new.name}"
            )
        return "\n".join([where, *(f"  {reason}" for reason in reasons), advice])

    def mend_pointers(self) -> int | None:
        """Have LATEST name the newest checkpoint and BEST the best one, or nothing that is gone; return the step of it.

        They name another if the run was killed between publishing a checkpoint and pointing to it, a newer one is
        broken, or the disk refused or damaged them.
        """
        best = self.best()
        for pointer, name in (("LATEST", self.newest()), ("BEST", best)):
            if name:
                self.point(pointer, name)
            else:
                (self.path / pointer).unlink(missing_ok=True)
        return step_of(best) if best else None

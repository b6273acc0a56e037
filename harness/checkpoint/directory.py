"""The `checkpoints/` directory: what rank zero does there. Nothing else in the house names these files.

A save is written to `.tmp-step-N-NONCE/`, synced, and renamed: whoever looks sees all of it or nothing.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.checkpoint.manifest import COMMIT, TRAINER, Manifest, read_json
from harness.errors import StorageError
from harness.files import json_bytes, make_directory_durably, replace_durably, sync_directory, write_durably

_STEP = re.compile(r"step-(\d{8,})")


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _fields(path: Path) -> dict[str, Any]:
    """Return what a JSON file of hints holds, nothing if it is damaged or gone."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
        return sorted(found, key=lambda path: _step_of(path.name), reverse=True)

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

        BEST and the newest checkpoint both say which; the later one is right. Only BEST knows of a step that became the
        best when it was saved already, only the newest checkpoint where the disk refused BEST or damaged it.
        """
        newest = self.newest()
        saved = self._published(_fields(self.path / newest / TRAINER).get("best_step")) if newest else ""
        return max(filter(None, (self.named_by("BEST"), saved)), key=_step_of, default="")

    def _published(self, step: Any) -> str:
        name = self.step(step).name if type(step) is int else ""
        return name if name and (self.path / name).is_dir() else ""

    # -------------------------------------------------------- save

    def publish(self, temporary: Path, manifest: Manifest) -> bool:
        """Make a checkpoint of what was written: COMMIT.json last, then the rename.

        Returns:
            False if it is there: an earlier try has failed only after that.
        Raises:
            OSError: the disk refuses, or does not have here what every rank wrote.
        """
        if self.step(manifest.step).exists():
            return False
        for entry in manifest.files:
            if (size := _size_of(temporary / entry.name)) != entry.size:
                raise OSError(
                    errno.EIO,
                    f"{entry.name} has {size} bytes here, the rank that wrote it wrote {entry.size:,} (is "
                    "run.output_root on a disk that all machines share?)",
                )
        write_durably(temporary / COMMIT, [manifest.to_bytes()])
        sync_directory(temporary)
        os.rename(temporary, self.step(manifest.step))
        sync_directory(self.path)
        return True

    def point(self, pointer: str, name: str) -> None:
        """Have LATEST or BEST name a checkpoint, unless it does."""
        if self.named_by(pointer) != name:
            replace_durably(self.path / pointer, json_bytes({"directory": name, "step": _step_of(name)}))

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
            is_kept = keep_every_steps and _step_of(directory.name) % keep_every_steps == 0
            if is_kept or directory == keep or directory.name == best:
                continue
            trash = directory.with_name(f".trash-{directory.name}")
            os.rename(directory, trash)
            shutil.rmtree(trash)

    # -------------------------------------------------------- load

    def prepare(self) -> None:
        """Make the directory, and remove what dead saves left behind."""
        make_directory_durably(self.path)
        for pattern in (".tmp-step-*", ".trash-step-*"):
            for leftover in self.path.glob(pattern):
                shutil.rmtree(leftover)
        for pattern in (".LATEST.tmp-*", ".BEST.tmp-*"):
            for leftover in self.path.glob(pattern):
                leftover.unlink()

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
        """Return how many broken checkpoints were set aside, now or earlier."""
        return len(list(self.path.glob("quarantine/*")))

    def quarantine(self, directory: Path) -> None:
        """Set a broken checkpoint aside."""
        aside = self.path / "quarantine"
        aside.mkdir(exist_ok=True)
        os.rename(directory, aside / f"{directory.name}-{uuid.uuid4().hex[:8]}")

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
        return _step_of(best) if best else None

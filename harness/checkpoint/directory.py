"""The `checkpoints/` directory: what rank zero does there. Nothing else in the house names these files.

A save is written to `.tmp-step-N-NONCE/`, synced, and renamed: whoever looks sees all of it or nothing.
"""

import errno
import os
import re
import shutil
import uuid
from pathlib import Path

from harness.checkpoint.manifest import COMMIT, Manifest, read_json
from harness.errors import StorageError
from harness.files import json_bytes, make_directory_durably, replace_durably, sync_directory, write_durably

_STEP = re.compile(r"step-(\d{8,})")


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


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
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def named_by(self, pointer: str) -> str:
        """Return the checkpoint that LATEST or BEST names, a hint; empty if there is none."""
        try:
            name = read_json(self.path / pointer)["directory"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return name if isinstance(name, str) and _STEP.fullmatch(name) and (self.path / name).is_dir() else ""

    # -------------------------------------------------------- save

    def publish(self, temporary: Path, manifest: Manifest) -> None:
        """Make a checkpoint of what was written: COMMIT.json last, then the rename.

        If it is there, an earlier try has failed only after that.

        Raises:
            OSError: the disk refuses, or does not have here what every rank wrote.
        """
        if self.step(manifest.step).exists():
            return
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

    def point(self, step: int, *, is_best: bool) -> None:
        """Have LATEST, and BEST where it is the best, name a step."""
        for name in ("LATEST", "BEST") if is_best else ("LATEST",):
            replace_durably(self.path / name, json_bytes({"directory": self.step(step).name, "step": step}))

    def retire(self, *, keep_last: int, keep_every_steps: int | None, keep: Path | None) -> None:
        """Delete checkpoints, each by renaming it first.

        Args:
            keep_last: how many of the newest stay; so does BEST.
            keep_every_steps: those whose step is a multiple of it stay.
            keep: one more that stays.
        """
        best = self.named_by("BEST")
        for directory in self.steps()[keep_last:]:
            step = int(directory.name.removeprefix("step-"))
            if directory == keep or directory.name == best or (keep_every_steps and step % keep_every_steps == 0):
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

    def mend_pointers(self, newest: Path, *, is_best: bool) -> None:
        """Have LATEST name the newest good checkpoint, and BEST as well if it is the best, or nothing that is gone.

        They name another if the run was killed between publishing a checkpoint and pointing to it, or a newer one is
        broken.
        """
        pointers = ("LATEST", "BEST") if is_best else ("LATEST",)
        if any(self.named_by(pointer) != newest.name for pointer in pointers):
            self.point(int(newest.name.removeprefix("step-")), is_best=is_best)
        if not self.named_by("BEST"):
            (self.path / "BEST").unlink(missing_ok=True)

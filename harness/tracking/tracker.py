"""What a place is where a run can be watched.

A tracker lives in a process of its own (track.py), so that nothing it does or suffers can reach the training; what it
is told is read from the run's files.

To add one of yours: a file with a subclass, and `tracking.own: [file.Subclass]`. To add one that comes with the harness
and has settings: a file beside this one, an entry in `build.py`, a section in harness/config/tracking.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.config.run_config import RunConfig
from harness.observers.base import Link
from harness.tracking.points import Row

TO_SEND = "to send it"
"""What the link of a tracker is for that sends later what it could not."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that is tracked."""

    directory: Path
    config: RunConfig
    id: str
    """Of run.json; one for the run's whole life."""
    trainer_pid: int | None = None
    """The process of rank zero, while it trains."""


@dataclass(frozen=True)
class Opened:
    """Where a run can be watched now."""

    text: str
    """A sentence for the user."""
    url: str | None = None
    last_step: int = 0
    """The last step that is already there: rows up to it are not logged again."""
    last_loss: float | None = None
    """The loss that is there for it, if the place says so."""


class Tracker(ABC):
    """Hears of one run from its first step to its last, of which it may have heard some before."""

    name: ClassVar[str] = ""
    """Of its section in the configuration, if it has one."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    @property
    def every_steps(self) -> int:
        """Updates whose step is a multiple of this become rows."""
        tracking = self.run.config.tracking
        return getattr(getattr(tracking, self.name, None), "log_every_steps", None) or tracking.log_every_steps

    @classmethod
    def links(cls, directory: Path) -> list[Link]:
        """Return what a person types to see or send the run of a directory, whether it is opened yet or not."""
        return []

    @abstractmethod
    def open(self, *, offline: bool) -> Opened:
        """Begin, or go on with what was begun by an earlier process.

        Args:
            offline: nothing may be sent.
        """

    @abstractmethod
    def describe(self, facts: dict[str, Any]) -> None:
        """Hear what is known of the run besides its configuration: where and by what it is trained."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """Take one row; steps only grow."""

    def alert(self, title: str, text: str) -> None:
        """Tell people of something that they may want to act on."""
        return

    @abstractmethod
    def close(self, *, exit_code: int) -> str:
        """End: everything logged is kept or sent when this returns; a sentence for the user, or nothing.

        Args:
            exit_code: of the run (see errors.py).
        """

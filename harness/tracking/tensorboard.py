"""TensorBoard: event files in RUN/tensorboard, drawn afresh from the ledger whenever the run is started."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.observers.base import Link
from harness.tracking.points import Row
from harness.tracking.tracker import Opened, Tracker

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoardTracker(Tracker):
    """Writes scalars by step, the configuration as a text; needs neither torch nor TensorFlow."""

    name = "tensorboard"

    @classmethod
    def links(cls, directory: Path) -> list[Link]:
        return [("to look at it", shlex.join(["tensorboard", "--logdir", str(directory / "tensorboard")]))]

    def open(self, *, offline: bool) -> Opened:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._directory = self.run.directory / "tensorboard"
        # The ledger has every row, and what an earlier process was about to write is unknown.
        for path in self._directory.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = EventFileWriter(str(self._directory))
        self._text("config", json.dumps(self.run.config.model_dump(mode="json"), indent=1))
        return Opened(f"tensorboard: written to {self._directory}")

    def describe(self, facts: dict[str, Any]) -> None:
        self._text("facts", json.dumps(facts, indent=1))

    def log(self, row: Row) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in row.figures.items()]
        self._add(Summary(value=scalars), step=row.step)

    def close(self, *, exit_code: int) -> str:
        self._writer.close()
        return ""

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        metadata = create_summary_metadata(display_name=tag, description="")
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # a block of code in Markdown
        value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([indented.encode()]))
        self._add(Summary(value=[value]), step=0)

    def _add(self, summary: Summary, *, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(summary=summary, step=step, wall_time=time.time()))

"""Projects a run's ledger to where people watch it: `harness track sync RUN`, or `follow` beside a run.

Nothing here is part of the training: `follow` is the process that harness/tracking/sidecar.py starts. Whatever becomes
of it, the next one reads the ledger from its beginning and logs what is missing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import select
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.run_config import RunConfig
from harness.config.tracking import Wandb, has_key, is_installed, wandb_settings
from harness.config.use import load_used
from harness.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError, HarnessError, RunInUseError, TrackingError
from harness.observers.base import Line
from harness.record.json_lines import has, parse_line
from harness.record.run_directory import read_identity, stored_config
from harness.stopping import StopSignals
from harness.tracking.build import build_tracker
from harness.tracking.points import Rows
from harness.tracking.tracker import Opened, TrackedRun, Tracker

SECONDS_BETWEEN_LOOKS = 0.5
NICENESS = 5
"""So that ranks on the CPU go first."""
END_SECONDS = 120
"""How long this process may live on after its run; the kernel ends it then."""
EXIT_KILLED = 255
"""What is told of a run that ended without a word."""
FACTS_LEFT_OUT = {"event", "time", "step", *RunConfig.model_fields}
ALERTS = {
    "nonfinite": ("NaN or infinity", "update {step:,} was not applied: not finite, first in {parameter}"),
    "save failed": ("a save failed", "at update {step:,}: {reason}"),
    "failed": ("failed", "exit code {code} after update {step:,}: {reason}"),
    "ended: early_stopping": ("early stop", "after update {step:,}: no better evaluation within the patience"),
    "ended: interrupted": ("interrupted", "saved after update {step:,}; the same command goes on from there"),
}
"""Title and text for each event that people want to hear of at once."""
IN_LEDGER: dict[str, dict[str, Any]] = {
    "update": {"step": int, "applied": bool},
    "evaluation": {"step": int, "metrics": dict},
}
IN_EVENTS: dict[str, dict[str, Any]] = {
    "gradients": {"step": int, "norms": dict},
    "samples": {"step": int, "columns": list, "rows": list},
    "nonfinite": {"step": int, "parameter": object},
    "save failed": {"step": int, "reason": object},
    "failed": {"step": int, "code": int, "reason": object},
    "ended": {"step": int, "reason": str},
}
"""What is read of each kind of line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit code."""
    parser = argparse.ArgumentParser(prog="harness track", description="where a run can be watched", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    sync_parser = commands.add_parser("sync", help="send what wandb does not have yet of a run")
    sync_parser.add_argument("run", metavar="RUN", type=Path, help="a run directory, such as runs/mnist-cnn")
    sync_parser.add_argument("--fresh", action="store_true", help="all of it, to a new wandb run of the same name")
    follow_parser = commands.add_parser("follow")
    follow_parser.add_argument("tracker")
    follow_parser.add_argument("run", metavar="RUN", type=Path)
    follow_parser.add_argument("--trainer-pid", type=int)
    follow_parser.add_argument("--use", metavar="FILE", action="append", default=[])
    follow_parser.add_argument("--events-from", metavar="BYTES", type=int, default=0)
    follow_parser.add_argument("--offline", action="store_true")
    follow_parser.add_argument("--alerts-from", metavar="BYTES", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        if given.command == "sync":
            print(sync(given.run, is_fresh=given.fresh))
        else:
            follow(given)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


# ---------------------------------------------------------------- beside a run


def follow(given: argparse.Namespace) -> None:
    """Keep a tracker up to date until standard input ends, which it does with the training."""
    os.nice(NICENESS)
    for number in StopSignals.NUMBERS:  # they are for the training, whose end ends this
        signal.signal(number, signal.SIG_IGN)
    tell = _take_standard_output()
    load_used(given.use, folder=Path.cwd(), is_typed=True)
    tracker = build_tracker(given.tracker, tracked_run(given.run, trainer_pid=given.trainer_pid))
    opened = tracker.open(offline=given.offline)
    tell({"text": opened.text, "url": opened.url})
    projection = Projection(
        tracker,
        opened=opened,
        events_from=given.events_from,
        alerts_from=given.alerts_from,
        on_alert=lambda offset: tell({"alerts_from": offset + 1}),
        on_problem=lambda text: tell({"text": text}),
    )
    if _is_told_to_follow():
        projection.advance()
        silence = Silence(tracker.run.config.tracking.stall_alert_seconds)
        while not select.select([sys.stdin], [], [], SECONDS_BETWEEN_LOOKS)[0] or os.read(sys.stdin.fileno(), 64):
            if silence.is_too_long(now=time.monotonic(), has_news=projection.advance()):
                tracker.alert("stalled", projection.last_sign())
    signal.alarm(END_SECONDS)
    projection.advance()
    if text := projection.end():
        tell({"text": text})


def _take_standard_output() -> Any:
    """Keep standard output for what training is told; what libraries print goes to the log on standard error."""
    private = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: dict[str, Any]) -> None:
        try:
            print(json.dumps(message), file=private, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), private.fileno())  # the training is gone; go on to the end

    return tell


def _is_told_to_follow() -> bool:
    return bool(os.read(sys.stdin.fileno(), 64))


def tracked_run(directory: Path, *, trainer_pid: int | None = None, run_id: str | None = None) -> TrackedRun:
    """Return the run of a directory.

    Raises:
        ConfigError: it holds none that this version knows.
    """
    identity = read_identity(directory)
    config = stored_config(directory)
    return TrackedRun(directory, config, run_id or identity["id"], trainer_pid)


class Projection:
    """Brings what a run's files say to a tracker.

    Args:
        opened: what is there already.
        events_from: where this launch's lines of events.jsonl begin.
        alerts_from: of earlier ones nobody is alerted; None alerts nobody.
        on_alert: hears where the event begins of which people were just alerted.
        on_problem: hears of each line that is broken and left out, and of rows there that are of an earlier attempt.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        opened: Opened,
        events_from: int = 0,
        alerts_from: int | None = None,
        on_alert: Callable[[int], object] = lambda _: None,
        on_problem: Callable[[str], object],
    ) -> None:
        self._tracker = tracker
        self._rows = Rows(tracker.run.config, every_steps=tracker.every_steps)
        self._ledger = _Tail(tracker.run.directory / "ledger.jsonl", IN_LEDGER, on_problem)
        self._events = _Tail(tracker.run.directory / "events.jsonl", IN_EVENTS, on_problem)
        self._opened, self._events_from, self._on_problem = opened, events_from, on_problem
        self._alerts_from, self._on_alert = math.inf if alerts_from is None else alerts_from, on_alert
        self._exit_code: int | None = None
        self._step = 0

    def advance(self) -> bool:
        """Bring what was added since the last time; return whether anything was."""
        lines, events = list(self._ledger.lines()), list(self._events.lines())
        for offset, event in events:  # read second: norms stand there before their ledger line
            self._rows.take_event(event)
            if event["event"] == "started":
                self._tracker.describe({key: value for key, value in event.items() if key not in FACTS_LEFT_OUT})
            if offset >= self._events_from:
                self._exit_code = exit_code_of(event, before=self._exit_code)
            if offset >= self._alerts_from and (alert := alert_of(event)):
                self._tracker.alert(*alert)
                self._on_alert(offset)
        for _, line in lines:
            self._log(self._rows.take(line))
            self._step = line["step"]
        return bool(lines or events)

    def last_sign(self) -> str:
        """Return a sentence about a run that has not said anything for too long."""
        seconds = self._tracker.run.config.tracking.stall_alert_seconds
        return (
            f"no update, evaluation or save in {seconds:g} s after update {self._step:,}: a rank, a disk or the "
            "network hangs, or an evaluation takes longer than tracking.stall_alert_seconds"
        )

    def end(self) -> str:
        """Bring the last row, unless the run was killed and will come to it again, and close the tracker."""
        if self._exit_code is not None:
            self._log(self._rows.rest())
        return self._tracker.close(exit_code=EXIT_KILLED if self._exit_code is None else self._exit_code)

    def _log(self, rows: Iterator[Any]) -> None:
        for row in rows:
            if row.step > self._opened.last_step:
                self._tracker.log(row)
            elif row.step == self._opened.last_step and self._opened.last_loss is not None:
                self._compare(row.figures.get("train/loss"), self._opened.last_loss)

    def _compare(self, loss: float | None, loss_there: float) -> None:
        """Say so if an earlier attempt at the same steps, of which they were sent, had other results."""
        if loss is not None and not math.isclose(loss, loss_there, rel_tol=1e-4):
            self._on_problem(
                f"{self._tracker.name}: step {self._opened.last_step:,} has loss {loss_there:.6g} there and {loss:.6g} "
                "in the ledger: rows that were sent before a crash were made again with other results. "
                f"harness track sync --fresh {self._tracker.run.directory} sends them all to a new run"
            )


class Silence:
    """Tells once when a run has said nothing for too long, and once more when it stalls again.

    Args:
        limit_seconds: None never tells.
    """

    def __init__(self, limit_seconds: float | None) -> None:
        self._limit_seconds = math.inf if limit_seconds is None else limit_seconds
        self._since: float | None = None

    def is_too_long(self, *, now: float, has_news: bool) -> bool:
        """Return whether this is the moment to tell.

        Args:
            now: in seconds, of a clock that goes on while the run stands still.
            has_news: the run has said something since the last call.
        """
        if has_news or self._since is None:
            self._since = now
        if now - self._since < self._limit_seconds:
            return False
        self._since = math.inf  # until there is news
        return True


class _Tail:
    """The whole lines of a file that grows, each once.

    Args:
        wanted: what a line of each kind must have to be of use, and of which type.
        on_broken: hears of each line that has not.
    """

    def __init__(self, path: Path, wanted: Mapping[str, Mapping[str, Any]], on_broken: Callable[[str], object]) -> None:
        self._path, self._wanted, self._on_broken, self._read_bytes = path, wanted, on_broken, 0

    def lines(self) -> Iterator[tuple[int, Line]]:
        """Yield (where it begins, line) of what was added since the last call; a half-written line waits."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                offset, self._read_bytes = self._read_bytes, self._read_bytes + len(text)
                line = parse_line(text)
                if line is not None and has(line, {"event": str, **self._wanted.get(str(line.get("event")), {})}):
                    yield offset, line
                else:
                    self._on_broken(f"{self._path}: the line at byte {offset:,} is broken and left out")


def exit_code_of(event: Line, *, before: int | None) -> int | None:
    """Return how the run ended as an event tells it, or what was known before."""
    match event:
        case {"event": "started"}:
            return None
        case {"event": "ended", "reason": reason}:
            return EXIT_INTERRUPTED if reason == "interrupted" else EXIT_DONE
        case {"event": "failed", "code": int(code)}:
            return code
    return before


def alert_of(event: Line) -> tuple[str, str] | None:
    """Return title and text of the alert that an event is worth, if it is."""
    name = f"ended: {event['reason']}" if event["event"] == "ended" else event["event"]
    if name not in ALERTS:
        return None
    title, text = ALERTS[name]
    return title, text.format_map(event)


# ---------------------------------------------------------------- afterwards


def sync(directory: Path, *, is_fresh: bool) -> str:
    """Send to wandb what it does not have of a run, from the ledger alone; return a sentence about it.

    Args:
        is_fresh: to a new wandb run, with nothing of what went wrong in the old one.
    Raises:
        ConfigError: this machine cannot send it.
        RunInUseError: the run is training, and sends its rows itself.
        TrackingError: the server was not reached, refused, or does not have every row.
    """
    run = tracked_run(directory, run_id=uuid.uuid4().hex[:8] if is_fresh else None)
    if not is_installed("wandb"):
        raise ConfigError("wandb is not installed; pip install 'harness-train[wandb]'")
    if not has_key():
        raise ConfigError("sending wants an API key in WANDB_API_KEY or a netrc file; use wandb login")
    with (directory / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunInUseError(f"{directory} is training and is tracked by itself; wait for its end") from error
        run = TrackedRun(run.directory, _online(run.config), run.id)
        tracker = build_tracker("wandb", run)
        opened = tracker.open(offline=False)
        broken: list[str] = []
        projection = Projection(tracker, opened=opened, on_problem=broken.append)
        projection.advance()
        if missing := projection.end():
            raise TrackingError(missing)
    sent = f"{directory} is at {opened.url}, with every step of its ledger once"
    return "\n".join([f"{sent}, but for:" if broken else sent, *broken])


def _online(config: RunConfig) -> RunConfig:
    """Return the configuration with wandb online, whatever it and WANDB_MODE say."""
    os.environ["WANDB_MODE"] = "online"
    tracking = config.tracking
    wandb = (tracking.wandb or Wandb()).model_copy(update={"mode": "online"})
    tracking = tracking.model_copy(update={"wandb": wandb})
    try:
        wandb_settings(tracking)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config.model_copy(update={"tracking": tracking})


if __name__ == "__main__":
    sys.exit(main())

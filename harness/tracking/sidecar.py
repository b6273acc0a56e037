"""The process of a tracker, as rank zero sees it: started, watched, started again, ended; never waited for in a step.

The tracker reads the run's files by itself. Training only tells it when these are ready and when there will be no more,
so no tracker can slow an update, raise in one, or draw random numbers. A thread does all the waiting.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.observers.base import Line, Link, Observer
from harness.record.files import storage_errors
from harness.state import FitResult
from harness.tracking.tracker import TO_SEND

TRACK_MODULE = "harness.tracking.track"
RESTARTS = 3
CLOSE_SECONDS = 20.0
"""How long a tracker may take at the end of a run to send what it has not sent yet."""
OFFLINE_CLOSE_SECONDS = 60.0
"""How long one may take that only writes files: more than it needs on the busiest machine."""
INTERRUPTED_CLOSE_SECONDS = 8.0
"""How long at the end of an interrupted run, which may be killed in seconds: its next start sends the rest."""


class Sidecar(Observer):
    """Keeps one tracker's process alive from its construction to `close`.

    Args:
        tracker: its name in build.py.
        directory: of the run; run.json and config.yaml are there.
        links: how to see the run whatever becomes of the process.
        start_timeout_seconds: how long the tracker may take to open before it is started again offline; None if there
            is no server that it could wait for.
        use: files that register it.
    """

    def __init__(
        self,
        tracker: str,
        directory: Path,
        *,
        links: Sequence[Link] = (),
        start_timeout_seconds: float | None = None,
        use: Sequence[str] = (),
    ) -> None:
        self._links, self._url = links, ""
        self._sends = dict(links).get(TO_SEND, "")
        self._tracker, self._directory = tracker, directory
        self._start_timeout_seconds = start_timeout_seconds
        self._close_seconds = CLOSE_SECONDS if start_timeout_seconds is not None else OFFLINE_CLOSE_SECONDS
        log = directory / f"tracking-{tracker}.log"
        with storage_errors("write", log):
            self._log = log.open("ab")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_followed = self._is_ending = self._is_given_up = False
        self._news: list[Line] = []
        events = directory / "events.jsonl"
        self._alerts_from = events.stat().st_size if events.exists() else 0
        self._options = [f"--trainer-pid={os.getpid()}", f"--events-from={self._alerts_from}"]
        self._options += [f"--use={name}" for name in use]
        self._thread = threading.Thread(target=self._watch, name=f"{tracker} tracker", daemon=True)
        self._thread.start()

    def follow(self) -> None:
        """Have the tracker read the ledger, which is from here on only added to."""
        self._is_followed = True
        self._say_follow()

    def links(self) -> list[Link]:
        return [*([(self._tracker, self._url)] if self._url else []), *self._links]

    def news(self) -> list[Line]:
        with self._lock:
            news, self._news = self._news, []
        return news

    def on_end(self, result: FitResult) -> None:
        if result.reason == "interrupted":
            self._close_seconds = INTERRUPTED_CLOSE_SECONDS

    def close(self) -> None:
        """Wait for the tracker to finish, but not for long: what is missing then, `harness track sync` sends."""
        if self._is_ending:
            return
        self._is_ending = True
        self._hang_up()
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._is_given_up = True
            self._kill()
            self._thread.join(5.0)
            self._tell(
                f"{self._tracker}: not everything was taken in {self._close_seconds:.0f} s"
                + (f"; {self._sends} sends the rest" if self._sends else "")
            )
        self._log.close()

    # -------------------------------------------------------- in the thread

    def _watch(self) -> None:
        restarts_left, has_server = RESTARTS, self._start_timeout_seconds is not None
        while not self._is_given_up:
            process = self._start()
            if has_server and not self._hear_opened() and not self._is_given_up:
                self._tell(
                    f"{self._tracker}: no answer in {self._start_timeout_seconds:.0f} s or refused, so this run is "
                    f"tracked offline; {self._log.name} says more"
                )
                self._kill()
                process.wait()  # what it may still have said is not passed on
                has_server = False
                self._options.append("--offline")
                continue
            code = self._wait_for_end()
            if code == 0 or self._is_given_up:
                return
            if not restarts_left:
                self._tell(
                    f"{self._tracker}: its process ended {RESTARTS + 1} times (exit code {code}) and is left alone; "
                    f"the ledger has everything{f', {self._sends} sends it' if self._sends else ''}; {self._log.name} "
                    "says more"
                )
                return
            restarts_left -= 1

    def _start(self) -> subprocess.Popen[bytes]:
        options = [*self._options, f"--alerts-from={self._alerts_from}"]  # an earlier process has alerted of the rest
        process = subprocess.Popen(
            [sys.executable, "-m", TRACK_MODULE, "follow", self._tracker, str(self._directory), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C in the terminal is for the training
        )
        with self._lock:
            self._process = process
        if self._is_followed:
            self._say_follow()
        if self._is_ending:
            self._hang_up()
        return process

    def _hear_opened(self) -> bool:
        """Wait for the tracker's first sentence; return whether it came in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._start_timeout_seconds is not None
        end = time.monotonic() + self._start_timeout_seconds
        while time.monotonic() < end:
            if select.select([self._process.stdout], [], [], 0.1)[0]:
                line = self._process.stdout.readline()
                return bool(line) and self._pass_on(line)
            if self._is_ending:  # a short run does not wait for a silent server
                end = min(end, time.monotonic() + self._close_seconds / 4)
        return False

    def _wait_for_end(self) -> int:
        """Pass on what the tracker says until it ends, and return its exit code."""
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._pass_on(line)
        return self._process.wait()

    def _pass_on(self, line: bytes) -> bool:
        said: dict[str, Any] = json.loads(line)
        if "alerts_from" in said:
            self._alerts_from = said["alerts_from"]
            return True
        self._url = said.get("url") or self._url
        self._tell(**said)
        return True

    # -------------------------------------------------------- in either

    def _tell(self, text: str, **details: Any) -> None:
        with self._lock:
            self._news.append({"event": "notice", "text": text, "tracker": self._tracker, **details})

    def _say_follow(self) -> None:
        with self._lock:
            _write(self._process, b"follow\n")

    def _hang_up(self) -> None:
        with self._lock:
            _write(self._process, None)

    def _kill(self) -> None:
        """Kill the process, and leave it to the thread to wait for its end: training may want the lock meanwhile."""
        with self._lock:
            if self._process and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)


def _write(process: subprocess.Popen[bytes] | None, content: bytes | None) -> None:
    """Write to a process that may have ended, or close its input."""
    if process is None or process.stdin is None or process.stdin.closed:
        return
    try:
        if content is None:
            process.stdin.close()
        else:
            process.stdin.write(content)
            process.stdin.flush()
    except BrokenPipeError:
        return  # the thread hears of its end and starts the next one

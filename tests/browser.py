"""A headless Chromium, spoken to in its DevTools protocol over a pipe: no driver and no port."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
DEADLINE_SECONDS = 60.0


class Page:
    """One tab."""

    def __init__(self, process: subprocess.Popen[bytes], writer: int, reader: int) -> None:
        self._process, self._writer, self._reader = process, writer, reader
        self._ids = itertools.count(1)
        self._pending = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Send one command and return its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda message: message.get("id") == number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path: Path, *, width: int, scheme: str) -> None:
        """Load a file in a window of this width, for a reader who wants it `light` or `dark`, and wait for it."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """Return the value of some JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, to: Path) -> None:
        """Write the whole page as an image."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(base64.b64decode(image))

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Return what the browser told of since the page was opened."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def _wait(self, is_it: Any) -> dict[str, Any]:
        end = time.monotonic() + DEADLINE_SECONDS
        while True:
            while b"\0" not in self._pending:
                assert select.select([self._reader], [], [], max(0.0, end - time.monotonic()))[0], "no answer"
                received = os.read(self._reader, 1 << 20)
                assert received, f"chromium ended with {self._process.wait()}"
                self._pending += received
            text, _, self._pending = self._pending.partition(b"\0")
            message = json.loads(text)
            if "method" in message:
                self.events.append(message)
            if is_it(message):
                return dict(message)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start Chromium with a profile and temporary files of its own in a folder, and end it.

    The browser reads commands from descriptor 3 and writes to 4.
    """
    assert PROGRAM, "chromium is not installed"
    their_reader, our_writer = os.pipe()
    our_reader, their_writer = os.pipe()
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
    # Numbers of two digits: neither is 3 or 4 before they are copied there.
    their_ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_reader, their_writer)]
    script = f'exec "$@" 3<&{their_ends[0]} 4>&{their_ends[1]}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", PROGRAM, *flags, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=their_ends,
        env={**os.environ, "TMPDIR": str(profile)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    for end in (their_reader, their_writer, *their_ends):
        os.close(end)
    try:
        yield Page(process, our_writer, our_reader)
    finally:
        os.close(our_writer)  # it ends when its pipe does
        os.close(our_reader)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

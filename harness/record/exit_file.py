"""exit.json: how a run ended, as whoever started it reads it, since torchrun itself exits with 1 for everything."""

import json
from pathlib import Path


class ExitFile:
    """The exit.json of a run directory, of which only what is written after this object was made counts as new."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / "exit.json"
        self._stamp = self._now()

    def code(self) -> int | None:
        """Return the exit code that it holds, None where there is none."""
        try:
            return int(json.loads(self._path.read_bytes())["code"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def new_code(self) -> int | None:
        """Return the exit code if it was written since."""
        return self.code() if self._now() != self._stamp else None

    def _now(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

"""A config-driven distributed training harness: the same arithmetic under every strategy."""

import sys
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036  # pip says it too, but not to who starts a checkout
    raise SystemExit("harness needs Python 3.11 or newer, and %s is older; python3.11 -m venv .venv" % sys.executable)  # noqa: UP031

__version__ = "0.1.0"

DOOR = ("model", "data", "task", "tracker")
"""Decorators of parts.py, as names of the package; `import harness` itself imports nothing."""
CALLS = ("load",)
"""Functions of api.py, likewise."""


def __getattr__(name: str) -> Any:
    if name in DOOR:
        from harness import parts

        return getattr(parts, name)
    if name in CALLS:
        from harness import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *DOOR, *CALLS]

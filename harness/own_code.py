"""What is said of an error in a user's code: its type, its message, and the line that it came from."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import HarnessError

LONGEST_MESSAGE = 500
_OURS = f"{Path(__file__).parent}{os.sep}"
_STANDARD = tuple(os.path.realpath(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib"))
_INSTALLED = ("site-packages", "dist-packages")  # also those of the system, or of a user, beside a virtual environment


def told(error: BaseException) -> str:
    """Return an exception as its type, its message and the innermost line of a user's that led to it."""
    frame = users_frame(error)
    where = f" ({frame.filename}, line {frame.lineno}{f': {frame.line}' if frame.line else ''})" if frame else ""
    message = _message(error)
    return f"{type(error).__name__}{f': {message}' if message else ''}{where}"


def _message(error: BaseException) -> str:
    try:
        words = " ".join(str(error).split())
    except Exception as second:  # of a user's own class
        return f"its message raised {type(second).__name__}"
    return words if len(words) <= LONGEST_MESSAGE else f"{words[:LONGEST_MESSAGE]} ..."


def users_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost line of a user's that led to an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if _is_users(frame.filename)), None)


def is_of_user(error: BaseException) -> bool:
    """Return whether a line of a user's led to an exception."""
    return users_frame(error) is not None


@contextmanager
def refused_as(kind: type[HarnessError], doing: str) -> Iterator[None]:
    """Turn an exception that a user's code leads to inside into an error of ours that says so; our own bugs pass.

    Args:
        doing: what was done, such as `the loss of the first rows`.
    """
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:
        if not is_of_user(error):
            raise
        raise kind(f"{doing} raised {told(error)}") from error


def _is_users(file: str) -> bool:
    is_installed = any(folder in Path(file).parts for folder in _INSTALLED)
    return not is_installed and not file.startswith((_OURS, "<")) and not os.path.realpath(file).startswith(_STANDARD)

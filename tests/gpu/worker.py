"""Runs one check in this process: `python -m tests.gpu.worker MODULE:FUNCTION RESULT SECONDS`."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resolve(name: str) -> Callable[..., Any]:
    """Return the function that `module:function` names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def break_as_asked() -> None:
    """Break the harness in this process as GPU_CHECK_FAULT says, if it does."""
    if fault := os.environ.get("GPU_CHECK_FAULT"):
        from tests.gpu.faults import FAULTS

        FAULTS[fault]()


def main(arguments: list[str]) -> int:
    """Write what came of a check; the process ends well if it could be written."""
    function, result, seconds = arguments
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(0.5, 0.95 * float(seconds)))  # where it hangs
    found: dict[str, Any] = {"state": "ok", "reason": "", "figures": {}}
    try:
        break_as_asked()
        found["figures"] = resolve(function)()
    except Exception as error:
        traceback.print_exc()
        words = " ".join(str(error).split())
        found |= {"state": "FAILED", "reason": f"{type(error).__name__}: {words}"[:1000]}
    temporary = Path(f"{result}.tmp")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, result)
    faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Ranks of a warm parent that has not imported DeepSpeed: `python -m tests.without_deepspeed CONFIG`."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.distributed import ranks


def train(is_installed: bool, *arguments: str) -> dict[str, Any]:
    """Train as one rank; return the exit code, what was said on stderr, and whether DeepSpeed was imported."""
    from tests.distributed.scenarios import train_main_and_listen

    assert "deepspeed" not in sys.modules
    if not is_installed:
        sys.modules["deepspeed"] = None  # type: ignore[assignment]  # so that an import of it raises ImportError
    code, said = train_main_and_listen(*arguments)
    return {"code": code, "said": said, "has_imported": sys.modules.get("deepspeed") is not None}


def main(config: str) -> dict[str, list[dict[str, Any]]]:
    """Train in three ways, and return what each rank tells."""
    ranks._context.set_forkserver_preload([name for name in ranks.PRELOAD if "deepspeed" not in name])
    zero = (config, "strategy.kind=zero1", "run.name=zero1")
    return {
        "two ranks": ranks.run_ranks(2, train, True, config, deadline_seconds=120),
        "ddp": ranks.run_ranks(1, train, False, config, "run.name=alone", deadline_seconds=120),
        "zero1": ranks.run_ranks(1, train, False, *zero, deadline_seconds=120),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))

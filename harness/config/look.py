"""A first look at the data of a run, for `harness check`: started as a process of its own, with the configuration as
JSON on standard input. What it looks at the section of the data says; nothing of `use` is imported."""

from __future__ import annotations

import sys

from harness.config.run_config import RunConfig
from harness.errors import HarnessError
from harness.parts import registered


def main() -> int:
    """Look at the data of the configuration on standard input, and return the exit code."""
    config = RunConfig.model_validate_json(sys.stdin.read(), context=registered(keeps_unknown=True))
    try:
        for line in config.data.look(config.task):
            print(line, flush=True)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

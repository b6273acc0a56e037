"""What the agent of a wandb sweep asks of the run it starts, as overrides of the configuration.

The agent (`wandb agent`) leaves the values in a file, which is what `wandb.config` is filled from; reading it needs
neither wandb nor its server. A sweep's parameters are dotted keys, such as `optim.peak_lr`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.yaml_reader import plain_data
from harness.errors import ConfigError

SWEEP_ID, RUN_ID, PARAMETERS = "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"


def chosen_run_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id that a sweep, or whoever set WANDB_RUN_ID, has chosen for a new run; None if nobody has."""
    return environment.get(RUN_ID, "").strip() or None


def sweep_run_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id that a sweep has given this run; None outside a sweep."""
    return chosen_run_id(environment) if environment.get(SWEEP_ID) else None


def swept(overrides: Sequence[str], *, name: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the overrides of a run after what the sweep that it belongs to asks for; outside a sweep, as they are.

    Args:
        overrides: of the command line; the sweep's value goes before one of the same key.
        name: of the run; in a sweep each has `NAME-ID`, and so a directory of its own.
    Raises:
        ConfigError: the agent's file cannot be read.
    """
    run_id = sweep_run_id(environment)
    if run_id is None:
        return list(overrides)
    own_name = name if name.endswith(f"-{run_id}") else f"{name}-{run_id}"  # the launcher may have been here
    wanted = {"run.name": own_name, **_parameters(environment)}
    kept = [override for override in overrides if override.partition("=")[0].strip() not in wanted]
    return [*kept, *(f"{key}={json.dumps(value)}" for key, value in wanted.items())]


def _parameters(environment: Mapping[str, str]) -> dict[str, Any]:
    path = environment.get(PARAMETERS)
    if not path:
        return {}  # `wandb.agent` of a notebook; the command line may have them
    try:
        found, problems = plain_data(Path(path).read_text(), name=path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{PARAMETERS}: {path} cannot be read ({error}); start the agent again") from error
    entries = {key: value for key, value in (found or {}).items() if key != "wandb_version"}
    if problems or not all(isinstance(entry, dict) and "value" in entry for entry in entries.values()):
        why = "; ".join(problems) or "a parameter has no value"
        raise ConfigError(f"{PARAMETERS}: {path} is not what an agent of wandb writes: {why}")
    return dict(item for key, entry in entries.items() for item in _leaves(key, entry["value"]))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key, value

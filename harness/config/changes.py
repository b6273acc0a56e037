"""What differs between the configuration a run was started with and the one it is resumed with, and what that means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.config.checks import judging_metrics
from harness.config.run_config import RunConfig
from harness.config.slots import Verdict

SLOTS = ("model", "data", "task")
"""Sections whose kinds say themselves what may change; by default nothing."""

# The longest prefix of a path decides. Refused: what the stored weights, moments and order of rows were made with.
# Noticed: what changes the rest of the curve. Allowed: how long the run is, and how it is watched, saved and spread.
VERDICTS: dict[str, Verdict] = {
    "": "noticed",
    "run.seed": "refused",
    "run.output_root": "allowed",
    "run.max_epochs": "allowed",
    "run.max_steps": "allowed",
    "run.max_nonfinite_updates": "allowed",
    "use": "allowed",
    "optim.kind": "refused",
    "evaluation": "allowed",
    "strategy": "allowed",
    "checkpoint": "allowed",
    "tracking": "allowed",
    "diagnostics": "allowed",
}


@dataclass(frozen=True)
class Change:
    """One key with two values, as plain data; a key that one side does not have is None there."""

    path: str
    stored: Any
    given: Any

    def __str__(self) -> str:
        return f"{self.path}: stored {json.dumps(self.stored)}, given {json.dumps(self.given)}"


@dataclass(frozen=True)
class Changes:
    """All keys that differ, by what a resumed run makes of them, each in the order of the configuration."""

    refused: tuple[Change, ...]
    noticed: tuple[Change, ...]
    allowed: tuple[Change, ...]

    def refusal_message(self) -> str:
        """Return the text of the ConfigError that `refused` calls for: a diff, and what to type instead."""
        assert self.refused, "nothing was refused, so there is nothing to tell"
        keys = "1 key" if len(self.refused) == 1 else f"{len(self.refused)} keys"
        header = f"{keys} cannot change on resume; use the stored value, or another run.name for a new run"
        return "\n  ".join([header, *map(str, self.refused)])


def compare(stored: RunConfig, given: RunConfig) -> Changes:
    """Return what changed between the configuration in the run directory and the one given on resume."""
    before, after = dict(leaves(stored.model_dump(mode="json"))), dict(leaves(given.model_dump(mode="json")))
    judging = {metric for metric, _ in judging_metrics(given).values()}
    verdicts: dict[Verdict, list[Change]] = {"refused": [], "noticed": [], "allowed": []}
    for path in before | after:
        change = Change(path, before.get(path), after.get(path))
        if change.stored != change.given and not _is_left_to_data(change, given):
            slot, _, key = path.partition(".")
            verdict = getattr(given, slot).may_change(key, judging) if slot in SLOTS else _verdict(path)
            verdicts[verdict].append(change)
    return Changes(**{verdict: tuple(changes) for verdict, changes in verdicts.items()})


def _is_left_to_data(change: Change, given: RunConfig) -> bool:
    """Whether a key waits for what the data say, which is compared when they have said it."""
    return change.given is None and change.path in [f"model.{name}" for name in given.model.facts_wanted]


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of nested sections with its dotted path, in their order."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _verdict(path: str) -> Verdict:
    while path not in VERDICTS:
        path = path.rpartition(".")[0]
    return VERDICTS[path]

"""Starts of a run on ranks that stay, for tests that start many."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from harness import train
from harness.ranks import join as joining
from harness.ranks.env import Placement
from harness.ranks.group import Ranks
from harness.stopping import StopSignals
from tests.distributed.ranks import run_standing_ranks
from tests.distributed.scenarios import join, train_main_and_listen

Answer = tuple[int, str]
"""The exit code of a rank, and what it said on stderr."""


def train_on_standing_ranks(world_size: int, *arguments: str) -> list[Answer]:
    """Run `python -m harness.train` with these arguments in ranks, and in a process group, that have done so before."""
    return run_standing_ranks(world_size, _train, *arguments)


def _train(*arguments: str) -> Answer:
    handlers = {number: signal.getsignal(number) for number in StopSignals.NUMBERS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "join_ranks", _join)
        patch.setattr(joining, "leave_ranks", lambda: None)
        patch.setattr(train, "SECONDS_FOR_RANK_ZERO", 0.0)  # nobody ends all ranks here when the first one ends
        answer = train_main_and_listen(*arguments)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return answer


def _join(place: Placement, *, alone_in_group: bool, **_: Any) -> Ranks:
    return join("zero" if alone_in_group else "ddp")

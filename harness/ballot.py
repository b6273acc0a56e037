"""What the ranks tell each other when an interval is over, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Ballot(NamedTuple):
    """What one rank tells all others; numbers only, so that it travels with the losses."""

    stop_vote: float
    """0, or the place in `StopSignals.REASONS` plus 1 of why this rank wants to stop."""
    updates_in_a_second: float
    """How many updates the next interval may have, if rank zero says so."""
    is_written: float
    """1 where this rank's part of the save in flight is on the disk, or none is."""
    memory_bytes: float
    """Most bytes in use so far."""
    data_wait: float
    """Share of the interval that was spent waiting for rows."""
    compute: float
    """Of the rest, the share that forward and backward took; NaN where nothing was timed."""
    reduction: float
    """Of the rest, the share that the reduction over ranks took; NaN where it cannot be told."""


def shares(ballots: Sequence[Ballot]) -> dict[str, float]:
    """Return where the time of an update went, on the rank that waited longest for its rows; they add up to 1."""
    slowest = max(ballots, key=lambda ballot: ballot.data_wait)
    rest = 1 - slowest.data_wait
    parts = {
        "data_wait": slowest.data_wait,
        "compute": rest * slowest.compute,
        "reduction": rest * slowest.reduction,
    }
    known = {f"{name}_fraction": share for name, share in parts.items() if not math.isnan(share)}
    if "compute_fraction" not in known:
        return known
    return {**known, "rest_fraction": 1 - math.fsum(known.values())}

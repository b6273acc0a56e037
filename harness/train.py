"""Trains one run: `python -m harness.train CONFIG [key=value ...]`, alone or under torchrun.

torch is imported after the config was found good, so that a typo answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from harness.config.io import load_config
from harness.config.use import refuse_while_loading
from harness.errors import (
    ConfigError,
    HarnessError,
    PeerError,
)
from harness.ranks.env import Placement, placement
from harness.ranks.process import die_with_parent
from harness.ranks.rank_log import redirect_output
from harness.session import Session
from harness.stopping import StopSignals

if TYPE_CHECKING:
    pass

USAGE = "usage: python -m harness.train CONFIG [key=value ...]"
SECONDS_FOR_RANK_ZERO = 1.0
"""How long other ranks leave rank zero to say what is wrong; torchrun ends all ranks when the first one does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit code of the run (see errors.py)."""
    refuse_while_loading("harness.train.main")
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = 0
    with ExitStack() as after_exit:
        try:
            place = placement()
            rank = place.rank
            redirect_output(place)
            if not arguments or arguments[0].startswith("-"):
                raise ConfigError(USAGE)
            path, *overrides = arguments
            return train(path, overrides, place, after_exit=after_exit)
        except PeerError as error:
            print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
            return error.exit_code
        except HarnessError as error:
            if rank == 0 or error.is_of_one_rank:  # what all ranks know, rank zero says
                print(error, file=sys.stderr, flush=True)
            else:
                time.sleep(SECONDS_FOR_RANK_ZERO)
            return error.exit_code


def train(path: str, overrides: Sequence[str], place: Placement, *, after_exit: ExitStack) -> int:
    """Train on this rank what a file and its overrides describe, and return the exit code. Collective.

    Args:
        after_exit: is given what is to be done after the run has ended, for no other rank to wait for.
    """
    loaded = load_config(path, overrides, world_size=place.world_size)
    signals = StopSignals(end_time=place.end_time)
    signals.install(second_interrupt_ends=not place.under_torchrun)
    if place.under_torchrun:
        die_with_parent()

    with ExitStack() as stack:
        return Session(loaded, place, signals, path, overrides).run_to_the_end(stack, after_exit)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed. In the teardown of the libraries a C++ thread now and then aborts the process (SIGABRT,
    # "terminate called without an active exception"), after a run that went well.
    os._exit(exit_code)

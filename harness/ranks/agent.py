"""torchrun with less noise: ends with the exit code of the rank that failed first, and repeats nothing a rank said.

`python -m harness.ranks.agent` takes the options of torchrun and is what `harness launch` starts. Plain `torchrun`
starts the same ranks; it ends with 1 whatever happened and prints its own traceback below a rank's message.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from harness.errors import EXIT_INTERRUPTED, HarnessError, PeerError
from harness.ranks.env import log_file
from harness.ranks.process import shell_code

EXPLAINED_CODES = {EXIT_INTERRUPTED, *(kind.exit_code for kind in HarnessError.__subclasses__())}
"""A rank that ends with one of these has said why."""

REPEATED_MESSAGES = ("failed (exitcode", "Sending process", "Received %s death signal")
REPEATING_LOGGERS = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
)


def main(argv: list[str] | None = None) -> int:
    """Run the ranks to their end and return the exit code of the failure that came first, 0 without one."""
    for name in REPEATING_LOGGERS:
        logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith(REPEATED_MESSAGES))
    try:
        torchrun.main(known_to_torchrun(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        # Seconds are all that is known; within one, a rank that missed its peer is not the cause.
        failures = error.failures.values()
        first = min(failures, key=lambda failure: (failure.timestamp, failure.exitcode == PeerError.exit_code))
        rank = next(rank for rank, failure in error.failures.items() if failure is first)
        log = log_file(rank)
        if first.exitcode not in EXPLAINED_CODES or log is not None:
            print(failure_sentence(rank, first.exitcode, pid=first.pid, log=log), file=sys.stderr)
        return shell_code(first.exitcode)
    except SignalException as error:
        return shell_code(-error.sigval)
    return 0


def known_to_torchrun(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without `--shutdown-timeout SECONDS` where torchrun does not have it (2.11), but heeded."""
    known, option = list(arguments), "--shutdown-timeout"
    if option in known and option not in torchrun.get_args_parser().format_usage():
        place = known.index(option)
        PContext.close = partialmethod(PContext.close, timeout=int(known[place + 1]))  # type: ignore[assignment, method-assign]
        del known[place : place + 2]
    return known


def failure_sentence(rank: int, exit_code: int, *, pid: int, log: Path | None = None) -> str:
    """Return how a rank ended that had no chance to explain itself, died of a bug, or has explained it in its log."""
    place = f"is in {log}" if log else "stands above"
    if exit_code < 0:
        return f"rank {rank} (process {pid}) was killed by {signal.Signals(-exit_code).name}"
    return f"rank {rank} (process {pid}) ended with exit code {exit_code}; what it said about it {place}"


if __name__ == "__main__":
    sys.exit(main())

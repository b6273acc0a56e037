"""The whole campaign: `make faults`, or `python -m tests.faults [STRATEGY ...]`. It ends with one line of counts.

Exits with 1 if there was any outcome that must not be; those are written in capitals. A part that breaks off is one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

from tests.faults import corruption, exact_resume, kills

NUM_CORRUPTIONS = 600
PARTS = ("corruption", "kills", "resume")

Part = tuple[str, Callable[[], Counter[str]]]


def parts_of(given: argparse.Namespace) -> Iterator[Part]:
    """Yield what is to be run, in order: a name, and what returns its counts."""
    if "corruption" in given.parts:
        yield "corruption", lambda: corruption.campaign(NUM_CORRUPTIONS, seed=0)
    for strategy in given.strategies:
        if "kills" in given.parts:
            yield f"kills {strategy}", lambda strategy=strategy: kills.campaign(strategy)  # type: ignore[misc]
        if "resume" in given.parts:
            yield (
                f"resume {strategy}",
                lambda strategy=strategy: exact_resume.campaign(strategy, given.models),  # type: ignore[misc]
            )


def run_part(name: str, part: Callable[[], Counter[str]]) -> Counter[str]:
    """Run one part to its end, print what came of it and what it cost, and return the counts."""
    began = cpu_seconds()
    try:
        counts = part()
    except Exception:
        traceback.print_exc()
        counts = Counter({"BROKE OFF": 1})
    for outcome, count in sorted(counts.items()):
        print(f"{name:16} {count:5}  {outcome}")
    print(f"{name:16} {(cpu_seconds() - began) / 60:5.1f}  minutes of CPU time", flush=True)
    return counts


def cpu_seconds() -> float:
    """What this process and the ranks have used so far; ranks are the children of the fork server."""
    seconds = time.process_time()
    if server := forkserver._forkserver._forkserver_pid:  # type: ignore[attr-defined]
        fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own, and those that it waited for
    return seconds


def summary(total: Counter[str]) -> str:
    """Return the line of counts."""
    resumed = sum(count for outcome, count in total.items() if outcome.startswith("resumed from"))
    damaged = total["detected, all fell back alike"] + total["detected, all refused"]
    return (
        f"faults: {damaged} damaged, {total['detected, all fell back alike']} fell back and "
        f"{total['detected, all refused']} refused by all ranks alike; {total['kills in a save']} kills in a save, "
        f"{resumed} went on to the same bits; {total['kills after an update']} kills after an update, "
        f"{total['runs equal to the bit']} of {total['runs']} runs equal to the bit; {num_wrong(total)} wrong"
    )


def num_wrong(total: Counter[str]) -> int:
    return sum(count for outcome, count in total.items() if outcome[0].isupper())


def main(arguments: list[str]) -> int:
    """Run what is asked for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("strategies", nargs="*", default=kills.STRATEGIES, metavar="STRATEGY")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--models", nargs="+", default=list(exact_resume.MODELS), choices=list(exact_resume.MODELS))
    given = parser.parse_args(arguments)
    if unknown := set(given.strategies) - set(kills.STRATEGIES):
        parser.error(f"{', '.join(unknown)}: wanted any of {', '.join(kills.STRATEGIES)}")
    began, total = time.monotonic(), Counter[str]()
    for name, part in parts_of(given):
        total += run_part(name, part)
    print(f"{summary(total)}; {(time.monotonic() - began) / 60:.0f} minutes")
    return 1 if num_wrong(total) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

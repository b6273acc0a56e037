"""The whole campaign: `make faults`, or `python -m tests.faults [STRATEGY ...]`. It ends with one line of counts.

Exits with 1 if there was any outcome that must not be; those are written in capitals.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

from tests.faults import corruption, exact_resume, kills

NUM_CORRUPTIONS = 600


def main(strategies: list[str]) -> int:
    """Run everything, print what came of it, and return the exit code."""
    began, total = time.monotonic(), Counter[str]()

    def tell(what: str, counts: Counter[str]) -> None:
        for outcome, count in sorted(counts.items()):
            print(f"{what:16} {count:5}  {outcome}", flush=True)
            total[outcome] += count

    tell("corruption", corruption.campaign(NUM_CORRUPTIONS, seed=0))
    for strategy in strategies:
        tell(f"kill {strategy}", kills.campaign(strategy))
        tell(f"resume {strategy}", exact_resume.campaign(strategy))
    wrong = sum(count for outcome, count in total.items() if outcome[0].isupper())
    resumed = sum(count for outcome, count in total.items() if outcome.startswith("resumed from"))
    print(
        f"faults: {NUM_CORRUPTIONS} damaged, {total['detected, all fell back alike']} fell back and "
        f"{total['detected, all refused']} refused by all ranks alike; {total['kills in a save']} kills in a save, "
        f"{resumed} went on to the same bits; {total['kills after an update']} kills after an update, "
        f"{total['runs equal to the bit']} of {total['runs']} runs equal to the bit; {wrong} wrong; "
        f"{(time.monotonic() - began) / 60:.0f} minutes"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(kills.STRATEGIES)))

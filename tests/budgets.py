"""How many CPU seconds each test file may take, with all processes that it starts; a file over its budget fails.

Seconds are those of the machine that BUDGETS was written on. On another, or on a busy one, the same work takes more: a
yardstick that is run before each file says how much.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from statistics import median

SLACK = 1.2
SMALLEST = 5.0
"""The budget of a file that the table does not name."""
BUDGETS: dict[str, float] = {}
"""Longest first: in this order files are run, so that no long one is left for the end."""
YARDSTICK_SECONDS = 0.02
"""What `yardstick` takes where BUDGETS was written, beside two busy workers."""


def budget_of(file: str) -> float:
    """Return the CPU seconds of a file, named as from the repository's root."""
    return BUDGETS.get(file, SMALLEST)


def yardstick() -> float:
    """Return the CPU seconds that a fixed piece of work takes now."""
    start, text = time.process_time(), b""
    for index in range(6_000):
        text = hashlib.sha256(text + str({index: [index]}).encode()).digest()
    return time.process_time() - start


class CpuSeconds:
    """What the files of a session have taken, and what the yardstick took meanwhile."""

    def __init__(self) -> None:
        self.by_file: Counter[str] = Counter()
        self.yardsticks: list[float] = []

    def add(self, other: dict[str, object]) -> None:
        """Add what a worker has measured."""
        self.by_file.update(other["by_file"])  # type: ignore[arg-type]
        self.yardsticks += other["yardsticks"]  # type: ignore[operator]

    @property
    def slowness(self) -> float:
        """How much longer the same work took than where BUDGETS was written; at least 1."""
        return max(1.0, median(self.yardsticks) / YARDSTICK_SECONDS) if self.yardsticks else 1.0

    def over_budget(self) -> list[str]:
        """Return a sentence for each file that took more than its budget, the slack and the machine allow."""
        allowed = {file: budget_of(file) * SLACK * self.slowness for file in self.by_file}
        return [
            f"{file} took {seconds:.1f} CPU seconds; its budget is {budget_of(file):.1f}, with slack on this machine "
            f"{allowed[file]:.1f}. Make it cheaper, or raise its line in tests/budgets.py with a reason in the commit"
            for file, seconds in self.by_file.most_common()
            if seconds > allowed[file]
        ]

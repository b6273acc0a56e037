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
LONG = " (long)"
"""Behind the name of a file: its tests that are left to `make test-long`."""
BUDGETS: dict[str, float] = {
    "tests/gpu/test_gpu_check.py (long)": 400,
    "tests/distributed/test_worker_kills.py (long)": 175,
    "tests/test_reviews.py (long)": 279,
    "tests/slurm/test_live.py": 159,
    "tests/slurm/test_attempts.py": 142,
    "tests/test_shakespeare.py (long)": 139,
    "tests/test_examples.py (long)": 137,
    "tests/test_end_to_end.py (long)": 121,
    "tests/test_selftest.py": 80,
    "tests/test_selftest.py (long)": 70,
    "tests/test_wandb.py": 118,
    "tests/test_architectures.py (long)": 96,
    "tests/distributed/test_zero.py": 84,
    "tests/slurm/test_live.py (long)": 74,
    "tests/gpu/test_gpu_check.py": 67,
    "tests/faults/test_faults.py (long)": 52,
    "tests/faults/test_faults.py": 42,
    "tests/test_deepspeed_config.py (long)": 42,
    "tests/test_suite.py": 35,
    "tests/test_end_to_end.py": 53,
    "tests/test_examples.py": 32,
    "tests/test_launch.py": 32,
    "tests/test_same_bits.py (long)": 31,
    "tests/distributed/test_own_parts.py": 65,
    "tests/test_adapters.py": 16,
    "tests/test_by_length.py (long)": 85,
    "tests/test_by_length.py": 8,
    "tests/distributed/test_by_length_runs.py": 7,
    "tests/test_readme.py": 18,
    "tests/distributed/test_own_examples.py": 13,
    "tests/distributed/test_promises.py": 10,
    "tests/distributed/test_resume.py (long)": 30,
    "tests/distributed/test_fp16.py": 28,
    "tests/distributed/test_two_machines.py": 28,
    "tests/test_report.py": 27,
    "tests/test_wheel.py": 23,
    "tests/distributed/test_pretrained_runs.py": 22,
    "tests/distributed/test_language_runs.py (long)": 20,
    "tests/distributed/test_resume.py": 19,
    "tests/distributed/test_zero_bytes.py (long)": 19,
    "tests/test_deepspeed_config.py": 19,
    "tests/distributed/test_average.py": 18,
    "tests/test_reviews.py": 18,
    "tests/test_shakespeare.py": 17,
    "tests/distributed/test_language_runs.py": 15,
    "tests/distributed/test_pretrained_language.py": 15,
    "tests/distributed/test_zero_bytes.py": 14,
    "tests/distributed/test_checkpoints.py": 13,
    "tests/test_architectures.py": 12,
    "tests/distributed/test_saving.py": 12,
    "tests/distributed/test_stray_variables.py": 8,
    "tests/test_own_runs.py": 53,
    "tests/distributed/test_worker_runs.py": 57,
    "tests/distributed/test_worker_kills.py": 25,
    "tests/test_loader.py": 18,
    "tests/test_loader.py (long)": 200,
    "tests/distributed/test_reference.py": 21,
    "tests/distributed/test_loop.py": 15,
    "tests/test_mutants.py": 9,
    "tests/distributed/test_unused.py": 11,
    "tests/test_load.py": 11,
    "tests/test_pretrained.py": 8,
    "tests/test_config.py": 8,
    "tests/test_look.py": 8,
    "tests/distributed/test_experts_runs.py": 7,
    "tests/test_prepare.py": 7,
    "tests/test_columns.py": 7,
    "tests/distributed/test_evaluation.py": 11,
    "tests/release/test_locks.py": 6,
    "tests/distributed/test_export.py": 6,
    "tests/faults/test_peers.py": 6,
}
"""A tenth above the dearest of three whole runs, of which two were alone on the machine and differed by up to a fifth.

Longest first: in this order files are run, so that no long one is left for the end.
"""
YARDSTICK_SECONDS = 0.01
"""What `yardstick` takes where BUDGETS was written, beside busy workers."""


def budget_of(file: str) -> float:
    """Return the CPU seconds of a file, named as from the repository's root, perhaps with `LONG` behind it."""
    return BUDGETS.get(file, SMALLEST)


def yardstick() -> float:
    """Return the CPU seconds that a fixed piece of work takes now."""
    start, text = time.process_time(), b""
    for index in range(12_000):
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

    @property
    def machine(self) -> str:
        """What the yardstick said of this machine."""
        measured, wanted = 1000 * median(self.yardsticks), 1000 * YARDSTICK_SECONDS
        return f"the yardstick took {measured:.1f} ms, so budgets are those of {wanted:.1f} ms x {self.slowness:.2f}"

    def over_budget(self) -> list[str]:
        """Return a sentence for each file that took more than its budget, the slack and the machine allow."""
        allowed = {file: budget_of(file) * SLACK * self.slowness for file in self.by_file}
        return [
            f"{file} took {seconds:.1f} CPU seconds; its budget is {budget_of(file):.1f}, with slack on this machine "
            f"{allowed[file]:.1f}. Make it cheaper, or raise its line in tests/budgets.py with a reason in the commit"
            for file, seconds in self.by_file.most_common()
            if seconds > allowed[file]
        ]

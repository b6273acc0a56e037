"""Memory that tensors on the CPU have freed: the kernel is asked for it once, not at every update."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

PAGES_AGAIN = """
import ctypes
import resource
import torch
from harness.strategy.build import join_ranks
from harness.strategy.env import placement

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault, now and then
ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD: give back what is freed, which glibc else does only at times

def page_faults():
    tensors = [torch.ones(1024, 1024) for _ in range(20)]  # 4 MiB each, 80 together
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{before}
page_faults()
first = page_faults()
for _ in range(10):
    last = page_faults()
print(last - first)
"""
JOINED = "join_ranks(placement(), timeout_seconds=60)"
PAGES = 10 * 80 * 2**20 // 4096


def faults_after(before: str) -> int:
    """Page faults of ten rounds of tensors after a first one, in a process of its own."""
    command = [sys.executable, "-c", PAGES_AGAIN.format(before=before)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks with a GPU leave malloc alone")
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_rank_on_the_cpu_takes_no_new_pages_for_tensors_as_large_as_those_before() -> None:
    assert faults_after("") > 0.9 * PAGES
    assert faults_after(JOINED) < 0.02 * PAGES

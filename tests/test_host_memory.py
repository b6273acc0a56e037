"""Memory that tensors on the CPU have freed: the kernel is asked for it once, not at every update."""

from __future__ import annotations

import ctypes
import resource
import sys

import pytest
import torch

from tests.distributed.ranks import run_ranks

PAGES = 10 * 80 * 2**20 // 4096


def page_faults() -> int:
    """Those of this process so far, after tensors of 80 MiB together."""
    tensors = [torch.ones(1024, 1024) for _ in range(20)]
    assert len(tensors) == 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def page_faults_of_ten_rounds(joins: bool) -> int:
    """Page faults after a first round of tensors, in a rank that has joined or in one that has not."""
    from harness.ranks.env import placement
    from harness.ranks.join import join_ranks

    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault, now and then
    # M_MMAP_THRESHOLD: give back what is freed, which glibc else does only at times.
    ctypes.CDLL(None).mallopt(-3, 2**17)
    if joins:
        join_ranks(placement(), timeout_seconds=60)
    page_faults()
    first = page_faults()
    return [page_faults() for _ in range(10)][-1] - first


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks with a GPU leave malloc alone")
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_rank_on_the_cpu_takes_no_new_pages_for_tensors_as_large_as_those_before() -> None:
    assert run_ranks(1, page_faults_of_ten_rounds, False)[0] > 0.9 * PAGES
    assert run_ranks(1, page_faults_of_ten_rounds, True)[0] < 0.02 * PAGES

"""What tensors on the CPU free, this process keeps for the next ones (glibc)."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
LARGEST_KEPT_BYTES = 32 * 2**20
"""What is larger goes back to the kernel when it is freed; glibc takes no more than this."""


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, up to 2 GiB, so that an update touches pages that are there already.

    Left to itself, glibc gives memory back as soon as twice the size of the largest tensor is free, and every update
    has the kernel find and clear the same pages again. On other systems this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)

"""How the processes of a run agree."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.errors import HarnessError, PeerError, RowError

# The one function under its name since torch 2.13, or the one before.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


class Ranks:
    """How the processes of a run agree. With one rank there is no process group, and everything here is free."""

    notices: tuple[str, ...] = ()
    """What came out otherwise than was asked for, or has no effect here, for the user to read."""

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def tensor(self, values: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return `values` on the device."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def peak_memory_bytes(self) -> int:
        """Return the most bytes that tensors of this rank had on its GPU, or that this process had in memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES

    def gather(self, vector: Tensor) -> Tensor:
        """Return the (world_size, n) vectors of all ranks, in order of rank, from (n,) each. Collective."""
        if self.world_size == 1:
            return vector.unsqueeze(0)
        gathered = vector.new_empty(self.world_size * len(vector))
        _all_gather(gathered, vector)
        return gathered.view(self.world_size, len(vector))

    def sum(self, vector: Tensor) -> Tensor:
        """Return the sum over ranks, added up in order of rank. Collective."""
        return self.gather(vector).sum(dim=0)

    def broadcast(self, value: Any) -> Any:
        """Return rank zero's value, any small picklable object. Collective."""
        return self.gather_objects(value)[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the small picklable objects of all ranks, in order of rank. Collective."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    @contextmanager
    def raise_on_all_ranks(self, doing: str) -> Iterator[None]:
        """Make an error of one rank the error of all, so that none waits for the others. Collective at its end.

        Raises:
            HarnessError: the error of the lowest rank that had one; if not all had it, it says which rank.
        """
        error: HarnessError | None = None
        try:
            yield
        except HarnessError as caught:
            error = caught
        errors = self.gather_objects(error)
        failed = [rank for rank, found in enumerate(errors) if found is not None]
        if not failed:
            return
        first = errors[failed[0]]
        if len(failed) < self.world_size:
            is_told = isinstance(first, RowError)  # which says its rank
            where = "" if is_told else f"on rank {failed[0]} of {self.world_size}, "
            first = type(first)(f"{first.args[0]} ({where}while {doing})")
        first.is_of_one_rank = False  # all know of it now
        raise first


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn the process group's complaint about a dead or silent peer into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        words = str(error)
        if isinstance(error, dist.DistError) or "gloo/transport" in words or "NCCL" in words:
            raise PeerError(
                f"another rank died or did not answer in time ({words.splitlines()[0][:200]}). "
                "Look at the first error among the ranks' logs, then start the same command again"
            ) from error
        raise

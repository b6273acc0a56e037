"""Divides the time of an update into computing, waiting for the reduction, and the rest.

One update an interval is timed, on the device's own clock, and read when it is known to be over: the host never waits
for it, and the other updates of the interval do not know of it.
"""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable


class Parts(NamedTuple):
    """Shares of an update's time on the device, without the wait for its rows; NaN is unknown."""

    compute: float
    """Forward and backward passes."""
    reduction: float
    """From this rank's last gradient to that of all ranks: what was not hidden behind the backward pass."""


class Stopwatch:
    """Times the update at one position.

    Args:
        tells_reduction: the reduction ends after the backward pass; if it does not, it counts as computing.
    """

    def __init__(self, device: torch.device, *, tells_reduction: bool) -> None:
        self._now: Callable[[], Any] = _event if device.type == "cuda" else time.perf_counter
        self._tells_reduction = tells_reduction
        self.position: int | None = None
        """Of the update that is timed next; whoever reads `parts` names it."""
        self._moments: list[Any] = []
        self._is_running = False
        self._parts = Parts(math.nan, math.nan)

    def start(self, position: int) -> None:
        """Begin if this is the update, whose rows are there now; every call below does nothing in others."""
        self._is_running = position == self.position
        if self._is_running:
            self._moments = [self._now()]

    def note_gradients_of(self, loss: Tensor) -> None:
        """Have the moment noted when this rank has all gradients of its last micro-batch."""
        if self._is_running:
            # The engine calls back in the order of asking, and DDP waits for its reduction in such a call.
            loss.register_hook(lambda _: Variable._execution_engine.queue_callback(self.note))  # type: ignore[no-untyped-call]

    def note(self) -> None:
        """Note the moment: the backward pass is over, or the update."""
        if self._is_running:
            self._moments.append(self._now())

    def parts(self) -> Parts:
        """Return the parts of the last update that was timed and that the device has finished. Reads nothing."""
        if len(self._moments) == 4 and _is_over(self._moments[-1]):
            compute, reduction, rest = (_seconds(begin, end) for begin, end in pairwise(self._moments))
            total = max(1e-9, compute + reduction + rest)
            self._parts = Parts(compute / total, reduction / total)
            if not self._tells_reduction:
                self._parts = Parts((compute + reduction) / total, math.nan)
        return self._parts


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _is_over(moment: Any) -> bool:
    return isinstance(moment, float) or moment.query()


def _seconds(begin: Any, end: Any) -> float:
    seconds: float = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
    return seconds

"""The checks that only a GPU can answer, run through on a CPU with stand-ins for what torch says of the GPU."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from harness import assemble
from harness.ranks.group import Ranks
from harness.watch.flops import training_flops_per_row
from harness.watch.peak_flops import peak_flops
from tests.gpu import measure
from tests.gpu.faults import FAULTS
from tests.gpu.large import Gpt

NAME = "NVIDIA H200"
TINY = Gpt(layers=2, width=32, heads=2, block=16, rows=2, precision="fp32")


@contextlib.contextmanager
def pretended(*, stays: float = 0.0, peak: float = 0.0) -> Iterator[None]:
    """Have torch speak of an H200 with this many bytes in use after an update, and at most, in weights of TINY."""
    stays_bytes, peak_bytes = (int(4 * share * TINY.num_parameters) for share in (stays, peak))
    said: dict[str, Any] = {
        "mem_get_info": (2**36, 2**36),
        "memory_allocated": stays_bytes,
        "max_memory_allocated": peak_bytes,
        "get_device_name": NAME,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "set_sync_debug_mode": None,
    }
    stand_ins = {name: lambda *_, value=value: value for name, value in said.items()}
    with (
        patch.multiple(torch.cuda, **stand_ins),
        patch.object(measure, "GPT_350M", TINY),
        patch.object(measure, "Gpt", lambda **_: TINY),
        patch.object(measure, "BYTES_A_ROW", 2**34),
        patch.object(Ranks, "peak_memory_bytes", lambda _: peak_bytes),
        patch.object(assemble, "_share_of_peak_per_row", _share_of_peak),
    ):
        yield


def _share_of_peak(config: Any, ranks: Any, task: Any, batches: Any, model: Any) -> float:
    peak = peak_flops(NAME, precision="bf16", allows_tf32=False)
    assert peak is not None
    return training_flops_per_row(model, task.forward, batches.some([0, 0])) / peak


def answer_of(check: str, *, wanted_mfu: float = 0.0, fault: str | None = None, **bytes_used: float) -> Any:
    """Return the figures of a check, or why it fails."""
    if fault:
        FAULTS[fault]()
    with pretended(**bytes_used), patch.object(measure, "WANTED_MFU", wanted_mfu):
        try:
            return getattr(measure, check)()
        except AssertionError as error:
            return str(error)


def throughput(wanted_mfu: float) -> Any:
    return answer_of("throughput", wanted_mfu=wanted_mfu)


def peak_memory(stays: float, peak: float) -> Any:
    return answer_of("peak_memory", stays=stays, peak=peak)


def host_reads(fault: str | None) -> Any:
    """Have `item` warn as torch does where it waits for the device, but for the calls of torch, which are of CPUs."""
    item, torchs_own = torch.Tensor.item, str(Path(torch.__file__).parent)

    def warn_and_read(tensor: torch.Tensor) -> Any:
        if not sys._getframe(1).f_code.co_filename.startswith(torchs_own):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return item(tensor)

    with patch.object(torch.Tensor, "item", warn_and_read):
        return answer_of("host_reads", fault=fault)

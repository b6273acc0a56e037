"""Starts and ends the process group of a run."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from harness.errors import ConfigError
from harness.ranks.env import Placement
from harness.ranks.group import Ranks, peer_errors
from harness.ranks.host_memory import keep_freed_memory
from harness.ranks.visible_gpus import count_gpus

OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "MPI_LOCAL")
"""How the variables begin in which mpirun says which process this is; a shell that it has started hands them on."""


def join_ranks(place: Placement, *, timeout_seconds: float, alone_in_group: bool = False) -> Ranks:
    """Bind this rank to its device and start the process group: gloo, with NCCL beside it on GPUs. Collective.

    Args:
        alone_in_group: a single rank has a process group as well, since DeepSpeed wants one.
    Raises:
        ConfigError: there are GPUs, and torch can use none.
    """
    for name in [name for name in os.environ if name.startswith(OTHER_LAUNCHERS)]:
        del os.environ[name]  # Accelerate and DeepSpeed would believe them, and take every rank for the same one
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if not on_gpu:
        refuse_unusable_gpus(count_gpus())
        keep_freed_memory()
    else:
        # A launcher that shows each rank one GPU still counts local ranks upwards.
        index = place.local_rank % torch.cuda.device_count()
        if place.world_size > 1:  # alone there is no Accelerate, and the next run of this process would be misled
            os.environ["LOCAL_RANK"] = str(index)  # Accelerate binds the device by this
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    ranks = Ranks(rank=place.rank, world_size=place.world_size, device=device)
    if place.world_size > 1 or alone_in_group:
        timeout = timedelta(seconds=timeout_seconds)
        with peer_errors():
            store = _meet(place, timeout=timeout)
            gpus = _gpus_of_ranks(store, place, device) if on_gpu else []
            backend, ranks.notices = backend_for(gpus)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("default_pg", store),  # type: ignore[attr-defined]
                rank=place.rank,
                world_size=place.world_size,
                timeout=timeout,
            )
    return ranks


def _meet(place: Placement, *, timeout: timedelta) -> Any:
    """Return the store that the ranks have in common, as `init_process_group` finds it. Collective."""
    if place.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    store.set_timeout(timeout)
    # torchrun --max-restarts may give the ranks of every attempt the store of the first, with addresses of the dead.
    return dist.PrefixStore(f"attempt {place.attempt}", store)  # type: ignore[attr-defined]


def _gpus_of_ranks(store: Any, place: Placement, device: torch.device) -> list[str]:
    """Return the GPU of each rank, by a name that no other GPU of any machine has. Collective."""
    store.set(f"gpu of rank {place.rank}", str(torch.cuda.get_device_properties(device).uuid))
    return [store.get(f"gpu of rank {rank}").decode() for rank in range(place.world_size)]


def backend_for(gpus: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return what carries the collectives of ranks on these GPUs, and what the user should read of it.

    Args:
        gpus: the GPU of each rank, by name; none on CPUs.
    """
    sharing = [rank for rank, gpu in enumerate(gpus) if gpus.count(gpu) > 1]
    if not gpus:
        return "gloo", ()
    if not sharing:
        return "cpu:gloo,cuda:nccl", ()
    return "gloo", (
        f"ranks {', '.join(map(str, sharing))} share a GPU, which NCCL refuses: all ranks reduce over gloo, through "
        "the host's memory, which is slow; start one rank a GPU for speed",
    )


def refuse_unusable_gpus(num_gpus: int) -> None:
    """Refuse to train on the CPUs of a machine whose GPUs torch cannot use, as it would without a word.

    Args:
        num_gpus: as nvidia-smi lists them; 0 is a machine without.
    Raises:
        ConfigError: says what torch says of them.
    """
    if not num_gpus:
        return
    reason = "it does not say why"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).partition("\n")[0]
    raise ConfigError(
        f"nvidia-smi lists {num_gpus} GPU{'s' * (num_gpus > 1)}, but torch {torch.__version__} can use none "
        f"({reason}); install the torch of the driver's CUDA (nvidia-smi shows its version) or a newer driver, or set "
        "CUDA_VISIBLE_DEVICES= to train on CPU ranks"
    )


def leave_ranks() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

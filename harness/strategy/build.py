"""Builds the strategy a config asks for, and checks that it is what came out."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from harness.config import RunConfig
from harness.errors import ConfigError
from harness.host_memory import keep_freed_memory
from harness.optim import build_optimizer
from harness.strategy.activation_checkpointing import recompute_blocks
from harness.strategy.base import Ranks, Strategy, peers_answer
from harness.strategy.checks import check
from harness.strategy.ddp import DdpStrategy
from harness.strategy.env import Placement
from harness.strategy.loss_scale import LossScale
from harness.strategy.noise import NoiseSource
from harness.visible_gpus import count_gpus

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp16": torch.float32, "fp64": torch.float64}
"""The type of weights and rows under each precision; bf16 and fp16 are autocast."""
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": None}


def join_ranks(place: Placement, *, timeout_seconds: float, alone_in_group: bool = False) -> Ranks:
    """Bind this rank to its device and start the process group: gloo, with NCCL beside it on GPUs. Collective.

    Args:
        alone_in_group: a single rank has a process group as well, since DeepSpeed wants one.
    Raises:
        ConfigError: there are GPUs, and torch can use none.
    """
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
        with peers_answer():
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


def build_strategy(config: RunConfig, module: nn.Module, ranks: Ranks) -> Strategy:
    """Wrap `module` with its optimizer in the strategy of `config`. Collective.

    Raises:
        ConfigError: what came out is not what was asked for.
    """
    strategy = _build(config, module.to(device=ranks.device, dtype=DTYPES[config.strategy.precision]), ranks)
    if config.ema is not None:
        strategy.keep_average(decay=config.ema.decay)
    return strategy


def _build(config: RunConfig, module: nn.Module, ranks: Ranks) -> Strategy:
    module = _with_options(module, config, ranks)
    optimizer = build_optimizer(module, config.optim)
    strategy: Strategy
    if config.strategy.kind != "ddp":
        from harness.strategy.build_zero import build_zero  # DeepSpeed takes seconds to import, and may not be there

        strategy = build_zero(config, module, optimizer, ranks)
    else:
        model = _wrap(module, ranks) if ranks.world_size > 1 else module
        noise = None
        if config.gradient_noise is not None:
            noise = NoiseSource(config.gradient_noise, seed=config.run.seed, device=ranks.device)
        strategy = DdpStrategy(module, model, optimizer, ranks=ranks, clip=config.clip, noise=noise)
    strategy.autocast_dtype = AUTOCAST[config.strategy.precision]
    strategy.loss_scale = LossScale(ranks.device) if config.strategy.precision == "fp16" else None
    return strategy


def _with_options(module: nn.Module, config: RunConfig, ranks: Ranks) -> nn.Module:
    on_cpu = ranks.device.type == "cpu"
    if config.strategy.precision == "bf16" and not on_cpu:
        with ranks.together("looking at the GPU"):
            check_bf16(ranks.device)
    if getattr(config.model, "sync_batch_norm", False):
        if on_cpu:
            raise ConfigError("model.sync_batch_norm: torch has it on GPUs only; take it out on CPU ranks")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    if config.strategy.activation_checkpointing:
        recompute_blocks(module)
    return module


def check_bf16(device: torch.device) -> None:
    """Refuse bf16 on a GPU that would only emulate it.

    Raises:
        ConfigError: names the GPU, and the precisions that it has.
    """
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"strategy.precision: {torch.cuda.get_device_name(device)} has no bf16 (its compute capability is "
            f"{major}.{minor}, bf16 wants 8.0); use strategy.precision=fp16 or strategy.precision=fp32"
        )


def _wrap(module: nn.Module, ranks: Ranks) -> nn.Module:
    accelerator = Accelerator(
        cpu=ranks.device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of gradients
    )
    model: nn.Module = accelerator.prepare_model(module)
    wanted = (ranks.rank, ranks.world_size)
    check("the rank and world size of Accelerate", (accelerator.process_index, accelerator.num_processes), wanted)
    check("the rank and world size of torch.distributed", (dist.get_rank(), dist.get_world_size()), wanted)
    check("the device", accelerator.device.type, ranks.device.type)
    check("the engine", type(model), DistributedDataParallel)
    return model


def leave_ranks() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

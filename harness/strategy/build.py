"""Builds the strategy a config asks for, and checks that it is what came out."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.config import RunConfig
from harness.errors import ConfigError
from harness.optim import build_optimizer
from harness.strategy.base import Ranks, Strategy, peers_answer
from harness.strategy.ddp import DdpStrategy
from harness.strategy.env import Placement

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def join_ranks(place: Placement, *, timeout_seconds: float) -> Ranks:
    """Bind this rank to its device and start the process group: gloo, with NCCL beside it on GPUs. Collective.

    With one rank there is no process group.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        # A launcher that shows each rank one GPU still counts local ranks upwards.
        index = place.local_rank % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(index)  # Accelerate binds the device by this
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if place.world_size > 1:
        with peers_answer():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=timeout_seconds),
            )
    return Ranks(rank=place.rank, world_size=place.world_size, device=device)


def build_strategy(config: RunConfig, module: nn.Module, ranks: Ranks) -> Strategy:
    """Wrap `module` with its optimizer in the strategy of `config`. Collective.

    Raises:
        ConfigError: what came out is not what was asked for.
    """
    module = module.to(device=ranks.device, dtype=DTYPES[config.strategy.precision])
    model = _wrap(module, ranks) if ranks.world_size > 1 else module
    return DdpStrategy(module, model, build_optimizer(module, config.optim), ranks=ranks, clip=config.clip)


def _wrap(module: nn.Module, ranks: Ranks) -> nn.Module:
    accelerator = Accelerator(
        cpu=ranks.device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of gradients
    )
    model: nn.Module = accelerator.prepare_model(module)
    wanted = (ranks.rank, ranks.world_size)
    _check("the rank and world size of Accelerate", (accelerator.process_index, accelerator.num_processes), wanted)
    _check("the rank and world size of torch.distributed", (dist.get_rank(), dist.get_world_size()), wanted)
    _check("the device", accelerator.device.type, ranks.device.type)
    _check("the engine", type(model), DistributedDataParallel)
    return model


def _check(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ConfigError(
            f"strategy.kind: {what} of what was built is {found}, wanted {wanted}. Training would not be what the "
            "config says; check the launcher's environment, and the versions against constraints.txt"
        )


def leave_ranks() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

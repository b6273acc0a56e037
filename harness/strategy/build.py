"""Builds the strategy a config asks for, and checks that it is what came out."""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.config.run_config import RunConfig
from harness.errors import ConfigError
from harness.optim import OfParameters, build_optimizer
from harness.ranks.group import Ranks
from harness.strategy.activation_checkpointing import recompute_blocks
from harness.strategy.base import Strategy
from harness.strategy.checks import check
from harness.strategy.ddp import DdpStrategy
from harness.strategy.loss_scale import LossScale
from harness.strategy.noise import NoiseSource

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp16": torch.float32, "fp64": torch.float64}
"""The type of weights and rows under each precision; bf16 and fp16 are autocast."""
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": None}


def moved(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a network on a device with its floats in fp32 or fp64.

    `Module.to` would drop the imaginary part of what is complex.

    Args:
        dtype: one of `DTYPES`.
    """
    module = module.to(device=device)
    return module.double() if dtype == torch.float64 else module.float()


def build_strategy(
    config: RunConfig, module: nn.Module, ranks: Ranks, *, groups: OfParameters | None = None
) -> Strategy:
    """Wrap `module` with its optimizer in the strategy of `config`. Collective.

    Args:
        groups: settings of the optimizer by parameter name, where they differ.

    Raises:
        ConfigError: what came out is not what was asked for.
    """
    module = moved(module, ranks.device, DTYPES[config.strategy.precision])
    strategy = _build(config, module, ranks, groups)
    if config.ema is not None:
        strategy.keep_average(decay=config.ema.decay)
    return strategy


def _build(config: RunConfig, module: nn.Module, ranks: Ranks, groups: OfParameters | None) -> Strategy:
    module = _with_options(module, config, ranks)
    optimizer = build_optimizer(module, config.optim, groups)
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
        with ranks.raise_on_all_ranks("looking at the GPU"):
            check_bf16(ranks.device)
    if config.model.wants_sync_batch_norm:
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

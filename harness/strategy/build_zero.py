"""Builds a DeepSpeed engine through Accelerate, and checks that it is the one that was asked for."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from harness.config.run_config import RunConfig
from harness.config.training import NormClip
from harness.errors import ConfigError
from harness.ranks.group import Ranks
from harness.strategy.base import Strategy
from harness.strategy.checks import check
from harness.strategy.deepspeed_config import STAGES, deepspeed_config


def build_zero(config: RunConfig, module: nn.Module, optimizer: Optimizer, ranks: Ranks) -> Strategy:
    """Return the strategy of `zero1`, `zero2` or `zero3`. Collective.

    Raises:
        ConfigError: deepspeed is not installed, or what came out is not what was asked for.
    """
    if config.strategy.kind == "zero3" and getattr(module, "adds_to_tensors", False):
        raise ConfigError(
            "strategy.kind: zero3 has the tensor of a layer's experts in pieces where peft adds to it as a whole; use "
            "strategy.kind=zero2, or take the experts out of model.lora.target_modules"
        )
    _prepare_environment(ranks)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"strategy.kind: {config.strategy.kind} needs DeepSpeed, which cannot be imported ({error}); "
            "pip install 'harness-train[zero]', or use strategy.kind=ddp"
        ) from error
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    from harness.strategy.zero import ZeroStrategy

    _quieten()
    on_cpu = ranks.device.type == "cpu"
    if on_cpu:
        # gloo does not need this op, whose build takes minutes and leaves a lock that hangs every later start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config, notices = _without_effectless(config, ranks)
    with ranks.raise_on_all_ranks("reading strategy.deepspeed_overrides"):
        wanted = deepspeed_config(config, world_size=ranks.world_size)
    accumulation = wanted["gradient_accumulation_steps"]
    plugin = DeepSpeedPlugin(hf_ds_config=wanted, zero3_init_flag=False, gradient_accumulation_steps=accumulation)
    if config.strategy.precision == "fp16":
        # DeepSpeed's own autocast to fp16 brings a scaler that hears of an update once a parameter group.
        module.forward = torch.autocast(ranks.device.type, dtype=torch.float16)(module.forward)
    with warnings.catch_warnings(), _refusals():
        warnings.simplefilter("ignore")
        accelerator = Accelerator(
            deepspeed_plugin=plugin,
            mixed_precision="no",
            gradient_accumulation_steps=accumulation,
            # Without a backend, on a machine with no GPU, Accelerate tells every rank that it is alone.
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl")],
        )
        engine, _ = accelerator.prepare(module, optimizer)
    stage = STAGES[config.strategy.kind]
    _check_engine(engine, accelerator, config, ranks, stage=stage)
    strategy = ZeroStrategy(engine, stage=stage, ranks=ranks, clip=config.clip)
    strategy.notices = notices
    return strategy


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what Accelerate and DeepSpeed say of their configuration into an error of the configuration."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"strategy: DeepSpeed refuses what it was given: {error}. Mend the options of strategy, or the file of "
            "strategy.deepspeed_overrides"
        ) from error


def _prepare_environment(ranks: Ranks) -> None:
    """Say to Accelerate and DeepSpeed, which ask the environment, what they must know before they are imported."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.setdefault("LOCAL_RANK", "0")
    if ranks.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        # Two environments that share the folder of compiled ops build over each other.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def _without_effectless(config: RunConfig, ranks: Ranks) -> tuple[RunConfig, tuple[str, ...]]:
    """Return the config without options that can do nothing here, and a sentence about each."""
    strategy, notices = config.strategy, []
    if ranks.world_size == 1:
        notices.append(f"strategy.kind: {strategy.kind} on one rank partitions nothing; ddp does the same with less")
    if ranks.device.type == "cpu":
        names = [name for name in ("offload_optimizer", "offload_parameters") if getattr(strategy, name, False)]
        notices += [
            f"strategy.{name}: has no effect without a GPU; everything is in the host's memory" for name in names
        ]
        strategy = strategy.model_copy(update=dict.fromkeys(names, False))
    return config.model_copy(update={"strategy": strategy}), tuple(notices)


def _quieten() -> None:
    """Leave of DeepSpeed's chatter what a user can act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings are of options that we chose
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        message = rf"`torch.distributed.{name}` is deprecated"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)


def _check_engine(engine: Any, accelerator: Accelerator, config: RunConfig, ranks: Ranks, *, stage: int) -> None:
    import deepspeed

    place = (ranks.rank, ranks.world_size)
    check("the engine", type(engine), deepspeed.DeepSpeedEngine)
    check("the ZeRO stage", engine.zero_optimization_stage(), stage)
    check("the rank and world size of Accelerate", (accelerator.process_index, accelerator.num_processes), place)
    check("the rank and world size of DeepSpeed", (engine.global_rank, engine.dp_world_size), place)
    check("the device", torch.device(engine.device).type, ranks.device.type)
    max_norm = config.clip.max_norm if isinstance(config.clip, NormClip) else 0.0
    check("the clipping norm", engine.gradient_clipping(), max_norm)
    check("the clipping norm of the optimizer", engine.optimizer.clip_grad, max_norm)
    check("autocast", engine.torch_autocast_enabled(), config.strategy.precision == "bf16")
    check("the type of the weights", next(engine.module.parameters()).dtype, torch.float32)
    _check_partitions(engine, ranks, stage=stage)


def _check_partitions(engine: Any, ranks: Ranks, *, stage: int) -> None:
    """Refuse an engine whose ranks hold more than their share of what the stage partitions.

    Optimizer state is laid out like the fp32 partitions; a partition is padded to a few elements a rank.
    """
    from harness.strategy.zero_fragments import partitions

    trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable)
    share = total / ranks.world_size + len(trainable) + 4 * ranks.world_size
    held = sum(flat.numel() for flat in partitions(engine.optimizer, stage=stage))
    check(f"a share of at most {share:,.0f} elements of the optimizer, not {held:,},", held <= share, True)
    if stage == 3:
        held = sum(parameter.ds_tensor.numel() for parameter in trainable)
        check(f"a share of at most {share:,.0f} elements of the weights, not {held:,},", held <= share, True)

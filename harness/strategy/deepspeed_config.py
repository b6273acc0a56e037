"""From a RunConfig to DeepSpeed's dictionary; every number in it is derived from one that the user gave once."""

import json
from pathlib import Path
from typing import Any

from harness.config.run_config import RunConfig
from harness.config.strategy import Zero3Strategy, ZeroSection, ZeroStrategy
from harness.config.training import NormClip
from harness.errors import ConfigError

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}

# What the run itself decides, with the key of ours that does.
DECIDED_BY = {
    "train_batch_size": "data.global_batch",
    "elasticity": "data.global_batch",
    "train_micro_batch_size_per_gpu": "strategy.micro_batch",
    "gradient_accumulation_steps": "data.global_batch and strategy.micro_batch",
    "gradient_clipping": "clip",
    "torch_autocast": "strategy.precision",
    "bf16": "strategy.precision",
    "bfloat16": "strategy.precision",
    "fp16": "strategy.precision",
    "amp": "strategy.precision",
    "data_types": "strategy.precision",
    "gradient_accumulation_dtype": "strategy.precision",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "tensor_parallel": "strategy.kind",
    "sparse_gradients": "strategy.kind",
    "disable_allgather": "strategy.kind",
    "optimizer": "optim",
    "scheduler": "schedule",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
    "zero_optimization.stage": "strategy.kind",
    "zero_optimization.zero_hpz_partition_size": "strategy.kind",
    "zero_optimization.cpu_offload": "strategy.offload_optimizer",
}
# Sections of DeepSpeed's that the run has no use for; switched off they contradict nothing.
OFF = ("bf16", "bfloat16", "fp16", "amp", "elasticity", "curriculum_learning", "data_efficiency")


def deepspeed_config(config: RunConfig, *, world_size: int) -> dict[str, Any]:
    """Return the dictionary that makes DeepSpeed do what `config` says on `world_size` ranks.

    Raises:
        ConfigError: `strategy.deepspeed_overrides` cannot be read, or contradicts the run.
    """
    strategy = config.strategy
    assert isinstance(strategy, ZeroSection), f"{strategy.kind} is not a ZeRO strategy"
    share = config.data.global_batch // world_size
    # Of tokens, an update has one micro-batch a row at most; how many it has, ZeroStrategy.accumulate says each time.
    micro_batch = 1 if strategy.micro_batch_tokens else strategy.micro_batch or share
    derived: dict[str, Any] = {
        "train_batch_size": config.data.global_batch,  # redundant, so that DeepSpeed checks the arithmetic
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": share // micro_batch,
        "gradient_clipping": config.clip.max_norm if isinstance(config.clip, NormClip) else 0.0,
        # The optimizers are torch's own; that ZeRO does not change what they do is shown by the reference tests.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(strategy),
        # No "safe" modules: their gradients would be reduced in bf16, where DDP reduces in fp32.
        "torch_autocast": {
            "enabled": strategy.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 2**31,
    }
    if strategy.communication_dtype:
        derived["communication_data_type"] = strategy.communication_dtype
    if strategy.deepspeed_overrides:
        path = Path(strategy.deepspeed_overrides)
        return _merge(derived, _read(path), path=path)
    return derived


def _zero(strategy: ZeroSection) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "reduce_bucket_size": strategy.reduce_bucket_elements,
        "overlap_comm": strategy.overlap_communication,
        "contiguous_gradients": True,
    }
    if strategy.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if isinstance(strategy, ZeroStrategy):
        zero["stage"] = STAGES[strategy.kind]
        zero["allgather_bucket_size"] = strategy.allgather_bucket_elements
        zero["use_multi_rank_bucket_allreduce"] = strategy.multi_rank_buckets
    if isinstance(strategy, Zero3Strategy):
        zero["stage"] = STAGES[strategy.kind]
        zero["stage3_prefetch_bucket_size"] = strategy.prefetch_bucket_elements
        zero["stage3_param_persistence_threshold"] = strategy.persistence_threshold_elements
        if strategy.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"strategy.deepspeed_overrides: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"strategy.deepspeed_overrides: {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"strategy.deepspeed_overrides: {path} holds a {type(value).__name__}, wanted an object")
    return value


def _merge(derived: dict[str, Any], given: dict[str, Any], *, path: Path) -> dict[str, Any]:
    """Return `derived` with what `given` adds; every contradiction is listed."""
    given = _without_auto(given)
    section = given.pop("zero_optimization", {})
    if not isinstance(section, dict):
        raise ConfigError(f"strategy.deepspeed_overrides: zero_optimization in {path} is not an object")
    problems = []
    for key, owner in DECIDED_BY.items():
        in_section, name = key.startswith("zero_optimization."), key.rpartition(".")[2]
        found_in, decided_in = (section, derived["zero_optimization"]) if in_section else (given, derived)
        if name not in found_in:
            continue
        found = found_in.pop(name)
        if name in decided_in:
            agrees, wanted = _agrees(found, decided_in[name]), f"is {decided_in[name]!r} in this run"
        else:
            agrees = name in OFF and isinstance(found, dict) and not found.get("enabled")
            wanted = "is off in this run" if name in OFF else "is not DeepSpeed's to decide"
        if not agrees:
            problems.append(f"  {key}: {found!r} contradicts {owner}, which decides it; it {wanted}")
    if problems:
        raise ConfigError(
            f"strategy.deepspeed_overrides: {path} contradicts the run; take these out, or change our key:\n"
            + "\n".join(problems)
        )
    return _deep_merge(derived, {**given, "zero_optimization": section})


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `given` without what it leaves to us; DeepSpeed would put its own defaults there."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in given.items()
        if value != "auto"
    }


def _agrees(found: Any, decided: Any) -> bool:
    if isinstance(found, dict) and isinstance(decided, dict):
        return all(key in decided and _agrees(value, decided[key]) for key, value in found.items())
    return bool(found == decided)


def _deep_merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _deep_merge(below[key], value) if both else value
    return merged

"""The optimizer and its parameter groups."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from harness.config.training import AdamOptim, AdamWOptim, Optim, SgdOptim


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters into those that decay and those that do not (biases, norms: fewer than 2 dimensions).

    A model that has `lr_factors`, {parameter name: factor of the learning rate}, has groups for each factor, which
    carry it as `lr_factor`. Empty groups are left out, and without decay nothing is split by dimensions, since every
    group costs a kernel launch an update.
    """
    factors: Mapping[str, float] = getattr(model, "lr_factors", {})
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = bool(weight_decay) and parameter.dim() >= 2
            members.setdefault((factors.get(name, 1.0), decays), []).append(parameter)
    return [
        {
            "params": members[factor, decays],
            "weight_decay": weight_decay if decays else 0.0,
            **({"lr_factor": factor} if factor != 1.0 else {}),
        }
        for factor, decays in sorted(members, reverse=True)  # from the head downwards, the decayed ones first
    ]


def moments_per_parameter(config: Optim) -> int:
    """Return how many tensors of a parameter's size the optimizer keeps for it."""
    return int(config.momentum > 0) if isinstance(config, SgdOptim) else 2


def build_optimizer(model: nn.Module, config: Optim) -> Optimizer:
    """Return torch's fused optimizer, which can skip an update on the device (`found_inf`); the loop sets its rate."""
    lr, fused = torch.tensor(config.peak_lr, dtype=torch.float64), True
    match config:
        case AdamWOptim():
            groups = parameter_groups(model, weight_decay=config.weight_decay)
            return AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
        case AdamOptim():
            groups = parameter_groups(model, weight_decay=0.0)
            return Adam(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
        case _:
            groups = parameter_groups(model, weight_decay=config.weight_decay)
            return SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)

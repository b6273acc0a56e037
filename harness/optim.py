"""The optimizer and its parameter groups."""

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from harness.config.training import AdamOptim, AdamWOptim, Optim, SgdOptim


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters into those that decay and those that do not (biases, norms: fewer than 2 dimensions).

    Empty groups are left out; without decay there is one group, since every group costs a kernel launch an update.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weight_decay:
        return [{"params": trainable, "weight_decay": 0.0}]
    decayed = [parameter for parameter in trainable if parameter.dim() >= 2]
    not_decayed = [parameter for parameter in trainable if parameter.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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

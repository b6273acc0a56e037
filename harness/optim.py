"""The optimizer and its parameter groups."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer

from harness.config.training import AdafactorOptim, AdamOptim, AdamWOptim, MuonOptim, Optim, SgdOptim

OfParameters = Mapping[str, Mapping[str, float]]
"""Settings by parameter name, where they are not those of all: `lr_factor` and `weight_decay`."""


def parameter_groups(
    model: nn.Module, *, weight_decay: float, own: OfParameters | None = None, left_out: Sequence[nn.Parameter] = ()
) -> list[dict[str, object]]:
    """Split trainable parameters into those that decay and those that do not (biases, norms: fewer than 2 dimensions).

    Empty groups are left out, and without decay nothing is split by dimensions, since every group costs a kernel launch
    an update.

    Args:
        own: parameters with settings of their own; those with the same ones make a group. `lr_factor` is what the
            learning rate is multiplied by.
    """
    settings, others = own or {}, set(left_out)
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in others:
            of_this = settings.get(name, {})
            decay = of_this.get("weight_decay", weight_decay if parameter.dim() >= 2 else 0.0)
            members.setdefault((of_this.get("lr_factor", 1.0), decay), []).append(parameter)
    return [
        {
            "params": members[factor, decay],
            "weight_decay": decay,
            **({"lr_factor": factor} if factor != 1.0 else {}),
        }
        for factor, decay in sorted(members, reverse=True)  # from the head downwards, the decayed ones first
    ]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable weight matrices between the embeddings and the last linear layer, these left out."""
    modules = list(model.modules())
    embeddings = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    last = [module.weight for module in modules if isinstance(module, nn.Linear)][-1:]
    at_the_ends = {*embeddings, *last}
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and p not in at_the_ends]


def moments_per_parameter(config: Optim) -> int:
    """Return about how many tensors of a parameter's size the optimizer keeps for it."""
    match config:
        case SgdOptim():
            return int(config.momentum > 0)
        case AdafactorOptim():  # a row and a column of each matrix
            return 0
        case MuonOptim():  # of each hidden matrix, 2 of the few others
            return 1
    return 2


def moment_shapes(group: Mapping[str, Any], shape: Sequence[int]) -> dict[str, list[int]]:
    """Return what torch's optimizers keep for a parameter of this shape, by name.

    Args:
        group: the settings of its parameter group, which tell the optimizers apart.
    """
    if "betas" in group:  # Adam, AdamW
        return {"step": [], "exp_avg": list(shape), "exp_avg_sq": list(shape)}
    if "beta2_decay" not in group:  # SGD, Muon
        return {"momentum_buffer": list(shape)}
    if len(shape) < 2:  # Adafactor
        return {"step": [], "variance": list(shape)}
    return {"step": [], "row_var": [*shape[:-1], 1], "col_var": [*shape[:-2], 1, *shape[-1:]]}


class SkippingOptimizer(Optimizer):
    """Optimizers of torch that cannot skip an update on the device, as one that can skip it.

    Every step reads to the host, once, whether `found_inf` is 1 and the rates.
    """

    found_inf: Tensor

    def __init__(self, members: Sequence[Optimizer]) -> None:
        super().__init__([group for member in members for group in member.param_groups], {})
        self._members = members
        self.state = defaultdict(dict)
        for member in members:
            member.state = self.state  # no two have a parameter in common

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the step of every member, unless the gradient is not finite."""
        device = self.found_inf.device
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64, device=device) for group in self.param_groups]
        is_skipped, *rates_on_host = torch.stack([self.found_inf.double(), *rates]).tolist()
        if is_skipped:
            return
        for group, rate in zip(self.param_groups, rates_on_host, strict=True):
            group["lr"] = rate
        for member in self._members:
            member.step()


def build_optimizer(model: nn.Module, config: Optim, own: OfParameters | None = None) -> Optimizer:
    """Return an optimizer of torch that skips an update where its `found_inf` is 1; the loop sets its rate.

    The fused ones do so on the device. Adafactor and Muon have no fused form: they launch kernels for every parameter
    (Adafactor for all at once where torch has foreach kernels, on GPUs), and read to the host once an update.

    Args:
        own: see `parameter_groups`; not of the hidden matrices that Muon has.
    """
    lr, fused = torch.tensor(config.peak_lr, dtype=torch.float64), True
    decay = 0.0 if isinstance(config, AdamOptim) else config.weight_decay
    match config:
        case AdamWOptim():
            groups = parameter_groups(model, weight_decay=decay, own=own)
            return AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
        case AdamOptim():
            groups = parameter_groups(model, weight_decay=decay, own=own)
            return Adam(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
        case AdafactorOptim():
            groups = parameter_groups(model, weight_decay=decay, own=own)
            beta2_decay, threshold = config.beta2_decay, config.clip_threshold
            return SkippingOptimizer([Adafactor(groups, lr=config.peak_lr, beta2_decay=beta2_decay, d=threshold)])
        case MuonOptim():
            matrices = hidden_matrices(model)
            groups = parameter_groups(model, weight_decay=decay, own=own, left_out=matrices)
            adamw = AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=fused)
            if not matrices:
                return SkippingOptimizer([adamw])
            muon = Muon(
                matrices,
                lr=config.peak_lr,
                weight_decay=decay,
                momentum=config.momentum,
                nesterov=config.nesterov,
                adjust_lr_fn="match_rms_adamw",
            )
            return SkippingOptimizer([muon, adamw])
        case _:
            groups = parameter_groups(model, weight_decay=decay, own=own)
            return SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)

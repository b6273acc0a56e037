"""DistributedDataParallel: every rank holds the whole model and optimizer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from harness.config.training import Clip, NormClip, ValueClip
from harness.ranks.group import Ranks
from harness.state import GradNorm
from harness.strategy.average import WeightAverage
from harness.strategy.base import CLIP_EPSILON, Strategy, model_tensors, moments_by_parameter
from harness.strategy.graph import zero_of
from harness.strategy.noise import NoiseSource
from harness.strategy.untouched import no_trace


class DdpStrategy(Strategy):
    """One replica a rank, and a fused optimizer that can skip an update on the device.

    Args:
        module: the bare network, on its device.
        model: the same, wrapped if there are several ranks.
        optimizer: one of torch's fused ones, over `module`.
        noise: is added to the clipped gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        ranks: Ranks,
        clip: Clip,
        noise: NoiseSource | None = None,
    ) -> None:
        super().__init__(rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
        self.module = module
        self.model = model
        if isinstance(model, DistributedDataParallel):
            # Rank zero's buffers count (share_buffers), and are needed at evaluations and saves only.
            model.broadcast_buffers = False  # also the name before torch 2.13
        self.optimizer = optimizer
        self._clip, self._noise = clip, noise
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.parameter_names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        # DDP averages over ranks; a gradient of world_size at the loss makes that the sum.
        self._seed = self.tensor(float(self.world_size), dtype=self._parameters[0].dtype)
        self._found_inf = self.tensor(0.0)
        # The fused optimizers of torch skip the whole update, their step count too, where this is 1.0.
        self.optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        self._start_momentum()

    def _start_momentum(self) -> None:
        """Give SGD the zeros it would start from.

        torch's fused SGD makes the buffer uninitialised in its first step; if that step is skipped, so it stays.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def warm_up(self, forward: Callable[[], Any]) -> None:
        # After its first backward pass DDP puts the gradients into other buckets, in the order of their arrival. Over
        # more than two ranks the place in a bucket decides the order of summation, so a resumed run would not come
        # back to the same bits.
        if not isinstance(self.model, DistributedDataParallel):
            return
        with no_trace(self.module, self.device):
            self.backward(zero_of(forward()))

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[object]:
        if is_last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        # 0 * loss is 0 for a finite loss and NaN for any other.
        seed = self._seed if self.loss_scale is None else self.loss_scale.scale
        loss.backward(torch.add(seed, loss.detach(), alpha=0))  # type: ignore[no-untyped-call]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        factor = self._unscaled()
        for name, gradient in zip(self.parameter_names, self._gradients(), strict=True):
            yield name, gradient if factor is None else gradient * factor

    def _gradients(self) -> list[Tensor]:
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]

    def update(self, learning_rate: Tensor, *, position: int) -> GradNorm:
        gradients = self._gradients()
        factor = self._unscaled()
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        per_parameter = torch.stack(torch._foreach_norm(gradients))  # (P,)
        norm = torch.linalg.vector_norm(per_parameter)  # ()
        coefficient = self._clip_gradients(gradients, norm)
        difference = norm - norm  # 0 for a finite norm and NaN for any other
        torch.ne(difference, 0, out=self._found_inf)
        if self._noise is not None:
            self._noise.add(gradients, position=position)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_factor"] if "lr_factor" in group else learning_rate
        self.optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        applied = difference == 0
        if self.average is not None:
            self.average.update(applied)
        return GradNorm(norm, per_parameter, coefficient, applied, self._settle_scale(applied))

    def _clip_gradients(self, gradients: list[Tensor], norm: Tensor) -> Tensor:
        match self._clip:
            case NormClip(max_norm=max_norm):
                coefficient = torch.clamp(max_norm / (norm + CLIP_EPSILON), max=1.0)
                torch._foreach_mul_(gradients, coefficient)
                return coefficient
            case ValueClip(max_value=max_value):
                torch._foreach_clamp_min_(gradients, -max_value)
                torch._foreach_clamp_max_(gradients, max_value)
                clipped: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
                return (clipped / norm).nan_to_num(nan=1.0)  # nothing of nothing is all of it
            case _:
                return torch.ones_like(norm)

    def keep_average(self, *, decay: float) -> None:
        self.average = WeightAverage(self._parameters, decay=decay)

    def _show(self, *, average: bool) -> None:
        assert self.average is not None, "there is no average to show"
        for parameter, value in zip(self._parameters, self.average.values, strict=True):
            parameter.data, value.data = value.data, parameter.data  # a swap either way, and no copy

    def group_indices(self) -> list[int]:
        group_of = {
            id(parameter): index
            for index, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        }
        return [group_of[id(parameter)] for parameter in self._parameters]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model_tensors(self.module):
            yield f"model/{name}", tensor
        for name, parameter in zip(self.parameter_names, self._parameters, strict=True):
            for moment, tensor in self.optimizer.state[parameter].items():
                if tensor is not None:
                    yield f"optim/{name}/{moment}", tensor
        if self.average is not None:
            yield "ema/count", self.average.count
            for name, value in zip(self.parameter_names, self.average.values, strict=True):
                yield f"ema/weight/{name}", value

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in model_tensors(self.module):
            tensor.copy_(state[f"model/{name}"])
        keys = moments_by_parameter(state)
        for name, parameter in zip(self.parameter_names, self._parameters, strict=True):
            self.optimizer.state[parameter] = moments = {}
            for moment, key in keys.get(name, {}).items():
                value = state[key].to(self.device)
                moments[moment] = value.to(parameter.dtype) if value.dim() else value  # counts stay what they are
        self._start_momentum()
        if self.average is not None:
            self.average.start_again()
            if "ema/count" in state:
                self.average.count.copy_(state["ema/count"])
                for name, value in zip(self.parameter_names, self.average.values, strict=True):
                    value.copy_(state[f"ema/weight/{name}"])

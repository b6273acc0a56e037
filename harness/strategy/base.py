"""The seam: everything that differs between DDP and ZeRO, and how ranks agree."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.ranks.group import Ranks
from harness.rows.tree import map_tree
from harness.state import GradNorm
from harness.strategy.average import WeightAverage
from harness.strategy.loss_scale import LossScale

# torch.nn.utils.clip_grad_norm_ and DeepSpeed both add this to the norm they divide by.
CLIP_EPSILON = 1e-6
SETTINGS = ("lr_factor", "weight_decay", "betas", "eps", "momentum", "nesterov", "beta2_decay", "d")
"""What a parameter group of torch's optimizers may set, besides its rate."""


class Strategy(Ranks, ABC):
    """A model and its optimizer, spread over the ranks of one process group."""

    model: nn.Module
    """What training calls; its backward reduces gradients over ranks."""
    module: nn.Module
    """The bare network, for evaluation and for names."""
    autocast_dtype: torch.dtype | None = None
    """The type that matrix products are computed in, where it is not that of the weights."""
    loss_scale: LossScale | None = None
    """Where matrix products are computed in fp16, what keeps small gradients from vanishing."""
    tells_reduction: bool = True
    """Whether the reduction over ranks ends after the backward pass, so that the wait for it can be told from that."""
    parameter_names: list[str]
    """Trainable parameters, in the order of every list of gradients or norms."""
    optimizer: torch.optim.Optimizer
    """The one of torch that makes the update, of whole parameters or of partitions of them."""
    average: WeightAverage | None = None
    """Of the weights, if one is kept."""

    def warm_up(self, forward: Callable[[], Any]) -> None:
        """Settle what a library settles in its first pass, so that the first update of a launch is as all others.

        Leaves no trace in weights, buffers, gradients or random numbers. Collective.

        Args:
            forward: sends some rows of this rank through `self.forward`.
        """
        return

    # -------------------------------------------------------- one update

    def _unscaled(self) -> Tensor | None:
        """Return the () factor that makes an average over ranks of scaled gradients their sum; None without scaling."""
        return None if self.loss_scale is None else self.world_size / self.loss_scale.scale

    def _settle_scale(self, applied: Tensor) -> Tensor | None:
        """Return the () scale that an update was made with, and have the next one's follow from it."""
        if self.loss_scale is None:
            return None
        scale = self.loss_scale.scale
        self.loss_scale.settle(applied)
        return scale

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns for training, floats at least fp32. Collective under ZeRO-3."""
        return self._call(self.model, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns for evaluation, floats at least fp32. Collective under ZeRO-3."""
        return self._call(self.module, *args, **kwargs)

    def _call(self, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.autocast_dtype is None:
            return network(*args, **kwargs)
        with torch.autocast(self.device.type, dtype=self.autocast_dtype):
            outputs = network(*args, **kwargs)
        return map_tree(at_least_fp32, outputs)

    def penalty(self) -> Tensor | None:
        """Return what the network itself adds to the mean loss of the rows that last went forward, (), or None."""
        own = getattr(self.module, "penalty", None)
        penalty: Tensor | None = own() if own else None
        return penalty

    @abstractmethod
    def accumulate(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Enter around one micro-batch; gradients are reduced over ranks with the last one only."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the sum over ranks of `loss`, (). Collective with the last micro-batch.

        A loss that is not finite makes this rank's whole gradient NaN, so the reduction tells every rank of it.
        """

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole gradient), reduced over ranks and unclipped. Collective: every rank must use it up."""

    @abstractmethod
    def update(self, learning_rate: Tensor, *, position: int) -> GradNorm:
        """Clip, step and zero; a gradient whose norm is not finite changes nothing. Collective.

        Args:
            learning_rate: () on the device.
            position: attempted updates before this one; what is drawn at random in it follows from this.
        """

    def release(self) -> None:
        """Let go of weights that forwards without a backward have gathered (ZeRO-3). Collective."""
        return

    # -------------------------------------------------------- the average of the weights

    @abstractmethod
    def keep_average(self, *, decay: float) -> None:
        """Average the weights from the next update on."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the average, if one is kept, in the place of the weights inside. Collective under ZeRO."""
        if self.average is None:
            yield
            return
        self._show(average=True)
        try:
            yield
        finally:
            self._show(average=False)

    @abstractmethod
    def _show(self, *, average: bool) -> None:
        """Put the average in the place of the weights that it is shown for, or them back."""

    # -------------------------------------------------------- state by parameter name

    @abstractmethod
    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, whole tensor) of everything learned. Collective.

        Keys are `model/NAME`, `optim/NAME/MOMENT` and, where an average is kept, `ema/weight/NAME` and `ema/count`.
        """

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` of any strategy at any world size has yielded. Collective."""

    @abstractmethod
    def group_indices(self) -> list[int]:
        """Return the parameter group of each of `parameter_names`."""

    def optimizer_settings(self) -> list[dict[str, Any]]:
        """Return the settings of each parameter group, but its rate, and the names of its parameters; JSON values."""
        names: dict[int, list[str]] = {}
        for name, group in zip(self.parameter_names, self.group_indices(), strict=True):
            names.setdefault(group, []).append(name)
        groups = self.optimizer.param_groups
        return [
            {
                **{key: _plain(groups[index][key]) for key in SETTINGS if key in groups[index]},
                "parameters": names[index],
            }
            for index in sorted(names)
        ]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, whole, tied ones once."""
        shapes, names = self.model_shapes(), dict(self.module.named_parameters())
        return sum(prod(shape) for name, shape in shapes.items() if name in names)

    @property
    def num_trained(self) -> int:
        """Elements of the parameters that are trained."""
        shapes = self.model_shapes()
        return sum(prod(shapes[name]) for name in self.parameter_names if name in shapes)

    def state_bytes(self, *, moments_per_parameter: int) -> int:
        """Return about how many bytes `state` yields once the optimizer has its moments."""
        num_elements = sum(prod(shape) for shape in self.model_shapes().values())
        element_size = next(self.module.parameters()).element_size()
        return (num_elements + moments_per_parameter * self.num_trained) * element_size

    def model_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the whole shape of every tensor that `state` yields as `model/NAME`."""
        return {name: tuple(tensor.shape) for name, tensor in model_tensors(self.module)}

    def share_buffers(self) -> None:
        """Give every rank rank zero's buffers (BatchNorm statistics differ between ranks). Collective."""
        if self.world_size > 1:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)


def at_least_fp32(leaf: Any) -> Any:
    """Return a tensor of floats in fp32 if it is in less, and anything else as it is."""
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16) else leaf


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def moments_by_parameter(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Return {parameter: {moment: key}} of the keys `optim/PARAMETER/MOMENT`, reading no tensor."""
    found: dict[str, dict[str, str]] = {}
    for key in state:
        prefix, _, rest = key.partition("/")
        name, _, moment = rest.rpartition("/")
        if prefix == "optim":
            found.setdefault(name, {})[moment] = key
    return found


def model_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter and saved buffer; what is tied comes once, by its first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor

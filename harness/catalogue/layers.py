"""The parts that networks are made of: activations, norms, and the first weights of a layer."""

import math
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from harness.catalogue.mlp.section import SATURATING, Init

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """Return `value` gated by the SiLU of `gate`, (..., F) all. Source: Shazeer 2020, arXiv:2002.05202."""
    return F.silu(gate) * value


class SwiGLU(nn.Module):
    """The second half of the features gated by the first: (..., 2 F) -> (..., F)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)  # (..., F) each
        return swiglu(gate, value)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swiglu": SwiGLU,
}


def activation_layers(name: str) -> list[nn.Module]:
    """Return an activation as no layer or one; a softmax is over the last dimension."""
    if name == "none":
        return []
    return [nn.Softmax(dim=-1)] if name == "softmax" else [ACTIVATIONS[name]()]


def norm_layers(name: str, width: int, *, of_images: bool = False) -> list[nn.Module]:
    """Return the norm of `width` features, or channels of images, as no layer or one."""
    match name, of_images:
        case "batch", False:
            return [nn.BatchNorm1d(width)]
        case "batch", True:
            return [nn.BatchNorm2d(width)]
        case "layer", False:
            return [nn.LayerNorm(width)]
        case "layer", True:
            return [nn.GroupNorm(1, width)]
    return []


def weight_std(init: Init, *, followed_by: str, fan_in: int, fan_out: int) -> float:
    """Return the standard deviation of the first weights of a layer.

    Args:
        init: kaiming is gain / sqrt(fan_in) with a gain of sqrt(2) before the family of ReLU, of sqrt(2 / (1 + 0.01^2))
            before leaky ReLU and of 1 before anything else; xavier is sqrt(2 / (fan_in + fan_out)).
        followed_by: the activation that the layer's outputs go to, "none" after the last layer.
        fan_in: terms of one output.
        fan_out: outputs that one input goes to.
    Source: He et al. 2015, arXiv:1502.01852; Glorot & Bengio 2010.
    """
    if init == "auto":
        init = "xavier" if followed_by in SATURATING else "kaiming"
    if init == "xavier":
        return math.sqrt(2 / (fan_in + fan_out))
    if followed_by in (*SATURATING, "none", "softmax"):
        return math.sqrt(1 / fan_in)
    slope = 0.01 if followed_by == "leaky_relu" else 0.0
    return math.sqrt(2 / (1 + slope**2) / fan_in)


def initialised(layer: Layer, init: Init, *, followed_by: str = "none") -> Layer:
    """Return the layer with its first weights, normal with `weight_std`, and biases of 0."""
    if init == "torch":
        return layer
    receptive = layer.weight[0, 0].numel()  # 1, or the places under a kernel
    fan_in, fan_out = layer.weight.shape[1] * receptive, layer.weight.shape[0] * receptive
    if followed_by == "swiglu":
        fan_out //= 2  # the gate and the value are two layers side by side
    nn.init.normal_(layer.weight, std=weight_std(init, followed_by=followed_by, fan_in=fan_in, fan_out=fan_out))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

"""Networks: as many parameters as the formulas say, torch's own layers bit for bit, and refusals of what cannot be."""

from __future__ import annotations

import math
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from harness.catalogue.layers import weight_std
from harness.errors import ConfigError
from harness.fits import batch_norms
from tests.sections import build_model, parsed
from tests.test_order import unhurried


def a_model(kind: str, *, input_shape: tuple[int, ...], num_outputs: int = 3, **keys: Any) -> nn.Module:
    torch.manual_seed(5)
    return build_model(parsed("model", {"kind": kind, **keys}), input_shape=input_shape, num_outputs=num_outputs)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def linear_parameters(before: int, after: int) -> int:
    return before * after + after


def mlp_parameters(widths: list[int], *, norm: str, activation: str = "relu") -> int:
    """Each layer has in x out weights and out biases; each norm of a hidden layer a scale and a shift per channel."""
    inner = 2 if activation == "swiglu" else 1  # a gate for each value
    hidden = sum(linear_parameters(before, inner * after) for before, after in pairwise(widths[:-1]))
    norms = 0 if norm == "none" else 2 * inner * sum(widths[1:-1])
    return hidden + norms + linear_parameters(widths[-2], widths[-1])


def assert_same_bits(found: nn.Module, wanted: nn.Module, inputs: torch.Tensor) -> None:
    for left, right in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(found(inputs), wanted(inputs))


# ---------------------------------------------------------------- mlp


@unhurried
@given(
    st.lists(st.integers(1, 9), max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from(["none", "batch", "layer"]),
    st.sampled_from(["relu", "swiglu"]),
)
def test_an_mlp_has_the_parameters_of_its_formula(
    hidden: list[int], input_shape: list[int], num_outputs: int, norm: str, activation: str
) -> None:
    keys = {"hidden": hidden, "norm": norm, "activation": activation}
    model = a_model("mlp", input_shape=tuple(input_shape), num_outputs=num_outputs, **keys)
    widths = [prod(input_shape), *hidden, num_outputs]
    assert num_parameters(model) == mlp_parameters(widths, norm=norm, activation=activation)
    assert model.eval()(torch.randn(2, *input_shape)).shape == (2, num_outputs)


@pytest.mark.parametrize(
    ("activation", "layer"),
    [
        ("relu", nn.ReLU),
        ("leaky_relu", nn.LeakyReLU),
        ("gelu", nn.GELU),
        ("silu", nn.SiLU),
        ("tanh", nn.Tanh),
        ("sigmoid", nn.Sigmoid),
    ],
)
def test_an_mlp_is_torchs_sequential_of_the_same_seed_bit_for_bit(activation: str, layer: type[nn.Module]) -> None:
    found = a_model("mlp", input_shape=(10,), num_outputs=1, hidden=[64, 7], activation=activation, init="torch")
    torch.manual_seed(5)
    wanted = nn.Sequential(nn.Linear(10, 64), layer(), nn.Linear(64, 7), layer(), nn.Linear(7, 1))
    assert_same_bits(found, wanted, torch.randn(4, 10))


def test_every_hidden_layer_has_its_norm_before_the_activation_and_dropout_after_it() -> None:
    model = a_model("mlp", input_shape=(2, 3), hidden=[4, 5], norm="batch", dropout=0.25)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in model.children()] == [nn.Flatten, *hidden, *hidden, nn.Linear]
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.25}


def test_norms_and_dropouts_may_differ_from_layer_to_layer() -> None:
    keys = {"norm": ["batch", "none", "layer"], "dropout": [0.0, 0.5, 0.25]}
    model = a_model("mlp", input_shape=(4,), hidden=[5, 6, 7], **keys)
    first, second = [nn.Linear, nn.BatchNorm1d, nn.ReLU], [nn.Linear, nn.ReLU, nn.Dropout]
    third = [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in model.children()] == [*first, *second, *third, nn.Linear]
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.5, 0.25]


def test_the_two_layer_network_of_the_chapter_computes_what_its_numpy_code_computes() -> None:
    numbers = np.random.RandomState(42)
    first, second = numbers.randn(3, 4) * 0.5, numbers.randn(4, 2) * 0.5
    model = a_model("mlp", input_shape=(3,), num_outputs=2, hidden=[4], output="softmax").double()
    with torch.no_grad():
        for layer, weights in zip((model[0], model[2]), (first, second), strict=True):
            layer.weight.copy_(torch.from_numpy(weights.T))
            layer.bias.zero_()
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    hidden, output = model[:2](x), model(x)
    assert hidden[0].tolist() == pytest.approx([0, 0.511, 1.208, 0.83], abs=5e-4)
    assert output[0].tolist() == pytest.approx([0.291, 0.709], abs=5e-4)
    assert int(output.argmax()) == 1


def test_the_robust_mlp_has_5315_parameters() -> None:
    model = a_model("mlp", input_shape=(10,), num_outputs=3, hidden=[64, 64], norm="batch", dropout=0.3)
    # 10 x 64 + 64 and 2 x 64 of the norm; 64 x 64 + 64 and 2 x 64; 64 x 3 + 3
    assert num_parameters(model) == 704 + 128 + 4160 + 128 + 195 == 5315


def test_swiglu_is_one_half_of_the_layer_gated_by_the_silu_of_the_other() -> None:
    model = a_model("mlp", input_shape=(4,), num_outputs=2, hidden=[5], activation="swiglu")
    x = torch.randn(3, 4)
    gate, value = (x @ model[0].weight.T + model[0].bias).split(5, dim=1)
    wanted = (gate * torch.sigmoid(gate) * value) @ model[2].weight.T + model[2].bias
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("none", lambda z: z),
        ("relu", lambda z: z.clamp(min=0)),
        ("sigmoid", lambda z: 1 / (1 + torch.exp(-z))),
        ("softmax", lambda z: torch.exp(z) / torch.exp(z).sum(dim=1, keepdim=True)),
    ],
)
def test_a_perceptron_is_one_linear_layer_with_an_activation(activation: str, function: Any) -> None:
    model = a_model("perceptron", input_shape=(2, 3), num_outputs=2, activation=activation)
    (weight, bias), x = model.parameters(), torch.randn(4, 2, 3)
    assert num_parameters(model) == 6 * 2 + 2
    torch.testing.assert_close(model(x), function(x.reshape(4, 6) @ weight.T + bias))


# ---------------------------------------------------------------- residual mlp


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_a_residual_mlp_has_the_parameters_of_its_formula(activation: str, norm: str) -> None:
    keys = {"hidden": [8, 8, 5], "residual": True, "norm": norm, "activation": activation}
    model = a_model("mlp", input_shape=(2, 3), **keys)
    inner = 2 if activation == "swiglu" else 1
    stem, last = linear_parameters(6, 8), linear_parameters(5, 3)
    blocks = sum(
        linear_parameters(before, inner * after) + linear_parameters(after, after)
        for before, after in [(8, 8), (8, 8), (8, 5)]
    )
    shortcut = 8 * 5  # of the block whose widths differ
    norms = 0 if norm == "none" else 2 * (8 + 8 + 8) + 2 * 5  # before each block, and at the end
    assert num_parameters(model) == stem + blocks + shortcut + norms + last
    assert model.eval()(torch.randn(2, 2, 3)).shape == (2, 3)


def test_a_residual_block_adds_to_its_input_what_it_computes_from_its_normed_input() -> None:
    model = a_model("mlp", input_shape=(4,), hidden=[6, 6], residual=True, norm="layer", activation="gelu")
    block, x = model[0].blocks[1], torch.randn(3, 6)
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, correction=0)
    normed = (x - mean) / torch.sqrt(variance + 1e-5)
    _, first, _, second = block.inside
    inside = F.gelu(normed @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(block(x), x + inside)


def test_without_what_its_blocks_compute_a_residual_mlp_is_linear() -> None:
    model = a_model("mlp", input_shape=(4,), hidden=[6] * 12, residual=True)
    residual, last = model
    with torch.no_grad():
        for block in residual.blocks:
            block.inside[-1].weight.zero_()
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), last(residual.stem(x)))


# ---------------------------------------------------------------- first weights

GAINS = {
    "relu": math.sqrt(2),
    "leaky_relu": math.sqrt(2 / (1 + 0.01**2)),
    "gelu": math.sqrt(2),
    "silu": math.sqrt(2),
    "swiglu": math.sqrt(2),
    "tanh": 1.0,
    "sigmoid": 1.0,
}
FAN_IN, FAN_OUT = 300, 200


def assert_normal(weight: torch.Tensor, *, std: float) -> None:
    # The standard error of a standard deviation is std / sqrt(2 n); that of the mean std / sqrt(n).
    assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))
    assert weight.mean().item() == pytest.approx(0, abs=4 * std / math.sqrt(weight.numel()))
    beyond = (weight.abs() > 2 * std).double().mean().item()
    assert beyond == pytest.approx(0.0455, rel=0.1), "4.55 % of a normal distribution are beyond two deviations"


@pytest.mark.parametrize("activation", GAINS)
@pytest.mark.parametrize("init", ["auto", "kaiming", "xavier"])
def test_first_weights_have_the_standard_deviation_of_the_closed_form(init: str, activation: str) -> None:
    model = a_model("mlp", input_shape=(FAN_IN,), hidden=[FAN_OUT], activation=activation, init=init, num_outputs=400)
    first, last = model[0], model[-1]
    kaiming, xavier = GAINS[activation] / math.sqrt(FAN_IN), math.sqrt(2 / (FAN_IN + FAN_OUT))
    is_xavier = init == "xavier" or (init == "auto" and activation in ("tanh", "sigmoid"))
    assert_normal(first.weight, std=xavier if is_xavier else kaiming)
    # What comes after the last layer is no activation: a gain of 1.
    assert_normal(last.weight, std=math.sqrt(2 / (FAN_OUT + 400)) if init == "xavier" else 1 / math.sqrt(FAN_OUT))
    assert not first.bias.any()
    assert not last.bias.any()


@pytest.mark.parametrize("activation", GAINS)
def test_a_shortcut_between_widths_carries_its_input_at_its_size(activation: str) -> None:
    keys: dict[str, Any] = {"hidden": [FAN_IN, FAN_OUT], "activation": activation, "residual": True}
    model = a_model("mlp", input_shape=(7,), **keys)
    assert_normal(model[0].blocks[1].shortcut.weight, std=1 / math.sqrt(FAN_IN))


def test_the_gain_before_leaky_relu_has_its_slope() -> None:
    found = weight_std("kaiming", followed_by="leaky_relu", fan_in=FAN_IN, fan_out=FAN_OUT)
    assert found == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.01) / math.sqrt(FAN_IN), rel=1e-12)


def test_first_weights_of_convolutions_count_the_places_under_the_kernel() -> None:
    model = a_model("cnn", input_shape=(3, 8, 8), channels=[256, 128], init="kaiming")
    assert_normal(model[0].weight, std=math.sqrt(2 / (3 * 9)))
    assert_normal(model[3].weight, std=math.sqrt(2 / (256 * 9)))
    model = a_model("cnn", input_shape=(3, 8, 8), channels=[256, 128], activation="tanh")
    assert_normal(model[3].weight, std=math.sqrt(2 / ((256 + 128) * 9)))


def test_kaiming_carries_a_signal_through_relu_layers_where_xavier_halves_its_square_in_each() -> None:
    # He et al. 2015, equation 10. From one seed come the same numbers, so in layers of one width the ratio is exact.
    x = torch.randn(256, 128)
    squares = []
    for init in ("kaiming", "xavier"):
        model = a_model("mlp", input_shape=(128,), num_outputs=128, hidden=[128] * 20, init=init)
        squares.append(model(x).square().mean().item())
    assert 0.25 < squares[0] < 4
    assert squares[1] == pytest.approx(squares[0] / 2**20, rel=1e-3)


# ---------------------------------------------------------------- cnn


@unhurried
@given(
    channels=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    hidden=st.lists(st.integers(1, 5), max_size=2),
    shape=st.tuples(st.integers(1, 3), st.integers(8, 20), st.integers(8, 20)),
    norm=st.sampled_from(["none", "batch", "layer"]),
)
def test_a_cnn_has_the_parameters_and_the_output_of_its_formula(
    channels: list[int], hidden: list[int], shape: tuple[int, int, int], norm: str
) -> None:
    model = a_model("cnn", input_shape=shape, channels=channels, hidden=hidden, norm=norm)
    # A 3x3 kernel has 9 weights for each pair of channels; each pooling halves H and W, rounded down.
    convolutions = sum(9 * before * after + after for before, after in pairwise([shape[0], *channels]))
    norms = 0 if norm == "none" else 2 * sum(channels)
    flat = channels[-1] * (shape[1] // 2 ** len(channels)) * (shape[2] // 2 ** len(channels))
    assert num_parameters(model) == convolutions + norms + mlp_parameters([flat, *hidden, 3], norm=norm)
    assert model.eval()(torch.randn(2, *shape)).shape == (2, 3)


def test_a_cnn_is_torchs_layers_of_the_same_seed_bit_for_bit() -> None:
    found = a_model("cnn", input_shape=(1, 28, 28), num_outputs=10, channels=[4, 8], hidden=[16], init="torch")
    torch.manual_seed(5)
    wanted = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )
    assert_same_bits(found, wanted, torch.randn(2, 1, 28, 28))


@pytest.mark.parametrize("shape", [(784,), (28, 28)])
def test_a_cnn_refuses_rows_that_are_not_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model.kind: cnn wants images .* shape \(.*; use model.kind=mlp"):
        a_model("cnn", input_shape=shape, channels=[4])


@pytest.mark.parametrize("shape", [(1, 7, 28), (1, 28, 7)])
def test_a_cnn_refuses_as_many_poolings_as_leave_nothing(shape: tuple[int, ...]) -> None:
    # 7 // 2 // 2 = 1 is left of two poolings, 0 of three.
    assert a_model("cnn", input_shape=shape, channels=[2, 2])(torch.randn(1, *shape)).shape == (1, 3)
    with pytest.raises(ConfigError, match=rf"model.channels: 3 poolings leave nothing of .* {shape[1]}x{shape[2]}"):
        a_model("cnn", input_shape=shape, channels=[2, 2, 2])


def test_a_cnn_has_the_activation_of_its_config_and_a_norm_over_each_whole_image() -> None:
    model = a_model("cnn", input_shape=(3, 8, 8), channels=[4], hidden=[5], norm="layer", activation="silu")
    wanted = [nn.Conv2d, nn.GroupNorm, nn.SiLU, nn.MaxPool2d, nn.Flatten, nn.Linear, nn.LayerNorm, nn.SiLU, nn.Linear]
    assert [type(layer) for layer in model.children()] == wanted
    normed = model[:2](torch.randn(2, 3, 8, 8))  # (2, 4, 8, 8)
    assert normed.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-6)


# ---------------------------------------------------------------- residual cnn


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_a_residual_cnn_has_the_parameters_of_its_formula(norm: str) -> None:
    model = a_model("cnn", input_shape=(3, 9, 9), channels=[4, 8], hidden=[], residual=True, norm=norm)
    has_bias = norm == "none"
    stem, first, second = 9 * 3 * 4, 2 * 9 * 4 * 4, 9 * 4 * 8 + 9 * 8 * 8 + 4 * 8  # the last is the shortcut
    outputs = 4 + (4 + 4) + (8 + 8 + 8)  # of all convolutions: a bias each, or a scale and a shift
    assert num_parameters(model) == stem + first + second + outputs * (1 if has_bias else 2) + (8 * 3 + 3)
    assert model.eval()(torch.randn(2, 3, 9, 9)).shape == (2, 3)


def test_the_fully_connected_layers_of_a_residual_cnn_are_plain_ones_on_the_mean_of_the_image() -> None:
    model = a_model("cnn", input_shape=(3, 9, 9), channels=[4], hidden=[5, 6], residual=True, dropout=0.25)
    hidden = [nn.Linear, nn.ReLU, nn.Dropout]
    *_, pool, flat = list(model.children())[:-7]
    assert (type(pool), type(flat)) == (nn.AdaptiveAvgPool2d, nn.Flatten)
    assert [type(layer) for layer in list(model.children())[-7:]] == [*hidden, *hidden, nn.Linear]
    h = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(flat(pool(h)), h.mean(dim=(2, 3)))


def test_every_block_of_a_residual_cnn_but_the_first_halves_the_image() -> None:
    model = a_model("cnn", input_shape=(1, 9, 9), channels=[2, 3, 4], residual=True, norm="batch")
    shapes = []
    for layer in model.children():
        if type(layer).__name__ == "ResidualBlock":
            layer.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    model(torch.randn(5, 1, 9, 9))
    assert shapes == [(5, 2, 9, 9), (5, 3, 5, 5), (5, 4, 3, 3)]


def test_a_residual_block_of_images_adds_its_input() -> None:
    block = a_model("cnn", input_shape=(3, 6, 6), channels=[4], residual=True)[2]
    x = torch.randn(2, 4, 6, 6)
    first, _, second = block.inside
    wanted = F.relu(x + F.conv2d(F.relu(F.conv2d(x, first.weight, padding=1)), second.weight, padding=1))
    torch.testing.assert_close(block(x), wanted)  # biases start at 0


# ---------------------------------------------------------------- batch norm


@pytest.mark.parametrize(
    ("kind", "keys", "norms"),
    [("mlp", {}, ["2", "5"]), ("cnn", {"channels": [2]}, ["6", "9"])],
)
def test_batch_norm_is_an_option_of_every_hidden_layer(kind: str, keys: dict[str, Any], norms: list[str]) -> None:
    with_norms = a_model(kind, input_shape=(1, 4, 4), hidden=[5, 5], norm="batch", **keys)
    without = a_model(kind, input_shape=(1, 4, 4), hidden=[5, 5], **keys)
    assert batch_norms(without, lambda: without(torch.zeros(1, 1, 4, 4))) == []
    assert batch_norms(with_norms, lambda: with_norms(torch.zeros(1, 1, 4, 4))) == norms
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in with_norms.modules()) == (kind == "cnn")


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        ((1, 4, 4), {"channels": [2], "hidden": [5]}),
        ((1, 4, 4), {"channels": [2, 3, 4], "hidden": [], "residual": True}),  # 4x4, 2x2, 1x1
        ((3, 1, 1), {"channels": [2], "hidden": [5], "residual": True}),
    ],
    ids=["hidden", "images-of-1x1", "rows-of-1x1"],
)
def test_the_layers_named_as_unable_to_train_on_one_row_are_those_that_torch_refuses(
    shape: tuple[int, ...], keys: dict[str, Any]
) -> None:
    model = a_model("cnn", input_shape=shape, norm="batch", **keys)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = batch_norms(model, lambda: model(torch.zeros(1, *shape)))
    assert names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    refused = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda module, x, name=name: refused.append((name, module, x[0])))
    model.eval()(torch.randn(1, *shape))
    for name, layer, x in refused:
        layer.train()
        if name in names:
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                F.batch_norm(x, None, None, training=True)
        else:
            F.batch_norm(x, None, None, training=True)

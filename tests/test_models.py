"""Networks: as many parameters as the formulas say, torch's own layers bit for bit, and refusals of what cannot be."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn

from harness.config.models import Model
from harness.errors import ConfigError
from harness.models.registry import batch_norms, build_model
from tests.test_order import unhurried

PARSER: TypeAdapter[Model] = TypeAdapter(Model)


def a_model(kind: str, *, input_shape: tuple[int, ...], num_outputs: int = 3, **keys: Any) -> nn.Module:
    torch.manual_seed(5)
    return build_model(PARSER.validate_python({"kind": kind, **keys}), input_shape=input_shape, num_outputs=num_outputs)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def mlp_parameters(widths: list[int], *, norm: str) -> int:
    """Each layer has in x out weights and out biases; each norm of a hidden layer a scale and a shift per channel."""
    linear = sum(before * after + after for before, after in pairwise(widths))
    return linear + (2 * sum(widths[1:-1]) if norm == "batch" else 0)


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
    st.sampled_from(["none", "batch"]),
)
def test_an_mlp_has_the_parameters_of_its_formula(
    hidden: list[int], input_shape: list[int], num_outputs: int, norm: str
) -> None:
    model = a_model("mlp", input_shape=tuple(input_shape), num_outputs=num_outputs, hidden=hidden, norm=norm)
    assert num_parameters(model) == mlp_parameters([prod(input_shape), *hidden, num_outputs], norm=norm)
    assert model.eval()(torch.randn(2, *input_shape)).shape == (2, num_outputs)


@pytest.mark.parametrize(
    ("activation", "layer"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid)]
)
def test_an_mlp_is_torchs_sequential_of_the_same_seed_bit_for_bit(activation: str, layer: type[nn.Module]) -> None:
    found = a_model("mlp", input_shape=(10,), num_outputs=1, hidden=[64, 7], activation=activation)
    torch.manual_seed(5)
    wanted = nn.Sequential(nn.Linear(10, 64), layer(), nn.Linear(64, 7), layer(), nn.Linear(7, 1))
    assert_same_bits(found, wanted, torch.randn(4, 10))


def test_every_hidden_layer_has_its_norm_before_the_activation_and_dropout_after_it() -> None:
    model = a_model("mlp", input_shape=(2, 3), hidden=[4, 5], norm="batch", dropout=0.25)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in model.children()] == [nn.Flatten, *hidden, *hidden, nn.Linear]
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.25}


# ---------------------------------------------------------------- cnn


@unhurried
@given(
    channels=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    hidden=st.lists(st.integers(1, 5), max_size=2),
    shape=st.tuples(st.integers(1, 3), st.integers(8, 20), st.integers(8, 20)),
    norm=st.sampled_from(["none", "batch"]),
)
def test_a_cnn_has_the_parameters_and_the_output_of_its_formula(
    channels: list[int], hidden: list[int], shape: tuple[int, int, int], norm: str
) -> None:
    model = a_model("cnn", input_shape=shape, channels=channels, hidden=hidden, norm=norm)
    # A 3x3 kernel has 9 weights for each pair of channels; each pooling halves H and W, rounded down.
    convolutions = sum(9 * before * after + after for before, after in pairwise([shape[0], *channels]))
    norms = 2 * sum(channels) if norm == "batch" else 0
    flat = channels[-1] * (shape[1] // 2 ** len(channels)) * (shape[2] // 2 ** len(channels))
    assert num_parameters(model) == convolutions + norms + mlp_parameters([flat, *hidden, 3], norm=norm)
    assert model.eval()(torch.randn(2, *shape)).shape == (2, 3)


def test_a_cnn_is_torchs_layers_of_the_same_seed_bit_for_bit() -> None:
    found = a_model("cnn", input_shape=(1, 28, 28), num_outputs=10, channels=[4, 8], hidden=[16])
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


# ---------------------------------------------------------------- batch norm


@pytest.mark.parametrize(
    ("kind", "keys", "norms"),
    [("mlp", {}, ["2", "5"]), ("cnn", {"channels": [2]}, ["3.2", "3.5"])],
)
def test_batch_norm_is_an_option_of_every_hidden_layer(kind: str, keys: dict[str, Any], norms: list[str]) -> None:
    with_norms = a_model(kind, input_shape=(1, 4, 4), hidden=[5, 5], norm="batch", **keys)
    without = a_model(kind, input_shape=(1, 4, 4), hidden=[5, 5], **keys)
    assert batch_norms(without) == []
    assert len(batch_norms(with_norms)) == len(norms)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in with_norms.modules()) == (kind == "cnn")


def test_the_layers_named_as_unable_to_train_on_one_row_are_those_that_torch_refuses() -> None:
    model = a_model("cnn", input_shape=(1, 4, 4), channels=[2], hidden=[5], norm="batch")
    one_row = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(one_row)
    for name in batch_norms(model):
        model.get_submodule(name).eval()
    model(one_row)

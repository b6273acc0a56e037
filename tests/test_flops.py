"""What share of its device's peak a run uses, from the operations of the network and the name of the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.catalogue.gpt.section import Experts, GptModel
from harness.watch.flops import training_flops_per_row
from harness.watch.peak_flops import peak_flops
from tests.gpt_sizes import forward_flops_per_token
from tests.pairs import pair
from tests.sections import build_model, parsed
from tests.tiny_models import write_model


def flops(model: nn.Module, row: torch.Tensor) -> float:
    """Of a row, counted on two."""
    rows = row.expand(2, *row.shape[1:])
    rows = rows if rows.is_floating_point() else rows.long()
    return training_flops_per_row(model, lambda network, data: network(data["inputs"]), pair(rows))


def built(shape: tuple[int, ...], num_outputs: int, **model: Any) -> nn.Module:
    return build_model(parsed("model", model), input_shape=shape, num_outputs=num_outputs)


@pytest.mark.parametrize("form", [{}, {"activation": "swiglu", "norm": "rms", "tied_embeddings": False}])
def test_a_gpt_has_the_operations_of_the_closed_form(form: dict[str, Any]) -> None:
    layers, width, T, V = 3, 32, 16, 50
    model = built((T,), V, kind="gpt", layers=layers, width=width, heads=4, dropout=0.1, **form)
    looked_up = {"places.weight"} if model.head.weight is model.tokens.weight else {"places.weight", "tokens.weight"}
    multiplied = [p for name, p in model.named_parameters() if p.dim() == 2 and name not in looked_up]
    # Kaplan et al. 2020, arXiv:2001.08361: 6 a weight and token, and the products of queries, keys and values.
    wanted = 6 * sum(p.numel() for p in multiplied) * T + 12 * layers * width * T * T
    assert flops(model, torch.zeros(1, T, dtype=torch.int32)) == wanted


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_have_the_operations_of_the_closed_form_though_their_router_looks_at_its_numbers(top_k: int) -> None:
    T, V = 16, 50
    config = GptModel(kind="gpt", layers=3, width=32, heads=4, experts=Experts(count=4, top_k=top_k))
    model = build_model(config, input_shape=(T,), num_outputs=V)
    wanted = 3 * T * forward_flops_per_token(config, context=T, num_tokens=V)
    assert flops(model, torch.zeros(1, T, dtype=torch.int32)) == wanted


def test_a_network_with_batch_norm_is_counted_by_hand_and_left_as_it_was() -> None:
    model = built((10,), 3, kind="mlp", hidden=[8], norm="batch", dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    # Forward 2 a weight; backward as many for the weights' gradients, and for the inputs' but those of the first layer.
    assert flops(model, torch.zeros(1, 10)) == 2 * (10 * 8 + 8 * 3) * 2 + 2 * 8 * 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_convolution_is_a_product_at_every_pixel() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Flatten())
    # Forward and weights' gradients, 2 operations a weight and pixel each.
    assert flops(model, torch.zeros(1, 2, 8, 8)) == 2 * 2 * (4 * 2 * 9) * 64


def test_weights_that_are_not_trained_have_no_gradient_to_count() -> None:
    model = built((10,), 3, kind="mlp", hidden=[8])
    next(module for module in model.modules() if isinstance(module, nn.Linear)).requires_grad_(False)
    assert flops(model, torch.zeros(1, 10)) == 2 * (10 * 8 + 8 * 3) + 2 * 8 * 3


class LooksAtItsNumbers(nn.Sequential):
    """Cannot run on tensors without storage."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.sum().item() == x.sum().item()
        outputs: torch.Tensor = super().forward(x)
        return outputs


def test_a_network_that_looks_at_its_numbers_is_counted_in_passing() -> None:
    layers = [nn.Linear(10, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3)]
    model = LooksAtItsNumbers(*layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    wanted = flops(nn.Sequential(*layers), torch.ones(1, 10))
    assert flops(model, torch.ones(1, 10)) == wanted > 0
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_network_that_keeps_an_output_with_its_graph_is_counted() -> None:
    class Keeps(nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            self.kept = super().forward(rows)
            return self.kept

    model = Keeps(10, 3)
    model(torch.ones(2, 10))  # as the look at the start does; such a tensor cannot be copied
    assert flops(model, torch.ones(1, 10)) == flops(nn.Linear(10, 3), torch.ones(1, 10))


def test_a_pretrained_network_is_counted_and_its_frozen_weights_cost_less(tmp_path: Path) -> None:
    ids = torch.ones(1, 6, dtype=torch.int64)
    path = str(write_model(tmp_path / "bert"))
    whole, adapted = (
        flops(built((6,), 2, kind="pretrained", path=path, **keys), ids) for keys in ({}, {"lora": {"rank": 1}})
    )
    assert 0 < adapted < whole


@pytest.mark.parametrize(
    ("name", "precision", "allows_tf32", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", False, 19.5),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156),
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.5),
        ("NVIDIA H100 PCIe", "bf16", False, 756),
        ("NVIDIA H200", "fp64", False, 67),
        ("NVIDIA L40S", "bf16", False, 362),
        ("NVIDIA L4", "bf16", False, 121),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),  # it has no TF32
        ("Tesla V100-SXM2-16GB", "bf16", False, None),
        ("Tesla V100-SXM2-16GB", "fp16", False, 125),
        ("NVIDIA H100 80GB HBM3", "fp16", False, 989.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", False, None),
        ("NVIDIA A1000", "bf16", False, None),
        ("Abacus 3", "fp32", False, None),
    ],
)
def test_a_peak_is_that_of_the_device_that_is_named(
    name: str, precision: str, allows_tf32: bool, tera: float | None
) -> None:
    found = peak_flops(name, precision=precision, allows_tf32=allows_tf32)
    assert found == (None if tera is None else pytest.approx(tera * 1e12))

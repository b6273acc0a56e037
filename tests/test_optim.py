"""The optimizer: which parameters decay, and the arithmetic of torch's own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer

from harness.config.training import Optim
from harness.optim import build_optimizer, hidden_matrices, parameter_groups

PARSER: TypeAdapter[Optim] = TypeAdapter(Optim)
RATE = 1e-2


def a_network() -> nn.Sequential:
    torch.manual_seed(0)
    head = (nn.Linear(9, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 1))
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(9), *head).double()


def names_of(model: nn.Module, parameters: Any) -> set[str]:
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_identity[id(parameter)] for parameter in parameters}


def built(model: nn.Module, kind: str, **keys: Any) -> Optimizer:
    return build_optimizer(model, PARSER.validate_python({"kind": kind, "peak_lr": RATE, **keys}))


def updated(model: nn.Module, optimizer: Optimizer, *, num_updates: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_updates):
        inputs = torch.randn(8, 2, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


# ---------------------------------------------------------------- groups


def test_weights_decay_but_biases_and_norms_do_not() -> None:
    model = a_network()
    decayed, others = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert names_of(model, decayed["params"]) == {"0.weight", "3.weight", "6.weight"}
    biases, norms = {"0.bias", "3.bias", "6.bias"}, {"2.weight", "2.bias", "5.weight", "5.bias"}
    assert names_of(model, others["params"]) == biases | norms


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = a_network()
    grouped = [parameter for group in parameter_groups(model, weight_decay=0.1) for parameter in group["params"]]  # type: ignore[attr-defined]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_frozen_parameters_are_left_out_and_stay_as_they_are() -> None:
    model = a_network()
    model[0].requires_grad_(False)
    optimizer = built(model, "adamw", weight_decay=0.5)
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert names_of(model, model.parameters()) - {"0.weight", "0.bias"} == {
        name for name, parameter in model.named_parameters() if id(parameter) in grouped
    }
    before = model[0].weight.clone()
    updated(model, optimizer)
    assert torch.equal(model[0].weight, before)


def test_a_group_without_parameters_is_left_out() -> None:
    only_weights = nn.Linear(2, 2, bias=False)
    assert [group["weight_decay"] for group in parameter_groups(only_weights, weight_decay=0.1)] == [0.1]


def test_every_group_starts_at_the_peak_rate() -> None:
    optimizer = built(a_network(), "sgd", weight_decay=0.1)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [RATE, RATE]


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize(
    ("kind", "keys", "reference"),
    [
        ("adamw", {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}, AdamW),
        ("adam", {"betas": (0.8, 0.9), "eps": 1e-6}, Adam),
        ("sgd", {"weight_decay": 0.1}, SGD),
        ("sgd", {"weight_decay": 0.1, "momentum": 0.9}, SGD),
        ("sgd", {"momentum": 0.9, "nesterov": True}, SGD),
    ],
    ids=["adamw", "adam", "sgd", "momentum", "nesterov"],
)
def test_five_updates_are_those_of_torchs_unfused_class(kind: str, keys: dict[str, Any], reference: Any) -> None:
    model, plain = a_network(), a_network()
    decay = keys.get("weight_decay", 0.0)
    groups = [
        {"params": [parameter for parameter in plain.parameters() if parameter.dim() >= 2], "weight_decay": decay},
        {"params": [parameter for parameter in plain.parameters() if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    options = {name: value for name, value in keys.items() if name != "weight_decay"}
    wanted = updated(plain, reference(groups, lr=RATE, fused=False, foreach=False, **options))
    found = updated(model, built(model, kind, **keys))
    for left, right, start in zip(found, wanted, a_network().parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)  # fused kernels round in another order
        assert not torch.equal(left, start), "a comparison of what did not move proves nothing"


def test_adafactor_is_torchs_with_biases_and_norms_that_do_not_decay() -> None:
    model, plain = a_network(), a_network()
    groups = [
        {"params": [parameter for parameter in plain.parameters() if parameter.dim() >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in plain.parameters() if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    wanted = updated(plain, Adafactor(groups, lr=RATE, beta2_decay=-0.5, d=2.0))
    optimizer = built(model, "adafactor", weight_decay=0.1, beta2_decay=-0.5, clip_threshold=2.0)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    for left, right, start in zip(updated(model, optimizer), wanted, a_network().parameters(), strict=True):
        assert torch.equal(left, right)
        assert not torch.equal(left, start)


def test_muon_is_torchs_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    def a_text_network() -> nn.Sequential:
        torch.manual_seed(0)
        body = (nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
        return nn.Sequential(nn.Embedding(5, 6), *body, nn.Linear(6, 5, bias=False)).double()

    def trained(model: nn.Module, *optimizers: Optimizer) -> list[Tensor]:
        for update in range(5):
            model(torch.arange(5)).softmax(dim=1)[:, update].sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    model, plain = a_text_network(), a_text_network()
    assert names_of(model, hidden_matrices(model)) == {"1.weight", "3.weight"}
    hidden = [plain[1].weight, plain[3].weight]
    groups = [
        {"params": [plain[0].weight, plain[4].weight], "weight_decay": 0.2},
        {"params": [plain[1].bias, plain[2].weight, plain[2].bias, plain[3].bias], "weight_decay": 0.0},
    ]
    muon = Muon(hidden, lr=RATE, weight_decay=0.2, momentum=0.9, nesterov=False, adjust_lr_fn="match_rms_adamw")
    wanted = trained(plain, muon, AdamW(groups, lr=RATE, betas=(0.8, 0.9), fused=False, foreach=False))
    keys = {"weight_decay": 0.2, "momentum": 0.9, "nesterov": False, "betas": (0.8, 0.9)}
    optimizer = built(model, "muon", **keys)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    for left, right, start in zip(trained(model, optimizer), wanted, a_text_network().parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
        assert not torch.equal(left, start)


def test_an_output_layer_that_is_tied_to_the_embedding_is_no_hidden_matrix() -> None:
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 5, bias=False))
    model[2].weight = model[0].weight
    assert names_of(model, hidden_matrices(model)) == {"1.weight"}


def test_a_network_without_hidden_matrices_is_adamws_under_muon() -> None:
    optimizer = built(nn.Linear(3, 2), "muon")
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_the_rate_that_the_loop_sets_is_that_of_every_parameter(kind: str) -> None:
    model = a_network()
    optimizer = built(model, kind, weight_decay=0.0)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0, dtype=torch.float64)
    for left, right in zip(updated(model, optimizer), a_network().parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "adafactor", "muon"])
def test_an_update_that_found_inf_changes_nothing(kind: str) -> None:
    model = a_network()
    optimizer = built(model, kind)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    for left, right in zip(updated(model, optimizer), a_network().parameters(), strict=True):
        assert torch.equal(left, right)

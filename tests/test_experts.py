"""Mixtures of experts: against a loop over tokens, against the dense net, and the loss that evens out their load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.catalogue.gpt.experts import MixtureOfExperts
from harness.catalogue.gpt.network import FeedForward
from harness.catalogue.gpt.section import Experts, GptModel
from tests.test_gpt import a_config, a_gpt, some_ids

WIDTH = 16


def some_experts(count: int = 4, **keys: Any) -> MixtureOfExperts:
    activation = keys.pop("activation", "gelu")
    config = a_config(width=WIDTH, activation=activation, experts={"count": count, **keys})
    torch.manual_seed(2)
    assert config.experts is not None
    experts = MixtureOfExperts(config, config.experts)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def token_by_token(experts: MixtureOfExperts, x: Tensor, *, top_k: int, activation: str) -> Tensor:
    """The definition: every token alone, every chosen expert alone."""
    outputs = []
    for token in x.flatten(0, -2):
        probabilities = F.softmax(experts.router.weight @ token, dim=0)
        chosen = sorted(range(len(probabilities)), key=lambda e: -probabilities[e].item())[:top_k]
        total = probabilities[chosen].sum() if top_k > 1 else 1.0
        mixed = torch.zeros(WIDTH)
        for e in chosen:
            hidden = experts.up[e].T @ token
            if activation == "swiglu":
                half = len(hidden) // 2
                hidden = hidden[:half] * F.silu(hidden[half:])
            else:
                hidden = F.gelu(hidden)
            mixed = mixed + probabilities[e] / total * (experts.down[e].T @ hidden)
        outputs.append(mixed)
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(top_k: int, activation: str) -> None:
    experts = some_experts(top_k=top_k, activation=activation)
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    seed = torch.randn(3, 5, WIDTH)
    found, wanted = experts(x), token_by_token(experts, x, top_k=top_k, activation=activation)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    inputs = [x, *experts.parameters()]
    gradients = [torch.autograd.grad(outputs, inputs, seed) for outputs in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert gradients[0][1].abs().max() > 1e-3, "the router learns from what the experts give"


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_equal_experts_that_are_all_chosen_are_the_dense_net(activation: str) -> None:
    experts, dense = some_experts(top_k=4, activation=activation), FeedForward(a_config(activation=activation))
    with torch.no_grad():
        dense.up.weight.copy_(experts.up[0].T)
        dense.down.weight.copy_(experts.down[0].T)
        experts.up.copy_(experts.up[0].clone())
        experts.down.copy_(experts.down[0].clone())
    x = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(experts(x), dense(x), rtol=1e-5, atol=1e-5)


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    experts = some_experts(count=5, top_k=1)
    x = torch.randn(4, WIDTH).abs()
    with torch.no_grad():
        experts.router.weight.fill_(-1.0)[3] = 1.0  # every token of positive numbers goes to the fourth
    experts(x).square().sum().backward()
    for weights in (experts.up, experts.down):
        assert weights.grad is not None
        assert [bool(gradient.any()) for gradient in weights.grad] == [False, False, False, True, False]


def penalty_of(experts: MixtureOfExperts, x: Tensor) -> float:
    experts(x)
    assert experts.penalty is not None
    return experts.penalty.item()


def test_the_penalty_is_equation_4_of_the_switch_transformer() -> None:
    experts = some_experts(top_k=1, load_balance=0.3)
    x = torch.randn(50, WIDTH)
    probabilities = F.softmax(x @ experts.router.weight.T, dim=-1)
    share = [sum(row.argmax().item() == e for row in probabilities) / 50 for e in range(4)]
    wanted = 0.3 * 4 * sum(share[e] * probabilities[:, e].mean().item() for e in range(4))
    assert penalty_of(experts, x) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_penalty_is_least_where_all_experts_get_as_many_tokens(top_k: int) -> None:
    experts = some_experts(top_k=top_k, load_balance=0.3)
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.router.weight[:, :4] = torch.eye(4)
    even, uneven = torch.zeros(4, WIDTH), torch.zeros(4, WIDTH)
    even[:, :4] = torch.eye(4) + 0.5 * torch.eye(4).roll(1, dims=0)  # each prefers one, and another next
    uneven[:, 0] = 1.0
    assert penalty_of(experts, even) == pytest.approx(0.3)
    assert penalty_of(experts, uneven) > 0.31


def test_the_penalty_is_of_training_and_of_all_blocks() -> None:
    network = a_gpt(a_config(experts={"count": 4, "load_balance": 0.3}))
    assert network.penalty() is None
    network(some_ids)
    total = network.penalty()
    assert total is not None
    assert total.item() == pytest.approx(sum(block.feed_forward.penalty.item() for block in network.blocks))
    network.eval()
    network(some_ids)
    assert network.penalty() is None
    dense = a_gpt(a_config())
    dense(some_ids)
    assert dense.penalty() is None


def test_bf16_chooses_the_experts_that_fp32_chooses() -> None:
    experts = some_experts(top_k=2)
    x = torch.randn(200, WIDTH)
    _, wanted, _ = experts._route(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates, chosen, _ = experts._route(x)
        outputs = experts(x)
    assert torch.equal(chosen, wanted)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(outputs, experts(x), rtol=0.05, atol=0.05)


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k: 5 is more than the 4 experts; use 4 or less"):
        Experts(count=4, top_k=5)
    assert GptModel.model_validate(a_config().model_dump()).experts is None


def test_the_penalty_evens_out_the_load() -> None:
    experts = some_experts(top_k=1, load_balance=1.0)
    x = torch.randn(200, WIDTH) + 1
    with torch.no_grad():
        experts.router.weight[0] += 0.3  # a favourite at the beginning
    optimizer = torch.optim.Adam(experts.parameters(), lr=0.02)
    before = penalty_of(experts, x)
    for _ in range(100):
        experts(x)
        assert experts.penalty is not None
        optimizer.zero_grad()
        experts.penalty.backward()
        optimizer.step()
    _, chosen, _ = experts._route(x)
    assert before > 2
    assert max(chosen.flatten().bincount()) < 200 / 4 * 1.5

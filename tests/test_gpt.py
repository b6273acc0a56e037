"""Decoder-only Transformers: parameters and operations by formula, causal to the bit, GPT-2's first weights."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.catalogue.gpt.network import Attention, Gpt, attended
from harness.catalogue.gpt.section import GptModel
from harness.optim import parameter_groups
from tests.gpt_sizes import forward_flops_per_token, num_parameters
from tests.sections import build_model
from tests.test_order import unhurried

FORMS: list[dict[str, Any]] = [
    {},
    {"norm": "rms"},
    {"activation": "swiglu"},
    {"tied_embeddings": False},
    {"experts": {"count": 4, "top_k": 2}},
    {"experts": {"count": 3, "top_k": 1}, "activation": "swiglu"},
    {"positions": "rotary"},
    {"ngrams": {"rows": 7, "longest": 4}},
    {"norm": "rms", "activation": "swiglu", "tied_embeddings": False, "layers": 3},
]


def a_config(**keys: Any) -> GptModel:
    return GptModel.model_validate({"kind": "gpt", "layers": 2, "width": 16, "heads": 4, **keys})


def a_gpt(config: GptModel, *, context: int = 8, num_tokens: int = 11) -> Gpt:
    torch.manual_seed(5)
    network = build_model(config, input_shape=(context,), num_outputs=num_tokens)
    assert isinstance(network, Gpt)
    return network


some_ids = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))


@unhurried
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6]),
    st.sampled_from(FORMS[:8]),
)
def test_a_gpt_has_the_parameters_of_its_formula(
    layers: int, heads: int, head_width: int, form: dict[str, Any]
) -> None:
    config = a_config(layers=layers, heads=heads, width=heads * head_width, **form)
    network = a_gpt(config, context=5, num_tokens=7)
    found = sum(parameter.numel() for parameter in network.parameters())
    assert found == num_parameters(config, context=5, num_tokens=7)


def test_the_formula_gives_gpt_2_its_124_million_parameters() -> None:
    # 124,439,808 with biases (Radford et al. 2019, "117M"): each layer has 4 w + 4 w + w + 2 w of them, the norm w.
    config = a_config(layers=12, width=768, heads=12)
    biases = 12 * (3 + 1 + 4 + 1 + 2) * 768 + 768
    assert num_parameters(config, context=1024, num_tokens=50257) + biases == 124_439_808


@pytest.mark.parametrize("form", FORMS)
def test_a_token_costs_the_operations_of_the_formula_and_training_three_times_as_many(form: dict[str, Any]) -> None:
    config = a_config(**form)
    network = a_gpt(config)
    forward = FlopCounterMode(display=False)
    everything = FlopCounterMode(display=False)
    # The CPU's fused attention is no operation that the counter knows; the plain one is two products of matrices.
    with sdpa_kernel(SDPBackend.MATH):
        with forward:
            network(some_ids)
        with everything:
            network(some_ids).sum().backward()
    wanted = forward_flops_per_token(config, context=8, num_tokens=11) * some_ids.numel()
    assert forward.get_total_flops() == wanted
    assert everything.get_total_flops() == 3 * wanted


@pytest.mark.parametrize("form", FORMS)
def test_no_logit_depends_on_a_later_token(form: dict[str, Any]) -> None:
    network = a_gpt(a_config(**form)).eval()
    before = network(some_ids)
    for place in range(1, 8):
        changed = some_ids.clone()
        changed[:, place:] = (changed[:, place:] + 1) % 11
        after = network(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-6)
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("form", FORMS)
def test_a_shorter_text_gives_the_first_logits_of_a_longer_one(form: dict[str, Any]) -> None:
    network = a_gpt(a_config(**form)).eval()
    torch.testing.assert_close(network(some_ids[:, :3]), network(some_ids)[:, :3], rtol=0, atol=1e-6)


def test_attention_is_that_of_torchs_own_layer() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(a_config()), nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.queries_keys_values.weight)
        theirs.out_proj.weight.copy_(ours.out.weight)
    x = torch.randn(3, 8, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    wanted, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(ours(x), wanted)


def test_attention_on_cpus_is_in_single_precision_where_autocast_has_half() -> None:
    q, k, v = torch.randn(3, 2, 4, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attended(q, k, v, dropout=0.0), wanted)
        assert torch.equal(attended(q.float(), k.float(), v, dropout=0.0), wanted), "as rotary positions leave them"


def test_swiglu_is_a_product_with_a_silu() -> None:
    config = a_config(activation="swiglu")
    assert config.hidden_width == 48, "8/3 of 16 is 42.7, the next multiple of 8 is 48"
    feed_forward = a_gpt(config).blocks[0].feed_forward
    x = torch.randn(2, 3, 16)
    value, gate = feed_forward.up.weight.split(48)
    wanted = ((x @ value.T) * F.silu(x @ gate.T)) @ feed_forward.down.weight.T
    torch.testing.assert_close(feed_forward(x), wanted)


@pytest.mark.parametrize(("tied", "experts"), [(True, None), (False, None), (True, {"count": 4})])
def test_the_first_weights_are_gpt_2s(tied: bool, experts: dict[str, int] | None) -> None:
    config = a_config(layers=8, width=128, tied_embeddings=tied, experts=experts)
    network = a_gpt(config, context=256, num_tokens=300)
    assert (network.head.weight is network.tokens.weight) is tied
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        std = 0.02 / sqrt(2 * 8) if name.removesuffix(".weight").endswith(("out", "down")) else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(parameter.mean().item()) < 4 * std / sqrt(parameter.numel()), name


def test_weights_decay_and_norms_do_not() -> None:
    network = a_gpt(a_config())
    decayed, others = parameter_groups(network, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    norms = {name for name in names.values() if "norm" in name}
    assert {names[id(p)] for p in others["params"]} == norms
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - norms


def test_dropout_is_for_training_only() -> None:
    network = a_gpt(a_config(dropout=0.5))
    assert not torch.equal(network(some_ids), network(some_ids))
    network.eval()
    assert torch.equal(network(some_ids), network(some_ids))
    assert network.blocks[0].attention._dropout == 0.5


@pytest.mark.parametrize("experts", [None, {"count": 3, "top_k": 2}])
@pytest.mark.parametrize(
    "place", ["dropout", "blocks.1.attention", "blocks.1.attention.dropout", "blocks.1.feed_forward.dropout"]
)
def test_dropout_is_of_the_embeddings_in_the_attention_and_at_the_end_of_each_branch(
    place: str, experts: dict[str, int] | None
) -> None:
    network = a_gpt(a_config(dropout=0.5, experts=experts))

    def keep_all_but(names: list[str]) -> None:
        for name, module in network.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5 if name in names else 0.0
            if isinstance(module, Attention):
                module._dropout = 0.5 if name in names else 0.0

    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            keep_all_but([])
            assert torch.equal(network(some_ids), network(some_ids))
            keep_all_but([place])
            assert not torch.equal(network(some_ids), network(some_ids))

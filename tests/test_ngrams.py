"""Embeddings of n-grams: a vector for the last tokens together, none for what was never seen, and rows by a hash."""

from __future__ import annotations

import itertools

import pytest
import torch

from harness.catalogue.gpt.ngrams import MODULUS, MULTIPLIER, NgramEmbedding
from harness.catalogue.gpt.section import Ngrams
from harness.optim import hidden_matrices
from tests.test_gpt import a_config, a_gpt, some_ids

V = 11


def an_embedding(*, rows: int = 997, longest: int = 3) -> NgramEmbedding:
    embedding = NgramEmbedding(Ngrams(rows=rows, longest=longest), width=4, num_tokens=V)
    torch.manual_seed(7)
    for table in embedding.tables:
        torch.nn.init.normal_(table.weight)
    return embedding


def test_a_place_has_the_vectors_of_the_two_and_three_tokens_that_end_there() -> None:
    embedding = an_embedding()
    found = embedding(some_ids)
    for row, place in itertools.product(range(3), range(8)):
        ids = [V, V, *some_ids[row, : place + 1].tolist()]
        pair = (ids[-1] * MULTIPLIER + ids[-2]) % MODULUS
        triple = (pair * MULTIPLIER + ids[-3]) % MODULUS
        wanted = embedding.tables[0].weight[pair % 997] + embedding.tables[1].weight[triple % 997]
        assert torch.equal(found[row, place], wanted)


@pytest.mark.parametrize("longest", [2, 3])
def test_all_runs_of_tokens_spread_over_a_table(longest: int) -> None:
    all_runs = torch.cartesian_prod(*[torch.arange(V)] * longest)  # (V^n, n)
    rows = an_embedding(rows=64, longest=longest).rows(all_runs)[-1][:, -1]
    counts = rows.bincount(minlength=64)
    expected = len(all_runs) / 64
    assert counts.min() > expected / 4
    assert counts.max() < 4 * expected


def test_no_two_different_runs_share_a_row_that_they_need_not_share() -> None:
    all_runs = torch.cartesian_prod(*[torch.arange(V)] * 3)
    rows = an_embedding(rows=10**7).rows(all_runs)
    assert [len(row[:, -1].unique()) for row in rows] == [V**2, V**3]


def test_what_was_never_seen_adds_nothing() -> None:
    embedding = NgramEmbedding(Ngrams(rows=997), width=4, num_tokens=V)
    embedding(some_ids[:1]).sum().backward()
    with torch.no_grad():
        for table in embedding.tables:
            table.weight -= table.weight.grad
    seen = {tuple(pair) for pair in itertools.pairwise(some_ids[0].tolist())}
    found = embedding(some_ids)[1:, 1:]  # the places before have nothing before them, as those of row 0
    is_new = [[tuple(pair) not in seen for pair in itertools.pairwise(row.tolist())] for row in some_ids[1:]]
    assert torch.equal((found == 0).all(dim=-1), torch.tensor(is_new))
    assert sum(map(sum, is_new)) > 0


def test_a_gpt_adds_them_to_its_tokens() -> None:
    plain, network = a_gpt(a_config()), a_gpt(a_config(ngrams={"rows": 50}))
    assert torch.equal(network(some_ids), plain(some_ids)), "they start as zeros, and change no other first weight"
    assert network.ngrams is not None
    given = torch.randn(3, 8, 16)
    network.ngrams.register_forward_hook(lambda *_: given)
    plain.tokens.register_forward_hook(lambda _, __, vectors: vectors + given)
    torch.testing.assert_close(network(some_ids), plain(some_ids))
    assert not torch.equal(network(some_ids), a_gpt(a_config())(some_ids))


def test_muon_leaves_the_tables_to_adamw() -> None:
    network = a_gpt(a_config(ngrams={"rows": 50}, positions="rotary"))
    names = {name for name, parameter in network.named_parameters() for m in hidden_matrices(network) if m is parameter}
    wanted = {"attention.queries_keys_values", "attention.out", "feed_forward.up", "feed_forward.down"}
    assert names == {f"blocks.{block}.{part}.weight" for block in range(2) for part in wanted}

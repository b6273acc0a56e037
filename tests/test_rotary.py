"""Rotary positions: complex numbers by the definition, lengths kept, only distances seen."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.catalogue.gpt.network import Attention
from harness.catalogue.gpt.rotary import rotated
from tests.test_gpt import a_config


def some_vectors(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_pair_of_features_is_a_complex_number_turned_by_its_place() -> None:
    x = some_vectors(2, 3, 7, 8)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    for place in range(7):
        for pair in range(4):
            turn = torch.polar(torch.tensor(1.0).double(), torch.tensor(place / 10_000 ** (2 * pair / 8)).double())
            wanted, found = pairs[..., place, pair] * turn, rotated(x)[..., place, :]
            torch.testing.assert_close(torch.complex(found[..., pair], found[..., pair + 4]), wanted)


def test_the_product_of_a_query_and_a_key_depends_on_their_distance_alone() -> None:
    query, key = some_vectors(2, 16)
    queries, keys = (rotated(vector.expand(12, 16)) for vector in (query, key))
    products = queries @ keys.T  # (12 places of the query, 12 of the key)
    for distance in range(12):
        of_distance = products.diagonal(-distance)
        torch.testing.assert_close(of_distance, of_distance[:1].expand_as(of_distance))
    assert len({round(float(value), 6) for value in products[:, 0]}) == 12


def test_numbers_of_half_precision_are_turned_in_single_precision() -> None:
    x = some_vectors(1, 100, 8).bfloat16()
    assert torch.equal(rotated(x), rotated(x.float()))
    assert rotated(x).dtype == torch.float32
    assert rotated(x.double()).dtype == torch.float64


def test_attention_with_rotary_positions_is_the_definition_one_query_at_a_time() -> None:
    torch.manual_seed(0)
    attention = Attention(a_config(positions="rotary"))
    x = some_vectors(3, 8, 16).float()
    q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in attention.queries_keys_values(x).chunk(3, dim=-1))
    q, k = rotated(q), rotated(k)
    for place in range(8):
        weights = (q[:, :, place : place + 1] @ k[:, :, : place + 1].mT / 2).softmax(dim=-1)  # heads of 4 features
        wanted = attention.out((weights @ v[:, :, : place + 1]).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x)[:, place : place + 1], wanted)

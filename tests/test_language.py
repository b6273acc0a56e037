"""The task causal_lm: its loss is per token, its bits are per byte of text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness.catalogue.causal_lm.section import CausalLmTask
from harness.catalogue.causal_lm.task import CausalLm
from harness.scores import Scores
from tests.pairs import pair

TOKEN_BYTES = torch.tensor([1, 3, 2, 0])
TARGETS = torch.tensor([[0, 1, 2], [3, 1, 1], [0, 0, 3]])  # 6 + 6 + 2 bytes


def scores(outputs: Tensor, targets: Tensor, *, rows_at_once: int = 2) -> dict[str, float]:
    counted = Scores(CausalLm(targets.shape[1], TOKEN_BYTES, decode=bytes), device=torch.device("cpu"))
    for start in range(0, len(targets), rows_at_once):
        part = slice(start, start + rows_at_once)
        counted.update(outputs[part], pair(outputs[part], targets[part]))
    return counted.compute(lambda own: own.unsqueeze(0))


def test_a_model_that_knows_nothing_is_as_perplexed_as_there_are_tokens() -> None:
    found = scores(torch.zeros(3, 3, 4), TARGETS)
    assert found["val/loss"] == pytest.approx(math.log(4))
    assert found["val/perplexity"] == pytest.approx(4)
    assert found["val/bits_per_byte"] == pytest.approx(9 * 2 / 14), "nine targets of two bits each stand for 14 bytes"


@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
def test_scores_are_those_of_the_probabilities_of_the_targets(rows_at_once: int) -> None:
    torch.manual_seed(0)
    outputs = torch.randn(3, 3, 4, dtype=torch.float64)
    found = scores(outputs, TARGETS, rows_at_once=rows_at_once)
    bits = -outputs.softmax(-1).gather(-1, TARGETS.unsqueeze(-1)).log2().sum().item()
    assert found["val/loss"] == pytest.approx(bits * math.log(2) / 9, rel=1e-12)
    assert found["val/perplexity"] == pytest.approx(2 ** (bits / 9), rel=1e-12)
    assert found["val/bits_per_byte"] == pytest.approx(bits / 14, rel=1e-12)


def test_early_stopping_may_ask_for_each_score_and_for_no_other() -> None:
    assert tuple(scores(torch.zeros(3, 3, 4), TARGETS)) == CausalLmTask(kind="causal_lm").metric_names


def test_the_loss_of_an_update_counts_every_token() -> None:
    task = CausalLm(3, TOKEN_BYTES, decode=bytes)
    assert task.targets_per_row * len(TARGETS) == TARGETS.numel()
    assert task.loss_sums(torch.zeros(3, 3, 4), pair(torch.zeros(3, 3), TARGETS))["loss"].item() == pytest.approx(
        9 * math.log(4)
    )

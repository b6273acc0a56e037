"""The validation rows that are shown with target and prediction."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.catalogue.causal_lm.task import SHOWN_TOKENS, CausalLm
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.classification.task import Classification
from harness.catalogue.regression.task import Regression
from harness.catalogue.text.tokenizers import Bytes
from harness.rows.rows import evenly_spread
from harness.scores import Scores
from harness.tasks.base import TaskLoss
from tests.pairs import pair

LABELS = ClassificationTask(kind="classification", num_classes=3)


def shown(task: TaskLoss, outputs: Tensor, targets: Tensor, *, rows: Sequence[int] = (0, 1, 2)) -> Any:
    """The examples of a split whose rows come in batches of two, the first on one rank and the others on another."""
    shares = []
    for first, last in ((0, 2), (2, len(targets))):
        scores = Scores(task, device=torch.device("cpu"), shown_rows=rows, first_row=first)
        for start in range(first, last, 2):
            part = slice(start, min(start + 2, last))
            scores.update(outputs[part], pair(outputs[part], targets[part]))
        shares.append(scores._examples)
    return scores.examples(lambda _: shares)


@pytest.mark.parametrize("classes", [None, ["ant", "bee", "cat"]])
def test_a_label_is_shown_by_its_name_with_the_probability_of_the_prediction(classes: list[str] | None) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 5.0], [9.0, 0.0, 0.0]])
    found = shown(Classification(LABELS, class_weights=None, classes=classes), logits, torch.tensor([1, 2, 2, 0]))
    assert found["columns"] == ["row", "target", "prediction", "probability"]
    names = classes or [0, 1, 2]
    probabilities = logits.softmax(dim=1).amax(dim=1)
    assert [row[:3] for row in found["rows"]] == [
        [0, names[1], names[1]],
        [1, names[2], names[0]],
        [2, names[2], names[2]],
    ]
    assert [row[3] for row in found["rows"]] == pytest.approx(probabilities[:3].tolist())


def test_numbers_are_shown_side_by_side() -> None:
    one = shown(Regression(1), torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
    assert one == {"columns": ["row", "target", "prediction"], "rows": [[0, 3.0, 1.0], [1, 4.0, 2.0]]}
    two = shown(Regression(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    assert two["columns"] == ["row", "target 0", "prediction 0", "target 1", "prediction 1"]
    assert two["rows"] == [[0, 3.0, 1.0, 4.0, 2.0]]


def test_text_is_shown_as_text_its_end_if_it_is_long() -> None:
    tokenizer = Bytes()
    wanted = torch.tensor([list(b"x" * 9 + b"y" * SHOWN_TOKENS)])
    logits = torch.nn.functional.one_hot(wanted + 1, Bytes.num_tokens).float()
    task = CausalLm(wanted.shape[1], torch.from_numpy(tokenizer.token_bytes()), decode=tokenizer.decode)
    assert shown(task, logits, wanted)["rows"] == [[0, "y" * SHOWN_TOKENS, "z" * SHOWN_TOKENS]]


def test_nothing_is_shown_unless_asked_for() -> None:
    assert shown(Regression(1), torch.zeros(4, 1), torch.zeros(4, 1), rows=()) is None


def test_rows_that_are_shown_are_spread_over_the_split_and_over_ranks() -> None:
    assert evenly_spread(4, 100) == [0, 25, 50, 75]
    assert evenly_spread(9, 3) == [0, 1, 2]
    assert evenly_spread(0, 3) == []
    numbers = torch.arange(6.0).unsqueeze(1)
    assert shown(Regression(1), numbers, -numbers, rows=(1, 3, 5))["rows"] == [[k, -k, k] for k in (1, 3, 5)]

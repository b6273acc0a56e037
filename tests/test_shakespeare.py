"""configs/shakespeare_gpt.yaml: training knows more of Shakespeare than counting does, and soon more of a tenth."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.catalogue.text.section import ByteTokenizer, TextData
from harness.config.io import load_config
from harness.errors import DataError
from harness.examples.prepare import prepare
from harness.observers.ledger import read_lines
from tests.benchmarks.ngram_baseline import baselines
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main

CONFIGS = Path(__file__).parent.parent / "configs"
PLAYS = ("comedy_of_errors", "henry_vi_part_3", "merchant_of_venice", "richard_ii", "twelfth_night")
"""A tenth of the text; one of them is validated on."""


@pytest.fixture(scope="module")
def texts(prepared_data: Path) -> Path:
    """The folder of the 42 files."""
    try:
        said = prepare("shakespeare", prepared_data)
    except DataError as error:
        pytest.skip(f"the texts are not to be had: {error}")
    assert "42 files, 5,057,198 bytes" in said
    return prepared_data / "shakespeare"


def counted_and_trained(
    output_root: Path, *overrides: str, orders: Sequence[int]
) -> tuple[dict[str, float], dict[str, float], float]:
    """Return the bits per byte of n-grams of bytes and of the config's tokens by name, and those of its training."""
    path, given = CONFIGS / "shakespeare_gpt.yaml", [*overrides, f"run.output_root={output_root}"]
    config = load_config(path, given).config
    assert isinstance(config.data, TextData)
    in_bytes = config.data.model_copy(update={"tokenizer": ByteTokenizer(kind="byte")})
    of_bytes, of_tokens = (baselines(data, seed=config.run.seed, orders=orders) for data in (in_bytes, config.data))
    assert run_ranks(2, train_main, str(path), *given, deadline_seconds=1800) == [0, 0]
    lines = read_lines(output_root / config.run.name / "ledger.jsonl")
    trained = [line["metrics"]["val/bits_per_byte"] for line in lines if line["event"] == "evaluation"][-1]
    return of_bytes, of_tokens, trained


@pytest.mark.slow
@pytest.mark.long
def test_two_minutes_of_training_beat_unigrams_and_kneser_ney_5_grams(texts: Path, tmp_path: Path) -> None:
    of_bytes, of_tokens, trained = counted_and_trained(tmp_path, f"data.path={texts}/*.txt", orders=(1, 5))
    assert of_bytes["5-gram"] < 0.5 * of_bytes["unigram"], "a weak baseline proves nothing"
    assert trained < min(*of_bytes.values(), *of_tokens.values()), (of_bytes, of_tokens)


@pytest.mark.slow
def test_ten_seconds_of_training_on_a_tenth_of_the_text_beat_unigrams_and_kneser_ney_3_grams(
    texts: Path, tmp_path: Path
) -> None:
    tenth = tmp_path / "tenth"
    tenth.mkdir()
    for play in PLAYS:
        shutil.copy(texts / f"{play}.txt", tenth)
    overrides = (
        *(f"data.path={tenth}/*.txt", "data.validation_fraction=0.2", "data.tokenizer.vocab_size=512"),
        *("model.layers=2", "run.max_steps=140", "schedule.warmup_steps=10", "evaluation.every_steps=140"),
    )
    of_bytes, of_tokens, trained = counted_and_trained(tmp_path, *overrides, orders=(1, 3))
    assert of_tokens["3-gram"] < 0.7 * of_tokens["unigram"], "a weak baseline proves nothing"
    assert trained < min(*of_bytes.values(), *of_tokens.values()), (of_bytes, of_tokens)


def test_the_20_minute_form_validates_on_the_same_documents() -> None:
    data = [load_config(CONFIGS / name).config for name in ("shakespeare_gpt.yaml", "shakespeare_gpt_20min.yaml")]
    keys = ("source", "path", "split", "validation_fraction")
    short, long = ({"seed": config.run.seed, **{key: getattr(config.data, key) for key in keys}} for config in data)
    assert short == long

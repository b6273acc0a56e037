"""Causal language models of transformers on running text: their own tokens, full rows, exported as they came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.catalogue.text.tokenizers import ModelTokens, tokenizer_from_json
from harness.config.io import load_config
from harness.errors import ConfigError, DataError
from harness.export import load_exported
from harness.export import main as export
from harness.sample import main as sample
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main
from tests.distributed.test_language_runs import write_config
from tests.sections import build_model, load, prepare
from tests.tiny_models import END, write_language_model, write_model

TEXTS = [f"{n} and {n + 1} are {2 * n + 1}.\n" for n in range(60)]


def write_run(folder: Path, /, *, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> Path:
    path = write_config(folder)
    values = json.loads(path.read_text())
    values["model"] = {"kind": "pretrained", "path": str(folder / "model"), "head": "causal_lm", **(model or {})}
    del values["data"]["tokenizer"]
    values["data"] |= data or {}
    path.write_text(json.dumps(values))
    return path


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("text", ["7 and 8 are 15.\n", "naïve 日本 🙂", f"what {END} is text here", "  \n\t ", ""])
def test_a_text_comes_back_from_the_models_tokens_and_each_byte_is_counted_once(tmp_path: Path, text: str) -> None:
    tokens = ModelTokens(write_language_model(tmp_path / "model", TEXTS))
    ids = tokens.encode(text.encode())
    assert tokens.decode([*ids.tolist(), tokens.end]) == text.encode()
    assert tokens.token_bytes()[ids].sum() == len(text.encode())
    assert tokens.end not in ids
    assert len(tokens.token_bytes()) == tokens.num_tokens
    again = tokenizer_from_json(tokens.to_json())
    assert again.encode(text.encode()).tolist() == ids.tolist()


def test_the_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    import transformers

    directory = write_language_model(tmp_path / "model", TEXTS)
    theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = "".join(TEXTS)
    found = ModelTokens(directory).encode(text.encode()).tolist()
    assert found == theirs(text, add_special_tokens=False)["input_ids"]
    assert len(found) < 0.6 * len(text), "pairs of bytes are merged"


def test_a_tokenizer_that_cuts_or_fills_up_texts_does_neither_to_a_document(tmp_path: Path) -> None:
    directory = write_language_model(tmp_path / "model", TEXTS)
    before = ModelTokens(directory)
    described = json.loads((directory / "tokenizer.json").read_text())
    described["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": before.end}
    described["padding"] = {**fill, "pad_type_id": 0, "pad_token": END}
    (directory / "tokenizer.json").write_text(json.dumps(described))
    assert ModelTokens(directory).encode(b"7 and 8 are 15").tolist() == before.encode(b"7 and 8 are 15").tolist()


def test_a_token_put_before_every_text_is_left_out(tmp_path: Path) -> None:
    directory = write_language_model(tmp_path / "model", TEXTS)
    before = ModelTokens(directory)
    described = json.loads((directory / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": END, "type_id": 0}}
    described["post_processor"] = {  # as Llama 3 has it
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END: {"id": END, "ids": [before.end], "tokens": [END]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(described))
    assert ModelTokens(directory).encode(b"7 and 8").tolist() == before.encode(b"7 and 8").tolist()


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(f"zero{n}", marks=pytest.mark.slow) for n in (1, 2, 3))])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformers_loads_what_was_exported_and_gives_the_scores_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, strategy: str
) -> None:
    import transformers

    write_language_model(tmp_path / "model", TEXTS, family=family)
    config = write_run(tmp_path)
    arguments = [str(config), "run.max_steps=20", "evaluation.every_steps=10", f"strategy={{kind: {strategy}}}"]
    assert run_ranks(2, train_main, *arguments, deadline_seconds=240) == [0, 0]
    out = tmp_path / "out"
    assert export([str(tmp_path / "run"), "--to", str(out), "--from", "latest"]) == 0
    scores = json.loads((out / "harness.json").read_bytes())["metrics"]
    network = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    loaded = load_config(str(config)).config
    rows = load(loaded.data, loaded.task, seed=5).validation
    inputs, targets = rows.inputs.long(), rows.targets.long()
    with torch.no_grad():
        logits = network(input_ids=inputs).logits
        ours = load_exported(out)(inputs)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    assert nats / targets.numel() == pytest.approx(scores["val/loss"], rel=1e-5)
    # The bytes, by transformers' own tokenizer: the text of the targets, without the ends of documents.
    text = "".join(tokenizer.decode(row[row != network.config.eos_token_id]) for row in targets)
    assert nats / len(text.encode()) / 0.6931471805599453 == pytest.approx(scores["val/bits_per_byte"], rel=1e-5)
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True).state_dict()
    assert not any(torch.equal(tensor, start[name]) for name, tensor in network.state_dict().items() if "mlp" in name)
    if strategy == "ddp":
        prompt = tokenizer(f"{END}7 and 8", return_tensors="pt")
        written = tokenizer.decode(network.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0])
        capsys.readouterr()
        assert sample([str(out), "--prompt", "7 and 8", "--temperature", "0", "--tokens", "8"]) == 0
        assert written.removeprefix(END).partition(END)[0].strip() == capsys.readouterr().out.strip()
        assert len(written) > len(f"{END}7 and 8")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_end_of_a_document_is_seen_and_trained_like_any_token(tmp_path: Path, family: str) -> None:
    directory = write_language_model(tmp_path / "model", TEXTS, family=family)
    model = load_config(str(write_run(tmp_path))).config.model
    network, end = build_model(model, input_shape=(8,), num_outputs=ModelTokens(directory).num_tokens), 0
    assert ModelTokens(directory).end == end
    rows = torch.tensor([[end, 5, 6, end, 7, end, end, end]])
    network.eval()
    with torch.no_grad():
        found = network(rows)
        torch.testing.assert_close(found, network.network(input_ids=rows).logits)
        assert found.shape[:2] == (1, 8)
        other = network(torch.tensor([[5, 5, 6, end, 7, end, end, end]]))
    assert (other[0, 2] - found[0, 2]).abs().max() > 1e-6, "the first end is looked back on"
    network(rows).square().sum().backward()
    embedding = network.network.get_input_embeddings().weight
    assert embedding.grad is not None
    assert embedding.grad[end].any()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (
            {"head": "sequence_classification"},
            {},
            "model.head: sequence_classification does not fit task.kind causal_lm",
        ),
        ({}, {"tokenizer": {"kind": "byte"}}, "data.tokenizer.kind: a pretrained model knows its own tokens"),
        ({}, {"block": 64}, "data.block: 64 is more than the 32 tokens that"),
        (
            {"kind": "gpt", "layers": 1, "width": 8, "heads": 1},
            {},
            "data.tokenizer.kind: pretrained goes with model.kind",
        ),
    ],
)
def test_what_does_not_fit_together_is_said(
    tmp_path: Path, model: dict[str, Any], data: dict[str, Any], words: str
) -> None:
    write_language_model(tmp_path / "model", TEXTS)
    if model.get("kind") == "gpt":
        data = {"tokenizer": {"kind": "pretrained", "path": str(tmp_path / "model")}}
    path = write_run(tmp_path, model=model, data=data)
    if model.get("kind") == "gpt":
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "model": model}))
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), world_size=1)
    assert words in str(caught.value)


def change(path: Path, **values: Any) -> None:
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "is no byte-level tokenizer"),
        ("tokenizer.json", {"pre_tokenizer": None}, "is no byte-level tokenizer"),
        (
            "tokenizer.json",
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
            "puts a space before every text; set add_prefix_space to false",
        ),
        ("config.json", {"eos_token_id": "gone"}, "has no eos_token_id, which ends a document"),
        ("config.json", {"vocab_size": "gone"}, "has no vocab_size"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    tmp_path: Path, file: str, values: dict[str, Any], words: str
) -> None:
    change(write_language_model(tmp_path / "model", TEXTS) / file, **values)
    with pytest.raises(ConfigError) as caught:
        load_config(str(write_run(tmp_path)), world_size=1)
    assert words in str(caught.value)


def test_a_tokenizer_that_changes_the_text_is_refused_with_the_document(tmp_path: Path) -> None:
    change(
        write_language_model(tmp_path / "model", TEXTS) / "tokenizer.json",
        normalizer={"type": "Strip"} | {"strip_left": True, "strip_right": True},
    )
    config = load_config(str(write_run(tmp_path))).config
    with pytest.raises(
        DataError, match=r"data.tokenizer does not give this text back; its tokens stand for .* bytes of"
    ):
        prepare(config.data, config.task, seed=5)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    change(write_language_model(tmp_path / "model", TEXTS) / "config.json", vocab_size=100)
    with pytest.raises(DataError, match=r"go up to 289, but its config.json has a vocab_size of 100"):
        ModelTokens(tmp_path / "model")


def test_another_tokenizer_builds_the_tokens_again(tmp_path: Path) -> None:
    from harness.catalogue.text.read import token_folder

    directory = write_language_model(tmp_path / "model", TEXTS)
    data: Any = load_config(str(write_run(tmp_path))).config.data
    before = token_folder(data, seed=5)
    write_language_model(directory, ["quite another text " * 50])
    assert token_folder(data, seed=5) != before


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", family="bert")
    with pytest.raises(ConfigError, match="has no eos_token_id"):
        load_config(str(write_run(tmp_path)), world_size=1)

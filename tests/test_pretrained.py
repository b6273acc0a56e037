"""Pretrained models: what transformers computes, what is trained of it, and refusals of what cannot be."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from harness.catalogue.pretrained.network import build
from harness.catalogue.pretrained.section import PretrainedModel
from harness.config.io import load_config
from harness.errors import ConfigError, DataError
from harness.optim import parameter_groups
from harness.tasks.base import PairTask
from tests.helpers import write_config
from tests.sections import load
from tests.tiny_architectures import change_config, write_architecture
from tests.tiny_models import (
    NUM_TOKENS,
    config_values,
    write_language_model,
    write_model,
    write_reviews,
    write_tokenizer,
)

DEPTHS = {"embeddings": 3, "layer.0": 2, "layer.1": 1, "pooler": 0, "classifier": 0}
"""Of a BERT of two blocks, counted down from the head."""


@pytest.fixture(autouse=True)
def environment_is_put_back() -> Iterator[None]:
    """What keeps transformers offline is a variable of this process, and DeepSpeed, which it imports, sets another."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "gpt2", family="gpt2")


def a_model(path: Path, *, num_outputs: int = 2, **keys: Any) -> nn.Module:
    torch.manual_seed(5)
    config = PretrainedModel.model_validate({"kind": "pretrained", "path": str(path), **keys})
    return build(config, num_outputs=num_outputs)


def depth_of(name: str) -> int:
    return next(depth for part, depth in DEPTHS.items() if f".{part}." in f".{name}.")


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_logits_of_filled_up_rows_are_those_that_transformers_gives_each_row_alone(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = a_model(request.getfixturevalue(family), num_outputs=3).eval()
    rows = [[2, 5, 6, 7, 3], [2, 8, 3], [2, 9, 10, 3]]
    tokens = torch.zeros(3, 7, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        found = model(tokens)
        wanted = torch.cat([model.network(input_ids=torch.tensor([row])).logits for row in rows])
    assert found.shape == (3, 3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(wanted[0], wanted[1])


def test_a_row_has_the_same_logits_beside_longer_rows(bert: Path) -> None:
    model = a_model(bert).eval()
    rows = torch.tensor([[2, 8, 3, 0, 0, 0], [2, 9, 10, 11, 12, 3]])
    with torch.no_grad():
        torch.testing.assert_close(model(rows)[:1], model(rows[:1]), rtol=1e-5, atol=1e-6)


def test_a_causal_model_gives_logits_of_every_token_and_sees_none_that_come_later(gpt2: Path) -> None:
    model = a_model(gpt2, num_outputs=NUM_TOKENS, head="causal_lm").eval()
    rows = torch.tensor([[2, 8, 9, 10], [2, 8, 9, 11]])
    with torch.no_grad():
        logits = model(rows)
    assert logits.shape == (2, 4, NUM_TOKENS)
    torch.testing.assert_close(logits[0, :3], logits[1, :3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits[0, 3], logits[1, 3])


def test_the_weights_are_those_of_the_file_and_only_the_head_is_drawn(bert: Path) -> None:
    from safetensors.torch import load_file

    saved, model = load_file(bert / "model.safetensors"), a_model(bert)
    named = dict(model.named_parameters())
    heads = {name for name in named if name.startswith("network.classifier.")}
    assert {name.removeprefix("network.bert.") for name in named.keys() - heads} == saved.keys()
    assert all(torch.equal(named[f"network.bert.{name}"], tensor) for name, tensor in saved.items())
    again = dict(a_model(bert).named_parameters())
    assert all(torch.equal(named[name], again[name]) for name in heads)


def test_no_socket_is_opened(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        asked_for.append(args)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(OSError, match="there is no network"):
        socket.create_connection(("127.0.0.1", 9))
    assert len(asked_for) == 1, "the trap works"
    a_model(bert)
    assert len(asked_for) == 1, f"sockets were asked for: {asked_for}"


def test_dropout_replaces_every_rate_of_the_config(bert: Path) -> None:
    def rates(model: nn.Module) -> set[float]:
        return {part.p for part in model.modules() if isinstance(part, nn.Dropout)}

    assert rates(a_model(bert)) == {0.1}
    assert rates(a_model(bert, dropout=0.3)) == {0.3}
    without = a_model(bert, dropout=0.0).train()
    tokens = torch.tensor([[2, 8, 9, 3]])
    assert torch.equal(without(tokens), without(tokens))


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize(("frozen_layers", "deepest_trained"), [(None, 3), (0, 2), (1, 1), (2, 0)])
def test_frozen_layers_are_the_embeddings_and_the_lowest_blocks(
    bert: Path, frozen_layers: int | None, deepest_trained: int
) -> None:
    model = a_model(bert, frozen_layers=frozen_layers)
    wanted = {name for name, _ in model.named_parameters() if depth_of(name) <= deepest_trained}
    assert trained(model) == wanted


def test_the_rate_falls_by_a_factor_a_block_from_the_head_to_the_embeddings(bert: Path) -> None:
    model = a_model(bert, layer_lr_decay=0.5)
    factor_of = {
        id(parameter): (group.get("lr_factor", 1.0), group["weight_decay"])
        for group in parameter_groups(model, weight_decay=0.1, own=PairTask().parameter_groups(model))
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    for name, parameter in model.named_parameters():
        assert factor_of.pop(id(parameter)) == (0.5 ** depth_of(name), 0.1 if parameter.dim() >= 2 else 0.0), name
    assert not factor_of


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_lora_trains_its_additions_and_the_head_alone_and_begins_as_the_model_it_adds_to(
    family: str, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("peft")
    path = request.getfixturevalue(family)
    model, plain = a_model(path, lora={"rank": 2}), a_model(path)
    head = "classifier" if family == "bert" else "score"
    names = trained(model)
    assert {name for name in names if ".lora_" not in name} == {
        name for name, _ in model.named_parameters() if name.startswith(f"network.{head}.")
    }
    assert len(names) >= 4
    tokens = torch.tensor([[2, 8, 9, 3]])
    with torch.no_grad():
        found, wanted = (network.eval()(tokens) for network in (model, plain))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("is_in_the_files", [True, False])
def test_lora_trains_the_head_of_a_language_model_only_where_its_files_have_none(
    is_in_the_files: bool, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    path = write_language_model(tmp_path / "model", ["7 and 8"], family="llama", tie_word_embeddings=False)
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    num_tokens = len(tensors["lm_head.weight"])
    if not is_in_the_files:
        save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, weights)
    names = trained(a_model(path, num_outputs=num_tokens, head="causal_lm", lora={"rank": 2}))
    trained_whole = set() if is_in_the_files else {"network.lm_head.weight"}
    assert {name for name in names if ".lora_" not in name} == trained_whole
    assert any(".lora_" in name for name in names)


def test_frozen_layers_have_no_additions_that_train(bert: Path) -> None:
    pytest.importorskip("peft")
    model = a_model(bert, lora={"rank": 2}, frozen_layers=1)
    additions = {name for name in trained(model) if ".lora_" in name}
    assert additions
    assert all("layer.1." in name for name in additions)


def test_lora_without_peft_says_what_to_install(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model.lora: needs peft.*pip install 'harness-train\[lora\]'"):
        a_model(bert, lora={"rank": 2})


def test_lora_on_layers_that_are_not_there_names_those_that_are(bert: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"target_modules.*linear layers are called .*key, query, value"):
        a_model(bert, lora={"target_modules": ["q_proj"]})


# ---------------------------------------------------------------- directories that cannot be used


def spoiled(bert: Path, folder: Path, *, drop: tuple[str, ...] = (), **config: Any) -> Path:
    copy = Path(shutil.copytree(bert, folder / "copy"))
    for name in drop:
        (copy / name).unlink()
    found = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**found, **config}))
    return copy


def answered(folder: Path, directory: Path, /, **sections: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    write_reviews(folder / "reviews.csv")
    write_config(folder / "tiny.yaml", config_values(folder, directory, **sections))
    script = (
        "import sys, harness.train as t; code = t.main(sys.argv[1:]); sys.exit(99 if 'torch' in sys.modules else code)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, str(folder / "tiny.yaml")], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("drop", "config", "sections", "words"),
    [
        (("model.safetensors",), {}, {}, "has no model.safetensors; copy"),
        (("model.safetensors", "tokenizer.json"), {"pickle": True}, {}, "only as a pickle (pytorch_model.bin)"),
        ((), {"auto_map": {"AutoModel": "evil.Model"}}, {}, "has auto_map, which is code of its own"),
        ((), {}, {"model": {"frozen_layers": 3}}, "model.frozen_layers: 3 is more than the 2 blocks"),
        ((), {}, {"model": {"frozen_layers": 2, "lora": {}}}, "model.lora: model.frozen_layers keeps all 2 blocks"),
        ((), {}, {"data": {"max_tokens": 33}}, "data.max_tokens: 33 is more than the 32 tokens that"),
        (("tokenizer.json",), {}, {}, "has no tokenizer.json"),
        ((), {"pad_token_id": None}, {}, "has neither pad_token_id nor eos_token_id"),
        ((), {}, {"model": {"path": "sentence-transformers/all-MiniLM-L6-v2"}}, "there is no such directory"),
    ],
    ids=["no weights", "pickle", "code", "frozen", "no lora", "long", "tokenizer", "pad", "hub"],
)
def test_a_directory_that_cannot_be_used_is_answered_before_torch_is_imported(
    bert: Path, tmp_path: Path, *, drop: tuple[str, ...], config: Any, sections: Any, words: str
) -> None:
    model = spoiled(bert, tmp_path, drop=drop, **{key: value for key, value in config.items() if key != "pickle"})
    if "pickle" in config:
        (model / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    done = answered(tmp_path, model, **sections)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


def test_weights_of_another_architecture_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the weights of .* are not those of its config.json"):
        a_model(spoiled(bert, tmp_path, num_hidden_layers=3))


def test_weights_of_another_width_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path: "):
        a_model(spoiled(bert, tmp_path, intermediate_size=64))


def test_an_architecture_that_transformers_does_not_know_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path: transformers 5\..* cannot use"):
        a_model(spoiled(bert, tmp_path, model_type="brand_new"))


def test_a_head_that_an_architecture_does_not_have_is_refused(tmp_path: Path) -> None:
    import transformers

    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a vit, which transformers .* does not have with the head"):
        a_model(tmp_path)


# ---------------------------------------------------------------- texts


def splits_of(folder: Path, model: Path, **data: Any) -> Any:
    if not (folder / "reviews.csv").exists():
        write_reviews(folder / "reviews.csv")
    write_config(folder / "tiny.yaml", config_values(folder, model, data=data))
    config = load_config(folder / "tiny.yaml").config
    return load(config.data, config.task, seed=config.run.seed)


def test_texts_become_the_tokens_of_the_models_own_tokenizer(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("review,score\n" + "the food was good,great\nbad zebra,other\n" * 4)
    splits = splits_of(tmp_path, bert, validation_fraction=0.25)
    rows = {tuple(row) for row in splits.train.inputs.tolist()}
    assert rows == {(2, 11, 8, 13, 4, 3), (2, 5, 1, 3, 0, 0)}  # [UNK] is 1
    assert splits.preprocessing["classes"] == ["great", "other"]
    for row, label in zip(splits.train.inputs.tolist(), splits.train.targets.tolist(), strict=True):
        assert label == int(row[1] == 5)
    (notice,) = splits.notices
    assert "are of class 'other'" in notice


def test_short_texts_are_filled_up_with_the_models_own_padding(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", pad_token_id=12)
    (tmp_path / "reviews.csv").write_text("review,score\n" + "the food was good,great\nbad,other\n" * 4)
    splits = splits_of(tmp_path, model, validation_fraction=0.25)
    assert {tuple(row) for row in splits.train.inputs.tolist()} == {(2, 11, 8, 13, 4, 3), (2, 5, 3, 12, 12, 12)}


@pytest.mark.parametrize("key", ["text", "target"])
def test_a_column_that_a_table_of_texts_does_not_have_is_told_by_the_key_that_names_it(
    key: str, bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"data\.{key}: there is no column 'scroe' \(nearest: 'score'\)"):
        splits_of(tmp_path, bert, **{key: "scroe"})


def test_a_text_that_is_too_long_keeps_its_last_special_token_and_is_counted(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("review,score\n" + "the food was good,great\nbad,other\n" * 4)
    splits = splits_of(tmp_path, bert, max_tokens=4, validation_fraction=0.25)
    assert {tuple(row) for row in splits.train.inputs.tolist()} == {(2, 11, 8, 3), (2, 5, 3, 0)}
    assert "4 of 8 texts have more than 4 tokens; what is beyond is cut off (data.max_tokens)" in splits.notices


def test_validation_rows_of_their_own_have_the_classes_of_the_training_rows(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("review,score\nthe tea is very good good good good,other\n")
    splits = splits_of(tmp_path, bert, validation_path=str(tmp_path / "other.csv"))
    assert splits.validation.targets.tolist() == [1]
    assert splits.validation.inputs.shape[1] == splits.train.inputs.shape[1]


@pytest.mark.parametrize("text", ["", "  "])
def test_a_row_without_a_text_is_named(bert: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "reviews.csv").write_text(f"review,score\ngood,great\n{text},other\n")
    with pytest.raises(DataError, match=r"column 'review' has .* in row 1 .*a text is wanted"):
        splits_of(tmp_path, bert)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"model": {"kind": "mlp", "hidden": [4]}}, "model.kind: mlp wants numbers, data.source is text_table"),
        ({"data": {"source": "mnist_5k"}}, "data.source: a pretrained model wants tokens, not mnist_5k"),
        ({"model": {"head": "causal_lm"}}, "model.head: causal_lm does not fit task.kind classification"),
        ({"task": {"kind": "regression"}}, "task.kind: text_table has labels"),
        ({"data": {"target": "review"}}, "data.target: 'review' is the column of the texts; name that of the labels"),
        ({"data": {"path": "reviews.txt"}}, "a file name that ends with .csv, .parquet, .json, .jsonl is wanted"),
    ],
)
def test_what_does_not_fit_together_is_said(bert: Path, tmp_path: Path, sections: Any, problem: str) -> None:
    values = config_values(tmp_path, bert, **sections)
    if "kind" in sections.get("model", {}):
        values["model"] = sections["model"]
    if "source" in sections.get("data", {}):
        values["data"] = {**sections["data"], "global_batch": 8}
    if "kind" in sections.get("task", {}):
        values["task"] = sections["task"]
    write_config(tmp_path / "tiny.yaml", values)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "tiny.yaml")
    assert problem in str(caught.value)


# ---------------------------------------------------------------- what the files of a model have and have not


def test_what_is_drawn_at_random_is_told_and_trained_also_where_all_else_is_frozen(bert: Path) -> None:
    pytest.importorskip("peft")
    without_pooler = load_file(bert / "model.safetensors")
    assert any("pooler" in name for name in without_pooler)
    (notice,) = a_model(bert).notices  # type: ignore[misc]
    assert "has no classifier.bias, classifier.weight, which begin with random numbers and are trained" in notice


@pytest.mark.parametrize("keys", [{"lora": {"rank": 2}}, {"frozen_layers": 2}, {}])
def test_a_pooler_that_the_files_do_not_have_is_told_and_trained(bert: Path, tmp_path: Path, keys: Any) -> None:
    pytest.importorskip("peft")
    path = spoiled(bert, tmp_path)
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "pooler" not in name}, path / "model.safetensors")
    model = a_model(path, **keys)
    assert {"network.bert.pooler.dense.weight", "network.bert.pooler.dense.bias"} <= trained(model)
    (notice,) = model.notices  # type: ignore[misc]
    assert "bert.pooler.dense.weight" in notice


def test_a_classifier_of_three_classes_is_a_start_for_two_whose_head_is_drawn_and_told(tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "model", "bert", head="sequence_classification", num_labels=3)
    (notice,) = a_model(path).notices  # type: ignore[misc]
    assert "has a head for another number of outputs (classifier." in notice
    assert "begin with random numbers and are trained" in notice
    saved, found = load_file(path / "model.safetensors"), dict(a_model(path).named_parameters())
    assert found["network.classifier.weight"].shape == (2, 16)
    assert torch.equal(found["network.bert.pooler.dense.weight"], saved["bert.pooler.dense.weight"])
    assert a_model(path, num_outputs=3).notices == ()  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_files_with_more_blocks_than_their_config_are_refused(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    number = {"bert": "num_hidden_layers", "gpt2": "n_layer"}[family]
    path = spoiled(request.getfixturevalue(family), tmp_path, **{number: 1})
    with pytest.raises(ConfigError, match=r"has 1 blocks, its files have more: \d+ tensors would be left out"):
        a_model(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "has a quantization_config"),
        ({"quantization_config": {"quant_method": "foo"}}, "has a quantization_config"),
        ({"pad_token_id": NUM_TOKENS}, f"has the pad_token_id {NUM_TOKENS}, but tokens from 0 to {NUM_TOKENS - 1}"),
        ({"pad_token_id": -1}, "has the pad_token_id -1"),
        ({"num_attention_heads": 3}, "divides 16 numbers a token among 3 heads"),
        ({"_attn_implementation": "flash_attention_2"}, "asks for the attention 'flash_attention_2'"),
        ({"model_type": "big_bird"}, "has the attention_type block_sparse"),
        ({"encoder_layerdrop": 0.1}, "leaves out whole blocks at random (encoder_layerdrop: 0.1)"),
    ],
    ids=["4bit", "unknown", "pad", "pad -1", "heads", "flash", "sparse", "layerdrop"],
)
def test_what_transformers_would_refuse_or_train_wrongly_is_answered_by_harness_check(
    bert: Path, tmp_path: Path, change: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.launch.cli import main as command

    path = change_config(spoiled(bert, tmp_path), **change)
    write_reviews(tmp_path / "reviews.csv")
    write_config(tmp_path / "tiny.yaml", config_values(tmp_path, path))
    assert command(["check", str(tmp_path / "tiny.yaml")]) == 2
    said = capsys.readouterr()
    assert f"model.path: {path}/config.json {words}" in said.err + said.out


def test_an_error_of_transformers_of_any_kind_is_a_refusal_with_the_path(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path: .*copy cannot be loaded: \w+: ") as caught:
        a_model(spoiled(bert, tmp_path, hidden_act="no_such_function"))
    assert "no_such_function" in str(caught.value)


@pytest.mark.parametrize("family", ["roberta", "esm", "longformer"])
def test_the_most_tokens_that_are_advised_go_through(family: str, tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "model", family, head="sequence_classification", vocab_size=NUM_TOKENS)
    write_tokenizer(path)
    change_config(path, pad_token_id=1)
    write_reviews(tmp_path / "reviews.csv")
    most = {"roberta": 64, "esm": 64, "longformer": 68}[family]
    write_config(tmp_path / "tiny.yaml", config_values(tmp_path, path, data={"max_tokens": most + 1}))
    with pytest.raises(ConfigError, match=rf"{most + 1} is more than the {most} tokens .*; use {most} or less"):
        load_config(tmp_path / "tiny.yaml", world_size=1)
    write_config(tmp_path / "tiny.yaml", config_values(tmp_path, path, data={"max_tokens": most}))
    load_config(tmp_path / "tiny.yaml", world_size=1)
    with torch.no_grad():
        a_model(path).eval()(torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            a_model(path).eval()(torch.full((1, most + 1), 5))


# ---------------------------------------------------------------- names of special tokens in texts


def write_end_model(folder: Path, family: str) -> Path:
    """Write a model whose tokenizer ends texts with </s>, and has <pad> as its padding."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    path = write_architecture(folder / "model", family, head="sequence_classification", num_labels=2)
    vocabulary = {word: place for place, word in enumerate(("<pad>", "</s>", "<unk>", "good", "bad", "food", "<", "s"))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("family", ["t5", "bart", "bert", "gpt2"])
@pytest.mark.parametrize("name", ["</s>", "<pad>"])
def test_the_names_of_the_padding_and_of_the_end_within_a_text_are_text_and_told(
    family: str, name: str, tmp_path: Path
) -> None:
    path = write_end_model(tmp_path, family)
    lines = "good food,great\nbad food food,other\n" * 4
    (tmp_path / "reviews.csv").write_text(f"review,score\n{lines}good {name} food,great\nbad {name} food,other\n")
    splits = splits_of(tmp_path, path, max_tokens=32, validation_fraction=0.25)
    is_text = name == "<pad>" or family in ("t5", "bart")
    assert any("2 of 10 texts have the name of a special token" in notice for notice in splits.notices) == is_text
    assert any("names of special tokens" in sentence for sentence in splits.read_otherwise) == is_text
    rows = torch.cat([splits.train.inputs, splits.validation.inputs])
    lengths = (rows != 0).sum(dim=1)
    assert all(bool((row[:length] != 0).all()) for row, length in zip(rows, lengths.tolist(), strict=True))
    assert sorted((rows == 1).sum(dim=1).tolist()) == [1] * 10 if is_text else [1] * 8 + [2] * 2
    with torch.no_grad():
        logits = a_model(path).eval()(rows)
    assert logits.isfinite().all()


def test_a_tokenizer_that_puts_no_end_behind_a_text_is_refused_where_the_model_looks_at_it(tmp_path: Path) -> None:
    path = write_end_model(tmp_path, "t5")
    described = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**described, "post_processor": None}))
    (tmp_path / "reviews.csv").write_text("review,score\n" + "good food,great\nbad food,other\n" * 4)
    with pytest.raises(DataError, match=r"looks at the end of a text \(</s>\), which its tokenizer does not put"):
        splits_of(tmp_path, path)


def test_a_tokenizer_whose_unknown_words_are_padding_is_refused_with_the_text(tmp_path: Path) -> None:
    path = change_config(write_end_model(tmp_path, "bert"), pad_token_id=2)
    (tmp_path / "reviews.csv").write_text("review,score\n" + "good zebra,great\nbad food,other\n" * 4)
    with pytest.raises(DataError, match=r"makes its padding or end token \(<unk>\) of 'good zebra'"):
        splits_of(tmp_path, path)

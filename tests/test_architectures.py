"""What holds for every architecture of transformers that we know how to build: exports, padding, positions, depths."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from harness.catalogue.pretrained.directory import num_positions
from harness.catalogue.pretrained.network import Pretrained, build, save, some_rows
from harness.catalogue.pretrained.section import PretrainedModel
from harness.errors import ConfigError
from tests.tiny_architectures import (
    CLASSIFIERS,
    LANGUAGE_MODELS,
    VOCABULARY,
    write_architecture,
)

CLASSIFIER, LANGUAGE_MODEL = "sequence_classification", "causal_lm"
HEADS = {CLASSIFIER: CLASSIFIERS, LANGUAGE_MODEL: LANGUAGE_MODELS}
NUM_OUTPUTS = {CLASSIFIER: 2, LANGUAGE_MODEL: VOCABULARY}
PAD_COMES_IN = {"convbert", "fnet", "mobilebert", "yoso"}
"""Classifiers that mix neighbours or transform whole rows, whatever the mask says."""
WANTS_FULL_ROWS = {"nystromformer"}
"""Of one length, which its config names."""
REFUSED = PAD_COMES_IN | WANTS_FULL_ROWS
WITHOUT_BLOCKS = {"albert", "funnel"}
"""Whose blocks have one set of weights, or are in lists of lists."""
EXPERT_NAMES = {
    "deepseek_v3": ["gate_proj,up_proj,down_proj", "down_proj"],
    "jamba": ["gate_proj,up_proj,down_proj"],
    "mixtral": ["w1,w2,w3", "w1,w3", "w2"],
    "qwen2_moe": ["gate_proj,up_proj,down_proj"],
}
"""What the layers are called that transformers keeps in one tensor."""


@pytest.fixture(autouse=True)
def environment_is_put_back() -> Iterator[None]:
    with patch.dict(os.environ):
        yield


def swept(short: dict[str, Sequence[str]]) -> Any:
    """Parametrize by head and architecture: `short`, and all others in the long form."""
    return pytest.mark.parametrize(
        ("head", "family"),
        [
            pytest.param(head, family, marks=() if family in short.get(head, ()) else pytest.mark.long)
            for head, families in HEADS.items()
            if head in short
            for family in families
        ],
    )


def a_model(path: Path, head: str, **keys: Any) -> Pretrained:
    torch.manual_seed(5)
    config = PretrainedModel.model_validate({"kind": "pretrained", "path": str(path), "head": head, **keys})
    return build(config, num_outputs=NUM_OUTPUTS[head])


def layer_names(network: nn.Module) -> list[str]:
    """Return the last parts of the names of everything with a parameter and no parts."""
    leaves = [name for name, part in network.named_modules() if [*part.parameters()] and not [*part.children()]]
    return sorted({last for name in leaves if not (last := name.rpartition(".")[2]).isdecimal()})


def refusal_or_difference(path: Path, head: str, targets: list[str]) -> str | float:
    """Return how the additions to `targets` are refused, or how far an export is from the network that trains."""
    import transformers

    try:
        model = a_model(path, head, lora={"rank": 2, "target_modules": targets})
    except ConfigError as error:
        return error.args[0]
    additions = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    assert additions
    with torch.no_grad():
        for parameter in additions:
            parameter.normal_()
    rows = some_rows(model, lengths=[12, 12])
    with torch.no_grad():
        wanted = model.eval()(rows)
    out = path.parent / f"{path.name}-exported"
    save(model, out, PretrainedModel(kind="pretrained", path=str(path), head=head), classes=None)  # type: ignore[arg-type]
    load = {CLASSIFIER: "AutoModelForSequenceClassification", LANGUAGE_MODEL: "AutoModelForCausalLM"}[head]
    network, loading = getattr(transformers, load).from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), f"{targets}: {loading}"
    with torch.no_grad():
        found = network.eval()(input_ids=rows, use_cache=False).logits
    return float((found - wanted).abs().max() / wanted.abs().max())


@swept(
    {
        CLASSIFIER: ["bert", "big_bird", "deberta", "opt", "t5", "xlnet"],
        LANGUAGE_MODEL: ["deepseek_v3", "gpt2", "mamba", "mixtral"],
    }
)
def test_an_export_has_the_logits_of_the_run_whatever_is_added_to_or_the_target_is_refused_before(
    head: str, family: str, tmp_path: Path
) -> None:
    path = write_architecture(tmp_path / "model", family, head=head)
    if head == CLASSIFIER and family in REFUSED:
        pytest.skip(f"a {family} is refused as a classifier with or without additions")
    names = layer_names(a_model(path, head).network)
    draw = random.Random(family)
    targets = [[name] for name in names] + [sorted(draw.sample(names, k=2)) for _ in range(4)]
    experts = EXPERT_NAMES.get(family, [])
    targets += [names.split(",") for names in experts]
    results = {",".join(names): refusal_or_difference(path, head, names) for names in targets}
    for target, result in results.items():
        is_refused = isinstance(result, str) and result.startswith("model.lora.target_modules: ")
        assert is_refused or (isinstance(result, float) and result < 1e-4), f"{target}: {result}"
    assert len([result for result in results.values() if isinstance(result, float)]) >= 1, results
    assert all(isinstance(results[names], float) for names in experts), results


@pytest.mark.parametrize(
    ("head", "family", "target"),
    [
        (CLASSIFIER, "big_bird", "pooler"),  # not called
        (CLASSIFIER, "deberta", "rel_embeddings"),  # its weight is read
        (LANGUAGE_MODEL, "mamba", "dt_proj"),  # its weight is read
        (CLASSIFIER, "opt", "embed_positions"),  # looked up in another way
        (LANGUAGE_MODEL, "mixtral", "w1"),  # one tensor with w3
        (LANGUAGE_MODEL, "gpt2", "ln_f"),  # no matrix
    ],
)
def test_a_target_that_could_not_be_exported_is_refused_by_name(
    head: str, family: str, target: str, tmp_path: Path
) -> None:
    path = write_architecture(tmp_path / "model", family, head=head)
    result = refusal_or_difference(path, head, [target])
    assert isinstance(result, str)
    assert target in result
    assert str(path) in result


def test_a_misspelt_target_beside_a_right_one_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "model", "bert", head=CLASSIFIER)
    with pytest.raises(ConfigError, match=r"has no layer that is called qeury \(nearest: query\)"):
        a_model(path, CLASSIFIER, lora={"target_modules": ["value", "qeury"]})


def test_a_head_that_is_added_to_is_untied_from_the_embeddings_and_the_user_is_told(tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "model", "gpt2", head=LANGUAGE_MODEL)
    assert a_model(path, LANGUAGE_MODEL).network.config.tie_word_embeddings
    model = a_model(path, LANGUAGE_MODEL, lora={"target_modules": ["lm_head"]})
    (notice,) = model.notices
    assert "transformer.wte.weight and lm_head.weight" in notice
    assert "tie_word_embeddings: false" in notice


@swept({CLASSIFIER: ["bert", "fnet", "gpt2", "mobilebert", "t5", "xlnet"]})
def test_a_row_has_the_same_logits_alone_and_beside_longer_ones_or_the_model_is_refused(
    head: str, family: str, tmp_path: Path
) -> None:
    path = write_architecture(tmp_path / "model", family, head=head)
    if family in REFUSED:
        with pytest.raises(ConfigError, match=r"takes notice of padding on either side|cannot compute rows of 10"):
            a_model(path, head)
        return
    model = a_model(path, head).eval()
    rows = some_rows(model, lengths=[3, 12, 7, 5])
    with torch.no_grad():
        together, alone = model(rows), torch.cat([model(row[None]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
    assert model.pads_left == (family == "xlnet")
    assert any("short rows have it at their beginning" in notice for notice in model.notices) == model.pads_left
    assert not torch.allclose(alone[0], alone[1])


@swept({CLASSIFIER: ["bert", "longformer", "mpnet", "roberta", "xlm-roberta"], LANGUAGE_MODEL: ["gpt2", "opt"]})
def test_a_row_of_as_many_tokens_as_the_model_has_positions_goes_through_and_one_more_does_not(
    head: str, family: str, tmp_path: Path
) -> None:
    pad = 1 if family == "mpnet" else 3
    path = write_architecture(tmp_path / "model", family, head=head, pad_token_id=pad)
    positions = num_positions(str(path))
    if positions is None or (head == CLASSIFIER and family in REFUSED):
        return
    model = a_model(path, head).eval()
    is_a_table = any(
        isinstance(part, nn.Embedding) and "pos" in name and part.num_embeddings <= 80 and "rel" not in name
        for name, part in model.named_modules()
    )
    with torch.no_grad():
        model(some_rows(model, lengths=[positions]))
        if is_a_table:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, positions + 1), 5))


@swept({CLASSIFIER: ["bert", "deberta", "gpt2", "t5", "xlm", "xlnet"], LANGUAGE_MODEL: ["llama"]})
def test_nothing_that_the_lowest_blocks_depend_on_trains_where_they_are_frozen(
    head: str, family: str, tmp_path: Path
) -> None:
    path = write_architecture(tmp_path / "model", family, head=head)
    if family in WITHOUT_BLOCKS or (head == CLASSIFIER and family in REFUSED):
        with pytest.raises(ConfigError):
            a_model(path, head, frozen_layers=1)
        return
    model = a_model(path, head, frozen_layers=1)
    network: Any = model.network
    mask = {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    outputs = network(input_ids=some_rows(model, lengths=[9, 9]), output_hidden_states=True, use_cache=False, **mask)
    of_encoder = outputs.encoder_hidden_states if "encoder_hidden_states" in outputs else outputs.hidden_states
    after_first = 0 if family in ("mamba", "rwkv") else 1  # these two do not list the embeddings
    assert not of_encoder[after_first].requires_grad, sorted(trained(model))
    assert outputs.logits.requires_grad
    assert any(parameter.requires_grad for name, parameter in network.named_parameters() if ".1." in name)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_frozen_blocks_are_those_of_the_encoder_and_of_the_decoder_and_the_embeddings_of_both(tmp_path: Path) -> None:
    path = write_architecture(tmp_path / "model", "bart", head=CLASSIFIER)
    names = trained(a_model(path, CLASSIFIER, frozen_layers=2))
    assert {name.partition(".dense")[0].partition(".out_proj")[0] for name in names} == {"network.classification_head"}
    names = trained(a_model(path, CLASSIFIER, frozen_layers=1))
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"encoder", "decoder"}
    assert not any(".layers.0." in name or "embed" in name for name in names)


def test_a_model_that_also_takes_images_is_a_classifier_of_texts_as_it_is_exported(tmp_path: Path) -> None:
    import transformers

    text = {**CLASSIFIERS["gemma3_text"], "vocab_size": VOCABULARY, "pad_token_id": 0}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, pad_token_id=0, eos_token_id=1
    )
    path = tmp_path / "model"
    transformers.Gemma3ForSequenceClassification(config).save_pretrained(path)
    assert refusal_or_difference(path, CLASSIFIER, ["q_proj"]) < 1e-4  # type: ignore[operator]
    assert any(".layers.1." in name for name in trained(a_model(path, CLASSIFIER, frozen_layers=1)))

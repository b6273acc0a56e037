"""Directories of tiny random models and tokenizers, as `save_pretrained` of transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ("good", "bad", "fine", "awful", "food", "dog", "tea", "the", "a", "was", "is", "very", "not")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
NUM_TOKENS = len(SPECIAL) + len(WORDS)


def write_model(directory: Path, *, family: str = "bert", **options: Any) -> Path:
    """Write a model of two blocks with random weights, without a head, and a tokenizer of words."""
    import transformers

    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": NUM_TOKENS, "pad_token_id": 0}
    if family == "bert":
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        sizes |= {"max_position_embeddings": 32}
    if family == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.AutoConfig.for_model(family, **{**sizes, **options})
    transformers.AutoModel.from_config(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


END = "<|endoftext|>"


def write_language_model(directory: Path, texts: list[str], *, family: str = "gpt2", **options: Any) -> Path:
    """Write a causal language model of two blocks with random weights and byte-level BPE, as transformers does."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(directory)
    end = tokenizer.token_to_id(END)
    # Three tokens more than the tokenizer makes, as models have that round their vocabulary up.
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size() + 3, "bos_token_id": end, "eos_token_id": end}
    if family == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        sizes |= {"intermediate_size": 64, "max_position_embeddings": 32}
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **{**sizes, **options})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer that puts [CLS] before the words of a text and [SEP] behind."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))


def write_reviews(path: Path, *, rows: int = 60) -> Path:
    """Write a csv of short reviews, which are great where they say good or fine."""
    generator = torch.Generator().manual_seed(3)
    lines = ["review,score"]
    for row in range(rows):
        length = 1 + int(torch.randint(9, (), generator=generator))
        words = [WORDS[int(place)] for place in torch.randint(4, len(WORDS), (length,), generator=generator)]
        verdict = ("good", "bad", "fine", "awful")[row % 4]
        lines.append(f"{' '.join([*words, verdict])},{'great' if row % 2 == 0 else 'other'}")
    path.write_text("\n".join(lines) + "\n")
    return path


def config_values(folder: Path, directory: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run of ten updates of the model in `directory` on rows in `folder`; `sections` are laid over its own."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "output_root": str(folder / "runs"), "max_steps": 10, "seed": 3},
        "model": {"kind": "pretrained", "path": str(directory)},
        "data": {
            "source": "text_table",
            "path": str(folder / "reviews.csv"),
            "text": "review",
            "target": "score",
            "max_tokens": 8,
            "global_batch": 8,
        },
        "task": {"kind": "classification", "num_classes": 2},
        "optim": {"kind": "adamw", "peak_lr": 1e-2, "weight_decay": 0.1},
        "checkpoint": {"every_steps": 5, "keep_last": 9},
    }
    return {name: {**values.get(name, {}), **sections.get(name, {})} for name in values | sections}

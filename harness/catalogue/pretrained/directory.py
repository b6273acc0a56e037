"""What is in the directory of a pretrained model, as far as it can be told without torch; no code of it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.catalogue.pretrained.section import PretrainedModel
from harness.catalogue.text.section import PretrainedTokenizer, TextData
from harness.catalogue.text_table.section import TextTableData
from harness.config.run_config import RunConfig
from harness.errors import ConfigError

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NUM_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NUM_POSITIONS = ("max_position_embeddings", "n_positions")
"""What architectures call these numbers."""
FROM_PAD = (
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Architectures whose first place of a row is the one after the id of their padding token."""
BLOCK_SPARSE = ("big_bird", "bigbird_pegasus")


def pretrained_problems(config: RunConfig, *, must_be_there: bool) -> list[str]:
    """Return what is wrong with the directories that a run wants to start from, one `path: problem` a line.

    Args:
        must_be_there: whether one that is missing is a problem, since the run is to start here.
    """
    problems: list[str] = []
    model, data = config.model, config.data
    directories = [getattr(model, "path", None), getattr(data, "tokenizer", None)]
    if not must_be_there and not all(Path(path).is_dir() for path in directories if isinstance(path, str)):
        return []
    if isinstance(model, PretrainedModel):
        problems += _model_problems(model)
        if isinstance(data, TextTableData | TextData) and not problems:
            key, tokens = ("max_tokens", data.max_tokens) if isinstance(data, TextTableData) else ("block", data.block)
            positions = num_positions(model.path)
            if positions is not None and tokens > positions:
                problems.append(
                    f"data.{key}: {tokens:,} is more than the {positions:,} tokens that {model.path} has positions "
                    f"for; use {positions} or less"
                )
    if isinstance(data, TextTableData) and data.tokenizer is not None and not problems:
        problems += _tokenizer_problems(data.tokenizer)
    if isinstance(data, TextData) and isinstance(data.tokenizer, PretrainedTokenizer) and not problems:
        problems += _byte_level_problems(data.tokenizer.path)
    return problems


def read_config(directory: str) -> dict[str, Any]:
    """Return what config.json says.

    Raises:
        ConfigError: there is none, or it is not a JSON object.
    """
    path = Path(directory) / CONFIG
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path.absolute()}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); copy the model's directory again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}, wanted an object; copy the model's directory again")
    return found


def pad_token_id(directory: str) -> int:
    """Return the token that fills up short texts: config.json's, or the end of the text where it names none.

    Raises:
        ConfigError: it names neither.
    """
    found = read_config(directory)
    ends = found.get("eos_token_id")
    pad = found.get("pad_token_id")
    pad = pad if pad is not None else ends[0] if isinstance(ends, list) and ends else ends
    if not isinstance(pad, int):
        raise ConfigError(f"{Path(directory) / CONFIG}: has neither pad_token_id nor eos_token_id; add pad_token_id")
    return pad


def num_positions(directory: str) -> int | None:
    """Return how many tokens of a row the model has positions for; None where it sets no limit."""
    found = read_config(directory)
    positions, family = _first_of(found, NUM_POSITIONS), found.get("model_type")
    if positions is None or found.get("position_embedding_type") == "rotary":
        return positions
    if family == "mpnet":  # whatever its padding token is
        return positions - 2
    return positions - pad_token_id(directory) - 1 if family in FROM_PAD else positions


def end_token_id(directory: str) -> int:
    """Return the token that ends a document of a causal language model.

    Raises:
        ConfigError: config.json names none.
    """
    ends = read_config(directory).get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    if not isinstance(end, int):
        raise ConfigError(f"{Path(directory) / CONFIG}: has no eos_token_id, which ends a document; add it")
    return end


def vocabulary_size(directory: str) -> int:
    """Return how many tokens the model has an embedding for, which may be more than its tokenizer makes.

    Raises:
        ConfigError: config.json does not say.
    """
    size = read_config(directory).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{Path(directory) / CONFIG}: has no vocab_size; is it of a language model?")
    return size


def _model_problems(model: PretrainedModel) -> list[str]:
    directory = Path(model.path)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "there is no such directory"
        return [
            f"model.path: {directory.absolute()}: {what}; wanted: a local directory with {CONFIG} and {WEIGHTS} "
            "(names of a hub are not looked up). harness data prepare minilm writes data/all-MiniLM-L6-v2"
        ]
    try:
        found = read_config(model.path)
    except ConfigError as error:
        return [f"model.path: {error.args[0]}"]
    problems = []
    if "auto_map" in found:
        problems.append(
            f"model.path: {directory / CONFIG} has auto_map, which is code of its own; that is never run. Use a "
            "model of an architecture that transformers has, or take auto_map out if it has this one"
        )
    if not isinstance(found.get("model_type"), str):
        problems.append(f"model.path: {directory / CONFIG} has no model_type; is it of another library?")
    problems += _weight_problems(directory)
    problems += [f"model.path: {directory / CONFIG} {problem}" for problem in _architecture_problems(found)]
    if model.head == "causal_lm" and "vocab_size" not in found and "text_config" in found:
        problems.append(
            f"model.path: {directory / CONFIG} has a text_config: the model takes more than text; use the directory "
            "that its text part was saved to"
        )
    num_blocks = _first_of(found, NUM_BLOCKS)
    if model.frozen_layers is not None and num_blocks is not None and model.frozen_layers > num_blocks:
        problems.append(
            f"model.frozen_layers: {model.frozen_layers} is more than the {num_blocks} blocks of {directory}; use "
            f"{num_blocks} or less"
        )
    if model.lora is not None and model.lora.target_modules is None and model.frozen_layers == num_blocks:
        problems.append(
            f"model.lora: model.frozen_layers keeps all {num_blocks} blocks of {directory} as they are, so none of its "
            "additions would train; use less, or model.lora=null"
        )
    return problems


def _architecture_problems(found: dict[str, Any]) -> list[str]:
    """Return what transformers would refuse in a config.json when the run starts, or what would train wrongly."""
    problems = []
    vocabulary, pad = found.get("vocab_size"), found.get("pad_token_id")
    if "quantization_config" in found:
        problems.append(
            "has a quantization_config: its weights are rounded to few bits and cannot be trained; use the model that "
            "they were made from"
        )
    if isinstance(vocabulary, int) and isinstance(pad, int) and not 0 <= pad < vocabulary:
        problems.append(
            f"has the pad_token_id {pad}, but tokens from 0 to {vocabulary - 1:,}; write one of these there, such as "
            "that of eos_token_id"
        )
    width, heads = _first_of(found, ("hidden_size", "n_embd")), _first_of(found, ("num_attention_heads", "n_head"))
    has_own_width = any("head_dim" in name or name in ("d_head", "d_kv") for name in found)
    if width and heads and width % heads and not has_own_width:
        problems.append(f"divides {width} numbers a token among {heads} heads, which leaves a rest; mend the file")
    attention = found.get("_attn_implementation") or found.get("attn_implementation")
    if attention not in (None, "eager", "sdpa"):
        problems.append(f"asks for the attention {attention!r}; take that out, so that torch's own is used")
    if found.get("model_type") in BLOCK_SPARSE and found.get("attention_type", "block_sparse") == "block_sparse":
        problems.append(
            "has the attention_type block_sparse, which is another network in short batches; write original_full there"
        )
    problems += [
        f"leaves out whole blocks at random ({name}: {rate}), whose parameters then have no gradient; write 0 there"
        for name, rate in found.items()
        if name.endswith("layerdrop") and rate
    ]
    return problems


def _weight_problems(directory: Path) -> list[str]:
    if (directory / WEIGHTS).is_file():
        return []
    if (directory / INDEX).is_file():
        try:
            parts = sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))
            missing = [part for part in parts if not (directory / part).is_file()]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            return [f"model.path: {directory / INDEX} cannot be read ({error}); copy the model's directory again"]
        return [
            f"model.path: {directory} lacks {part}, which {INDEX} names; copy the model's directory again"
            for part in missing[:1]
        ]
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        return [
            f"model.path: {directory} holds its weights only as a pickle ({pickled[0]}), which can run code when it is "
            f'read; wanted: {WEIGHTS}. Where you trust the file, convert it: python -c "from transformers import '
            f"AutoModel as M; M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
        ]
    return [f"model.path: {directory} has no {WEIGHTS}; copy the model's directory again"]


def _tokenizer_problems(directory: str) -> list[str]:
    if not (Path(directory) / TOKENIZER).is_file():
        return [
            f"data.tokenizer: {Path(directory).absolute()} has no {TOKENIZER}; give a directory that has one in "
            "data.tokenizer"
        ]
    try:
        pad_token_id(directory)
    except ConfigError as error:
        return [f"data.tokenizer: {error.args[0]}"]
    return []


def _byte_level_problems(directory: str) -> list[str]:
    """Only a tokenizer of bytes gives every text back, which bits per byte rest on."""
    path = Path(directory) / TOKENIZER
    try:
        described = json.loads(path.read_bytes())
        end_token_id(directory)
        vocabulary_size(directory)
    except ConfigError as error:
        return [f"data.tokenizer.path: {error.args[0]}"]
    except OSError as error:
        return [
            f"data.tokenizer.path: {path.absolute()}: {error.strerror}; give the directory of the model's tokenizer"
        ]
    except (ValueError, RecursionError) as error:
        return [f"data.tokenizer.path: {path} is not JSON ({error}); copy the model's directory again"]
    splitters = described.get("pre_tokenizer") if isinstance(described, dict) else None
    steps = splitters.get("pretokenizers", [splitters]) if isinstance(splitters, dict) else []
    of_bytes = [step for step in steps if isinstance(step, dict) and step.get("type") == "ByteLevel"]
    if not of_bytes:
        return [
            f"data.tokenizer.path: {path} is no byte-level tokenizer, so its tokens may not give a text back and bits "
            "per byte mean nothing; use a model that has one, such as GPT-2, Llama 3 or Qwen"
        ]
    if any(step.get("add_prefix_space") for step in of_bytes):
        return [f"data.tokenizer.path: {path} puts a space before every text; set add_prefix_space to false in it"]
    return []


def _first_of(found: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((found[name] for name in names if isinstance(found.get(name), int)), None)

"""Networks of `transformers` from a local directory: safetensors only, no code of the directory, no network.

The one file with the names transformers and peft.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.models import Lora, PretrainedModel
from harness.config.pretrained import pad_token_id, read_config
from harness.errors import ConfigError

PREFIX = "network."
"""Of every name in our checkpoints; what follows is transformers' name."""


class Pretrained(nn.Module):
    """A network of transformers: (B, T) int64 tokens -> (B, num_outputs), or (B, T, V) of a causal language model.

    Args:
        network: takes `input_ids` and `attention_mask`, returns `logits`.
        pad_token_id: tokens that no other token attends to; None where rows are full, as those of running text are.
        lr_factors: of the learning rate, by the names of this module's parameters; 1 where there is none.
    """

    def __init__(self, network: nn.Module, *, pad_token_id: int | None, lr_factors: Mapping[str, float]) -> None:
        super().__init__()
        self.network = network
        self.pad_token_id = pad_token_id
        self.lr_factors = lr_factors

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor
        if self.pad_token_id is None:
            logits = self.network(input_ids=tokens).logits
            return logits
        is_token = tokens != self.pad_token_id  # (B, T)
        if tokens.device.type == "cpu":  # reading a length would make a GPU wait
            longest = int(is_token.any(dim=0).nonzero().max()) + 1
            tokens, is_token = tokens[:, :longest], is_token[:, :longest]
        logits = self.network(input_ids=tokens, attention_mask=is_token.long()).logits
        return logits


def build(config: PretrainedModel, *, num_outputs: int) -> nn.Module:
    """Return the network of a directory with its weights; a head that it does not have is drawn at random.

    Raises:
        ConfigError: transformers or peft is not installed, does not know the architecture with this head, or the
            weights are not those of config.json.
    """
    transformers = _import_transformers()
    architecture = _architecture(transformers, config, num_outputs=num_outputs)
    network, drawn = _load(transformers, config, architecture)
    if config.lora is not None:
        network = _with_lora(network, config.lora, path=config.path)
    depths = dict(_depths(network, config))
    if config.lora is not None:
        body = f"{network.base_model_prefix}."
        for name, parameter in network.named_parameters():
            is_new_head = not name.startswith(body) and (config.head == "sequence_classification" or name in drawn)
            parameter.requires_grad_("lora_" in name or is_new_head)
    if config.frozen_layers is not None:
        for name, parameter in network.named_parameters():
            if depths[name] > architecture.num_hidden_layers - config.frozen_layers:
                parameter.requires_grad_(False)
    factors = {f"{PREFIX}{name}": config.layer_lr_decay**depth for name, depth in depths.items()}
    pad = pad_token_id(config.path) if config.head == "sequence_classification" else None
    return Pretrained(network, pad_token_id=pad, lr_factors=factors)


def describe(config: PretrainedModel, *, num_outputs: int, classes: Sequence[str] | None) -> dict[str, Any]:
    """Return what transformers' config.json says of the network that `build` returns, with the names of the classes."""
    transformers = _import_transformers()
    architecture = _architecture(transformers, config, num_outputs=num_outputs)
    if config.head == "sequence_classification" and classes is not None:
        architecture.id2label = dict(enumerate(classes))
        architecture.label2id = {name: label for label, name in enumerate(classes)}
    architecture.use_cache = read_config(config.path).get("use_cache", True)  # training alone has no use for it
    architecture.architectures = [_family(transformers, config)._model_mapping[type(architecture)].__name__]
    described: dict[str, Any] = architecture.to_dict()
    return described


class TransformersTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by transformers' names, LoRA's additions added, each read when it is asked for.

    Args:
        saved: by the names of the module that `build` returns for this config.
    """

    def __init__(self, saved: Mapping[str, Tensor], config: PretrainedModel, *, num_outputs: int) -> None:
        self._saved, self._lora = saved, config.lora
        self._transposed = set() if config.lora is None else _transposed_layers(config, num_outputs=num_outputs)
        names = [name.removeprefix(PREFIX) for name in saved if ".lora_" not in name]
        self._saved_name = {name.replace(".base_layer.", "."): f"{PREFIX}{name}" for name in names}

    def __getitem__(self, name: str) -> Tensor:
        saved_name = self._saved_name[name]
        tensor = self._saved[saved_name]
        layer, _, last = saved_name.rpartition(".base_layer.")
        if self._lora is None or last != "weight":
            return tensor
        down, up = (self._saved[f"{layer}.lora_{side}.default.weight"] for side in "AB")  # (rank, in), (out, rank)
        addition = (up @ down) * (self._lora.alpha / self._lora.rank)
        return tensor + (addition.T if layer.removeprefix(PREFIX) in self._transposed else addition)

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved_name)

    def __len__(self) -> int:
        return len(self._saved_name)


def _transposed_layers(config: PretrainedModel, *, num_outputs: int) -> set[str]:
    """Return the names of the layers whose matrices are (in, out), as in GPT-2; no weight is read."""
    transformers = _import_transformers()
    architecture = _architecture(transformers, config, num_outputs=num_outputs)
    with torch.device("meta"):
        network = _family(transformers, config).from_config(architecture)
    return {name for name, part in network.named_modules() if isinstance(part, transformers.pytorch_utils.Conv1D)}


def _import_transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"model.kind: pretrained needs transformers, which cannot be imported ({error}); "
            "pip install 'harness-train[pretrained]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _family(transformers: Any, config: PretrainedModel) -> Any:
    if config.head == "sequence_classification":
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def _architecture(transformers: Any, config: PretrainedModel, *, num_outputs: int) -> Any:
    try:
        architecture = transformers.AutoConfig.from_pretrained(
            config.path, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"model.path: transformers {transformers.__version__} cannot use {config.path}/config.json: {error}"
        ) from error
    family = _family(transformers, config)
    if type(architecture) not in family._model_mapping:
        raise ConfigError(
            f"model.path: {config.path} is a {architecture.model_type}, which transformers "
            f"{transformers.__version__} does not have with the head {config.head}; take another model or model.head"
        )
    if config.head == "sequence_classification":
        architecture.num_labels = num_outputs
        architecture.problem_type = None
        architecture.pad_token_id = pad_token_id(config.path)
    elif architecture.vocab_size != num_outputs:
        raise ConfigError(
            f"model.path: {config.path} has a vocabulary of {architecture.vocab_size:,}, the data one of "
            f"{num_outputs:,}; use the tokenizer of the model"
        )
    architecture.use_cache = False
    if config.dropout is not None:
        rates = [
            name
            for name, value in vars(architecture).items()
            if re.search("dropout|pdrop", name) and isinstance(value, float | int | None)
        ]
        if not rates:
            raise ConfigError(f"model.dropout: the {architecture.model_type} of {config.path} has none; leave it out")
        for name in rates:
            setattr(architecture, name, config.dropout)
    return architecture


def _load(transformers: Any, config: PretrainedModel, architecture: Any) -> tuple[Any, set[str]]:
    """Return the network, and the names of the parameters that its files do not have, which were drawn at random."""
    try:
        network, loading = _family(transformers, config).from_pretrained(
            config.path,
            config=architecture,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ConfigError(f"model.path: {config.path} cannot be loaded: {type(error).__name__}: {error}") from error
    body = f"{network.base_model_prefix}."
    missing = sorted(name for name in loading["missing_keys"] if name.startswith(body) and "pooler" not in name)
    wrong = missing + sorted(str(name) for name in loading["mismatched_keys"])
    if wrong:
        raise ConfigError(
            f"model.path: the weights of {config.path} are not those of its config.json, a "
            f"{architecture.model_type}: {len(wrong)} tensors are missing or of another shape, such as {wrong[0]}. "
            "Copy the model's directory again"
        )
    return network, set(loading["missing_keys"])


def _with_lora(network: Any, lora: Lora, *, path: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"model.lora: needs peft, which cannot be imported ({error}); pip install 'harness-train[lora]', or "
            "model.lora=null"
        ) from error
    targets = None if lora.target_modules is None else list(lora.target_modules)
    options = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # it mends that itself
            return peft.inject_adapter_in_model(options, network)
    except ValueError as error:
        layers = {name.rpartition(".")[2] for name, part in network.named_modules() if isinstance(part, nn.Linear)}
        raise ConfigError(
            f"model.lora.target_modules: peft refuses them for {path}: {error} Its linear layers are called "
            f"{', '.join(sorted(layers))}"
        ) from error


def _depths(network: Any, config: PretrainedModel) -> Iterator[tuple[str, int]]:
    """Yield (parameter name, depth): 0 for the head, 1 for the highest block, one more for the embeddings than for the
    lowest block (as in arXiv:2106.08254).

    Embeddings are what comes before the first block.

    Raises:
        ConfigError: depths are wanted and there are no blocks.
    """
    num_blocks = network.config.num_hidden_layers
    lists = [
        name for name, part in network.named_modules() if isinstance(part, nn.ModuleList) and len(part) == num_blocks
    ]
    names = [name for name, _ in network.named_parameters()]
    if not lists:
        if config.frozen_layers is not None or config.layer_lr_decay != 1.0:
            raise ConfigError(
                f"model.frozen_layers and model.layer_lr_decay want a list of {num_blocks} blocks, which the "
                f"{network.config.model_type} of {config.path} does not have; leave both out"
            )
        yield from ((name, 0) for name in names)
        return
    depth = num_blocks + 1
    for name in names:
        block = re.match(rf"{re.escape(lists[0])}\.(\d+)\.", name)
        if block:
            depth = num_blocks - int(block[1])
        elif depth != num_blocks + 1:
            depth = 0
        yield name, depth

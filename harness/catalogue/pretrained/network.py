"""Networks of `transformers` from a local directory: safetensors only, no code of the directory, no network.

The one file with the name transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.catalogue.pretrained.directory import CONFIG, pad_token_id, read_config
from harness.catalogue.pretrained.lora import add_lora, check_targets, merge
from harness.catalogue.pretrained.section import PretrainedModel
from harness.errors import ConfigError
from harness.strategy.graph import parameters_behind

PREFIX = "network."
"""Of every name in our checkpoints; what follows is transformers' name."""
SAME = 1e-3
"""Of the largest logit: how far logits that should be equal may be apart in fp32, which adds up in another order."""


class Pretrained(nn.Module):
    """A network of transformers: (B, T) int64 tokens -> (B, num_outputs), or (B, T, V) of a causal language model.

    Args:
        network: takes `input_ids` and `attention_mask`, returns `logits`.
        pad_token_id: tokens that no other token attends to; None where rows are full, as those of running text are.
    """

    pads_left = False
    """Whether short rows are filled up at their beginning, for a network that looks at the last place of a row."""
    lr_factors: Mapping[str, float] = {}
    """Of the learning rate, by the names of this module's parameters; 1 where there is none."""
    notices: tuple[str, ...] = ()
    """What the user should read of how it was built."""
    merge: Callable[[], None] | None = None
    """Adds what LoRA has learned to the weights; None without LoRA."""
    adds_to_tensors = False
    """Whether LoRA adds to tensors that no layer of their own has, as experts are kept in."""

    def __init__(self, network: nn.Module, *, pad_token_id: int | None) -> None:
        super().__init__()
        self.network = network
        self.pad_token_id = pad_token_id

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor
        if self.pad_token_id is None:
            logits = self.network(input_ids=tokens).logits
            return logits
        is_token = tokens != self.pad_token_id  # (B, T)
        if tokens.device.type == "cpu":  # reading a length would make a GPU wait
            longest = int(is_token.any(dim=0).nonzero().max()) + 1
            tokens, is_token = tokens[:, :longest], is_token[:, :longest]
        if self.pads_left:
            places = torch.arange(tokens.shape[1], device=tokens.device) + is_token.sum(dim=1, keepdim=True)
            places = places % tokens.shape[1]  # (B, T): what is behind the last token comes first
            tokens, is_token = tokens.gather(1, places), is_token.gather(1, places)
        logits = self.network(input_ids=tokens, attention_mask=is_token.long()).logits
        return logits


def build(config: PretrainedModel, *, num_outputs: int) -> Pretrained:
    """Return the network of a directory with its weights; a head that it does not have is drawn at random.

    Raises:
        ConfigError: transformers or peft is not installed, does not know the architecture with this head, the weights
            are not those of config.json, or the network cannot do what the config asks of it.
    """
    transformers = _import_transformers()
    architecture = _architecture(transformers, config, num_outputs=num_outputs)
    network, drawn, notices = _load(transformers, config, architecture)
    model = Pretrained(network, pad_token_id=architecture.pad_token_id if _classifies(config) else None)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # some networks draw even when they evaluate
        if _classifies(config):
            _choose_padding(model, config)
    if model.pads_left:
        notices = (*notices, f"{config.path} takes notice of padding at the end: short rows have it at their beginning")
    if config.lora is not None:
        tuner, said = add_lora(network, config.lora, path=config.path)
        model.merge, notices = partial(merge, tuner), (*notices, *said)
        model.adds_to_tensors = bool(tuner.targeted_parameter_names)
    model.notices = notices
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        if config.lora is not None:
            logits = _logits(model, some_rows(model, lengths=[6]), config)
            check_targets(network, logits, config.lora, path=config.path)
        depths = _depths(model, config)
    model.lr_factors = {f"{PREFIX}{name}": config.layer_lr_decay**depth for name, depth in depths.items()}
    deepest = None if config.frozen_layers is None else _num_blocks(network) - config.frozen_layers
    body = f"{network.base_model_prefix}."
    for name, parameter in network.named_parameters():
        is_added, plain_name = ".lora_" in name, name.replace(".base_layer.", ".")
        is_new = plain_name in drawn or (_classifies(config) and not name.startswith(body))
        is_frozen = (config.lora is not None and not is_added) or (deepest is not None and depths[name] > deepest)
        parameter.requires_grad_((is_added or plain_name in trainable) and (is_new or not is_frozen))
    return model.train()


def save(model: Pretrained, directory: Path, config: PretrainedModel, *, classes: Sequence[str] | None) -> Pretrained:
    """Write a network with its weights for transformers, and return what transformers makes of the files.

    What LoRA added is merged into `model`, which is of no use afterwards.

    Args:
        classes: the names of the classes of a classifier, where they have some.
    """
    network: Any = model.network
    architecture = network.config
    if model.merge is not None:
        model.merge()
    if _classifies(config):
        names = classes or [f"LABEL_{label}" for label in range(architecture.num_labels)]
        architecture.id2label = dict(enumerate(names))
        architecture.label2id = {name: label for label, name in enumerate(names)}
    architecture.use_cache = read_config(config.path).get("use_cache", True)  # training alone has no use for it
    network.save_pretrained(directory)
    # save_pretrained leaves out what is as in any config, such as two labels, also where this architecture has three.
    architecture.to_json_file(directory / CONFIG, use_diff=False)
    family = _family(_import_transformers(), config)
    loaded = Pretrained(
        family.from_pretrained(directory, local_files_only=True, use_safetensors=True), pad_token_id=model.pad_token_id
    )
    loaded.pads_left = model.pads_left
    return loaded.eval()


def some_rows(model: Pretrained, *, lengths: Sequence[int]) -> Tensor:
    """Return (len(lengths), max(lengths)) tokens, always the same, filled up at the end, for two networks to compare.

    They end in the token that ends a text, which some classifiers look at, and have it nowhere else.
    """
    network: Any = model.network
    architecture = network.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ends = architecture.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    some = [token for token in range(_vocabulary_size(model)) if token not in (end, model.pad_token_id)]
    rows = torch.tensor(some)[torch.randint(len(some), (len(lengths), max(lengths)), generator=generator)]
    for row, length in zip(rows, lengths, strict=True):
        row[length - 1] = row[length - 1] if end is None or end == model.pad_token_id else end
        if model.pad_token_id is not None:
            row[length:] = model.pad_token_id
    return rows


def largest_difference(logits: Tensor, others: Tensor) -> float:
    """Return how far two tensors of logits are apart, in units of the largest; NaN where either has one."""
    logits, others = logits.detach(), others.detach()
    return float((logits - others).abs().max() / logits.abs().max().clamp(min=torch.finfo(logits.dtype).tiny))


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


def _classifies(config: PretrainedModel) -> bool:
    return config.head == "sequence_classification"


def _family(transformers: Any, config: PretrainedModel) -> Any:
    if _classifies(config):
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def _architecture(transformers: Any, config: PretrainedModel, *, num_outputs: int) -> Any:
    try:
        architecture = transformers.AutoConfig.from_pretrained(
            config.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers has no kind of its own
        raise ConfigError(
            f"model.path: transformers {transformers.__version__} cannot use {config.path}/config.json: "
            f"{type(error).__name__}: {error}"
        ) from error
    family = _family(transformers, config)
    if type(architecture) not in family._model_mapping:
        raise ConfigError(
            f"model.path: {config.path} is a {architecture.model_type}, which transformers "
            f"{transformers.__version__} does not have with the head {config.head}; take another model or model.head"
        )
    if _classifies(config):
        architecture.num_labels = num_outputs
        architecture.problem_type = None
        architecture.pad_token_id = architecture.get_text_config().pad_token_id = pad_token_id(config.path)
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


def _load(transformers: Any, config: PretrainedModel, architecture: Any) -> tuple[Any, set[str], tuple[str, ...]]:
    """Return the network, the names of the parameters that were drawn at random, and what there is to say of them."""
    try:
        network, loading = _family(transformers, config).from_pretrained(
            config.path,
            config=architecture,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # transformers has no kind of its own
        raise ConfigError(f"model.path: {config.path} cannot be loaded: {type(error).__name__}: {error}") from error
    body = f"{network.base_model_prefix}."
    missing = sorted(name for name in loading["missing_keys"] if name.startswith(body) and "pooler" not in name)
    others = {name: (tuple(found), tuple(wanted)) for name, found, wanted in loading["mismatched_keys"]}
    wrong = missing + sorted(name for name in others if name.startswith(body) or not _classifies(config))
    if wrong:
        raise ConfigError(
            f"model.path: the weights of {config.path} are not those of its config.json, a "
            f"{architecture.model_type}: {len(wrong)} tensors are missing or of another shape, such as {wrong[0]}. "
            "Copy the model's directory again"
        )
    drawn = {name for name in loading["missing_keys"] if name not in others}
    surplus = [name for name in loading["unexpected_keys"] if _is_of_a_block(name, network)]
    if surplus:
        raise ConfigError(
            f"model.path: config.json of {config.path} has {_num_blocks(network)} blocks, its files have more: "
            f"{len(surplus)} tensors would be left out, such as {sorted(surplus)[0]}. Copy the model's directory again"
        )
    notices = []
    if drawn:
        notices.append(f"{config.path} has no {_listed(drawn)}, which begin with random numbers and are trained")
    if others:
        name, (found, wanted) = min(others.items())
        notices.append(
            f"{config.path} has a head for another number of outputs ({name} is {list(found)}, wanted: "
            f"{list(wanted)}); {_listed(others)} begin with random numbers and are trained"
        )
    return network, drawn | others.keys(), tuple(notices)


def _listed(names: set[str] | Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _is_of_a_block(name: str, network: Any) -> bool:
    """Whether a name is of a block in one of the lists that the network has too few of."""
    body, places = f"{network.base_model_prefix}.", re.findall(r"(?<=\.)\d+(?=\.)", name)
    return bool(places) and any(
        re.search(rf"(^|\.){re.escape(key.removeprefix(body))}\.({'|'.join(places)})\.", name)
        for key, _ in _block_lists(network)
    )


def _num_blocks(network: Any) -> int:
    return int(network.config.get_text_config().num_hidden_layers)


def _block_lists(network: Any) -> list[tuple[str, nn.ModuleList]]:
    """Return the outermost lists of as many parts as there are blocks; some networks have several, side by side."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, part in network.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer, _ in found)
        is_list = isinstance(part, nn.ModuleList) and len(part) == _num_blocks(network)
        if is_list and not is_inner and not isinstance(part[0], nn.ModuleList):  # Funnel's lists of lists are no blocks
            found.append((name, part))
    return found


def _logits(model: Pretrained, rows: Tensor, config: PretrainedModel) -> Tensor:
    """Return the logits of some rows, in evaluation mode.

    Raises:
        ConfigError: the network cannot go forward.
    """
    try:
        logits: Tensor = model.eval()(rows)
    except Exception as error:  # whatever a network of transformers raises
        key = "model.path" if model.merge is None else "model.lora.target_modules"
        raise ConfigError(
            f"{key}: the {_type_of(model)} of {config.path} cannot compute rows of {rows.shape[1]} tokens"
            f"{' with additions to these layers' if model.merge else ''}: {type(error).__name__}: {error}"
        ) from error
    return logits


def _choose_padding(model: Pretrained, config: PretrainedModel) -> None:
    """Fill short rows up on the side on which the network takes no notice of it.

    Raises:
        ConfigError: there is none, so that a row's logits would depend on the rows beside it.
    """
    vocabulary = _vocabulary_size(model)
    weights = ((part, getattr(part, "weight", None)) for part in model.modules())
    embeddings = [part for part, weight in weights if isinstance(weight, Tensor) and len(weight) == vocabulary]
    rows = some_rows(model, lengths=[5, 10])
    alone = _logits(model, rows[:1], config)
    for pads_left in (False, True):
        model.pads_left = pads_left
        vectors: list[Tensor] = []
        with _noting_outputs(embeddings, vectors):
            beside = _logits(model, rows, config)[:1]
        # A gradient tells of padding however small the weights are by which it comes in.
        comes_in = False
        if vectors:
            (gradient,) = torch.autograd.grad(beside.sum(), vectors[:1])  # an encoder's, where there is a decoder too
            of_rows = gradient if len(gradient) == 2 else gradient.transpose(0, 1)  # XLNet's is (T, B, C)
            comes_in = bool((of_rows[0, :5] if pads_left else of_rows[0, 5:]).any())
        if largest_difference(alone, beside) <= SAME and not comes_in:
            return
    raise ConfigError(
        f"model.path: the {_type_of(model)} of {config.path} takes notice of padding on either side: a row has other "
        "logits beside longer rows, so scores would depend on strategy.micro_batch. Take another model"
    )


def _vocabulary_size(model: Pretrained) -> int:
    network: Any = model.network
    return getattr(network.config.get_text_config(), "vocab_size", 256)  # those without one read characters


def _type_of(model: Pretrained) -> str:
    network: Any = model.network
    return str(network.config.model_type)


def _depths(model: Pretrained, config: PretrainedModel) -> dict[str, int]:
    """Return the depth of each parameter by transformers' name: 0 for the head, 1 for the highest block, one more for
    the embeddings than for the lowest block (as in arXiv:2106.08254).

    Embeddings are whatever the lowest blocks depend on that is in no block. The blocks of an encoder and of a decoder
    are counted side by side.

    Raises:
        ConfigError: depths are wanted and there are no blocks.
    """
    network: Any = model.network
    named = dict(network.named_parameters())
    if config.frozen_layers is None and config.layer_lr_decay == 1.0:
        return dict.fromkeys(named, 0)
    num_blocks, lists = _num_blocks(network), _block_lists(network)
    if not lists:
        raise ConfigError(
            f"model.frozen_layers and model.layer_lr_decay want a list of {num_blocks} blocks, which the "
            f"{_type_of(model)} of {config.path} does not have; leave both out"
        )
    behind = _behind_lowest_blocks(model, config, [blocks[0] for _, blocks in lists])
    pattern = re.compile(rf"({'|'.join(re.escape(name) for name, _ in lists)})\.(\d+)\.")
    depths = {}
    for name, parameter in named.items():
        block = pattern.match(name)
        outside = num_blocks + 1 if parameter in behind else 0
        depths[name] = num_blocks - int(block[2]) if block else outside
    return depths


def _behind_lowest_blocks(model: Pretrained, config: PretrainedModel, blocks: list[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters that what comes out of some blocks depends on."""
    outputs: list[Tensor] = []
    was_trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(True)
    # The parts of a block as well: SqueezeBERT calls a block's `forward`, which no hook hears of.
    with _noting_outputs([part for block in blocks for part in block.modules()], outputs):
        _logits(model, some_rows(model, lengths=[6]), config)
    for parameter, is_trainable in was_trainable.items():
        parameter.requires_grad_(is_trainable)
    return parameters_behind(outputs)


@contextmanager
def _noting_outputs(modules: Sequence[nn.Module], outputs: list[Tensor]) -> Iterator[None]:
    """Add the tensors that modules return inside to `outputs`."""

    def note(module: nn.Module, inputs: Any, found: Any) -> None:
        outputs.extend(_tensors(found))

    hooks = [module.register_forward_hook(note) for module in modules]
    yield
    for hook in hooks:
        hook.remove()


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, tuple | list | dict):
        for part in found.values() if isinstance(found, dict) else found:
            yield from _tensors(part)

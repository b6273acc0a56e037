"""Low-rank additions to the matrices of a network of transformers (arXiv:2106.09685), put in and merged by peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.catalogue.pretrained.section import Lora
from harness.config.problems import nearest_name
from harness.errors import ConfigError
from harness.strategy.graph import parameters_behind

KEY = "model.lora.target_modules"


def add_lora(network: Any, lora: Lora, *, path: str) -> tuple[Any, tuple[str, ...]]:
    """Put the additions into a network of transformers; return what merges them again, and what there is to say.

    A weight that a target shares with another layer, as a language model's head does with its embeddings, is made two.

    Args:
        path: of the model, for messages.
    Raises:
        ConfigError: peft is not installed or refuses a target, or a target is of no layer, or cannot be exported.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"model.lora: needs peft, which cannot be imported ({error}); pip install 'harness-train[lora]', or "
            "model.lora=null"
        ) from error
    notices = _untie(network, lora.target_modules or (), path=path)
    leaves = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    targets = None if lora.target_modules is None else list(lora.target_modules)
    options = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        with _without_warnings():
            tuner = peft.LoraModel(network, options, "default")
    except Exception as error:  # of many kinds, as a layer is one that cannot be added to
        layers = {name.rpartition(".")[2] for name, part in network.named_modules() if isinstance(part, nn.Linear)}
        raise ConfigError(
            f"{KEY}: peft refuses {', '.join(targets or ['its own choice'])} for {path}: {error} Its linear layers are "
            f"called {', '.join(sorted(layers))}"
        ) from error
    found = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    # peft has replaced names of experts that transformers keeps in one tensor by the names of these tensors.
    for target in sorted({*options.target_modules, *(options.target_parameters or ())}):
        if not any(_is_called(name, target) for name in found):
            hint = nearest_name(target, leaves)
            raise ConfigError(
                f"{KEY}: {path} has no layer that is called {target}" + (f" (nearest: {hint})" if hint else "")
            )
        for name in tuner.targeted_module_names:
            table = network.get_submodule(name).get_base_layer()
            has_own_lookup = isinstance(table, nn.Embedding) and type(table).forward is not nn.Embedding.forward
            if _is_called(name, target) and has_own_lookup and not hasattr(table, "embed_scale"):
                # peft looks rows up by the layer's arguments, where this one counts places from them.
                raise ConfigError(
                    f"{KEY}: {name} of {path} is a {type(table).__name__}, which looks its rows up in a way of its own "
                    f"that peft does not follow; leave {target} out"
                )
    return tuner, notices


def merge(tuner: Any) -> None:
    """Add the additions to the weights, and leave the network as it was before `add_lora`."""
    with _without_warnings():
        tuner.merge_and_unload()


def check_targets(network: nn.Module, logits: Tensor, lora: Lora, *, path: str) -> None:
    """Refuse a target none of whose additions the logits depend on.

    So it is where a network reads a layer's weight and does not call the layer, or calls it for other heads only.

    Raises:
        ConfigError: names the target.
    """
    used = parameters_behind([logits])
    additions = {name.partition(".lora_")[0]: p for name, p in network.named_parameters() if ".lora_" in name}
    for target in lora.target_modules or ():
        of_target = [p for name, p in additions.items() if _is_called(name, target)]
        if of_target and not used.intersection(of_target):
            raise ConfigError(
                f"{KEY}: nothing that is added to {target} reaches the logits of {path}, which does not call this "
                "layer; leave it out"
            )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out what peft warns of that it mends itself, what `_untie` has seen to, and what is not so."""
    with warnings.catch_warnings():
        for message in (
            "fan_in_fan_out is set to False",
            "Model (has|with) `tie_word_embeddings=True`",
            "Input and output embeddings are no longer tied",
            "The following (rank|alpha)_pattern keys did not match",  # peft's own, of experts, and they do
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _untie(network: Any, targets: tuple[str, ...], *, path: str) -> tuple[str, ...]:
    """Give each target a weight of its own, which the exported config.json says as well.

    Raises:
        ConfigError: the architecture has one weight for several layers whatever its config says.
    """
    shared = [
        names
        for names in _names_of_shared(network)
        if any(_is_called(name.rpartition(".")[0], target) for name in names for target in targets)
    ]
    if not shared:
        return ()
    network.config.tie_word_embeddings = False
    with torch.device("meta"):
        untied = type(network)(network.config)
    stuck = [names for names in _names_of_shared(untied) if any(set(names) & set(tied) for tied in shared)]
    if stuck:
        raise ConfigError(
            f"{KEY}: {' and '.join(stuck[0])} of {path} are one tensor in every {network.config.model_type}, so an "
            "addition to one of them could not be exported; leave it out"
        )
    for names in shared:
        for name in names[1:]:
            layer, _, last = name.rpartition(".")
            weight = network.get_parameter(name)
            setattr(network.get_submodule(layer), last, nn.Parameter(weight.detach().clone()))
    network.all_tied_weights_keys = network.get_expanded_tied_weights_keys(all_submodels=True)
    return tuple(
        f"model.lora: {' and '.join(names)} of {path} were one tensor and are trained and exported as "
        f"{len(names)} (tie_word_embeddings: false)"
        for names in shared
    )


def _names_of_shared(network: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]

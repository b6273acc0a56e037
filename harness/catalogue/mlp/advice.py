"""What `harness check` says of networks of fully connected and convolutional layers; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.catalogue.cnn.section import CnnModel
from harness.catalogue.mlp.section import SATURATING, HiddenLayers, MlpModel, PerceptronModel
from harness.config.run_config import RunConfig

DEEP = 7
"""Layers from which on a network without norms or shortcuts seldom trains."""
SMALL_BATCH = 8
"""Rows from which on downwards the statistics of BatchNorm are noise (Wu & He 2018, arXiv:1803.08494)."""
NORMS = {"batch": "BatchNorm", "layer": "LayerNorm", "rms": "RMSNorm"}


def advice(model: PerceptronModel | MlpModel | CnnModel, config: RunConfig, *, ranks: int | None) -> Iterator[str]:
    """Yield a line for each question that an introductory chapter asks of such a network."""
    yield from _init(model)
    if not isinstance(model, PerceptronModel):
        yield from (*_depth(model), *_norm(model, config, ranks), *_dropout(model), *_unused(model))
    yield from _output(model)


def _init(model: PerceptronModel | MlpModel | CnnModel) -> Iterator[str]:
    activation, init = model.activation, model.init
    if activation in ("none", "softmax") or (isinstance(model, MlpModel) and not model.hidden):
        return
    wanted = "xavier" if activation in SATURATING else "kaiming"
    if init == "auto":
        yield f"init: {wanted} for {activation}"
    elif init == "torch":
        yield f"WARNING: model.init: torch's own weights are smaller than {wanted}, which {activation} wants; use auto"
    elif init != wanted:
        yield f"WARNING: model.init: {init} does not match {activation}, which wants {wanted}; use auto"
    else:
        yield f"init: {init} for {activation}"


def num_layers(model: MlpModel | CnnModel) -> int:
    """Return how many layers with weights an input goes through, one after the other."""
    if isinstance(model, MlpModel):
        return 2 * len(model.hidden) + 2 if model.residual else len(model.hidden) + 1
    convolutions = 1 + 2 * len(model.channels) if model.residual else len(model.channels)
    return convolutions + len(model.hidden) + 1


def _depth(model: MlpModel | CnnModel) -> Iterator[str]:
    if num_layers(model) < DEEP:
        return
    layers = f"{num_layers(model)} layers"
    has_norm = all(norm != "none" for norm in (model.norms or (model.norm,)))
    if model.activation == "sigmoid" and not has_norm and not model.residual:  # each passes on a quarter at most
        yield (
            f"WARNING: model.activation: gradients vanish in {layers} of sigmoid; use relu with norm=batch, or "
            "residual=true"
        )
    elif not has_norm and not model.residual:
        yield f"WARNING: model.norm: {layers} without norms or shortcuts; use batch, or residual=true"
    else:
        helps = [name for name, is_there in {"norms": has_norm, "shortcuts": model.residual}.items() if is_there]
        yield f"depth: {layers} with {' and '.join(helps)}"


def _norm(model: HiddenLayers, config: RunConfig, ranks: int | None) -> Iterator[str]:
    if kinds := [name for kind, name in NORMS.items() if kind in model.kinds_of_norm]:
        yield f"norm: {' and '.join(kinds)} stand{'s' if len(kinds) == 1 else ''} {_place_of_norms(model)}"
    if ranks is None or not model.has_batch_norm:
        return
    rows = config.strategy.micro_batch or config.data.global_batch // ranks
    if rows <= SMALL_BATCH and not model.sync_batch_norm:
        yield (
            f"WARNING: model.norm: BatchNorm sees {rows} rows at a time ({config.data.global_batch} over {ranks} "
            "ranks); use fewer ranks, a larger data.global_batch or micro-batch, or norm=layer"
        )


def _place_of_norms(model: HiddenLayers) -> str:
    if isinstance(model, MlpModel) and model.residual:
        return "first in each block, and after the last one (pre-norm)"
    if model.residual:
        return "after each convolution, before the activation and the addition"
    return "before the activation"


def _dropout(model: HiddenLayers) -> Iterator[str]:
    if not any(model.dropouts):
        return
    dropouts = model.dropouts
    rates = ", ".join(f"{rate:g}" for rate in (dropouts if len(set(dropouts)) > 1 else dropouts[:1]))
    if isinstance(model, MlpModel) and model.residual:
        yield f"dropout: {rates} within each block, between its two layers"
    else:
        layers = "fully connected" if isinstance(model, CnnModel) else "hidden"
        yield f"dropout: {rates} after the activation of the {layers} layers"
    if max(dropouts) > 0.5:
        yield f"WARNING: model.dropout: {max(dropouts):g} drops more than it keeps; 0.1 to 0.5 is usual"
    if _first(dropouts) < _last_batch_norm(model):
        yield (
            "dropout: some stands before a later BatchNorm, whose statistics then differ between training and "
            "evaluation (Li et al. 2019, arXiv:1801.05134); dropping only after the last norm avoids it"
        )


def _unused(model: HiddenLayers) -> Iterator[str]:
    """Say of what a single value asks of all hidden layers that there is none."""
    if model.hidden:
        return
    if isinstance(model, MlpModel) and model.norm in NORMS:
        yield "WARNING: model.norm: there is no hidden layer to have it; list some in model.hidden, or use none"
    if model.dropout:
        yield "WARNING: model.dropout: there is no hidden layer to drop from; list some in model.hidden, or use 0"


def _first(dropouts: Sequence[float]) -> int:
    return next(index for index, rate in enumerate(dropouts) if rate)


def _last_batch_norm(model: HiddenLayers) -> int:
    """Return the last hidden layer that begins with, or follows upon, a BatchNorm; -1 where there is none."""
    norms = [*model.norms, *(model.norms[-1:] if isinstance(model, MlpModel) and model.residual else [])]
    return max((index for index, norm in enumerate(norms) if norm == "batch"), default=-1)


def _output(model: PerceptronModel | MlpModel | CnnModel) -> Iterator[str]:
    is_softmax = isinstance(model, PerceptronModel) and model.activation == "softmax"
    if is_softmax or (isinstance(model, MlpModel) and model.output == "softmax"):
        yield "output: softmax; the targets have to be shares of a whole, which add up to 1"

"""The design checklist of `harness check`: what an introductory chapter asks of a configuration, and its answers."""

from collections.abc import Iterator, Sequence
from typing import Any

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.cnn.section import CnnModel
from harness.catalogue.gpt.section import GptModel
from harness.catalogue.mlp.section import SATURATING, HiddenLayers, MlpModel, PerceptronModel
from harness.config.run_config import RunConfig
from harness.config.training import PlateauSchedule
from harness.launch.known_rows import KnownRows

DEEP = 7
"""Layers from which on a network without norms or shortcuts seldom trains."""
TRANSFORMERS = ("gpt", "pretrained")
SMALL_BATCH = 8
"""Rows from which on downwards the statistics of BatchNorm are noise (Wu & He 2018, arXiv:1803.08494)."""
RARE = 0.5
"""A class is rare that has less than this times the rows it would have if all had as many."""
NORMS = {"batch": "BatchNorm", "layer": "LayerNorm", "rms": "RMSNorm"}


def checklist(config: RunConfig, *, ranks: int | None, rows: KnownRows | None = None) -> list[str]:
    """Return a line for each question, `WARNING: ` before those whose answer does not fit.

    Args:
        ranks: how many there will be, if that is known.
        rows: what is known of the data.
    """
    lines = [*_init(config), *_depth(config), *_norm(config, ranks), *_dropout(config), *_unused(config)]
    lines += _output(config)
    lines += [*_transformer(config), *_patience(config, rows), *_plateau(config, rows), *_average(config, rows)]
    return [*lines, *_imbalance(config, rows)]


# ---------------------------------------------------------------- the network


def _init(config: RunConfig) -> Iterator[str]:
    model: Any = config.model
    if not isinstance(model, PerceptronModel | MlpModel | CnnModel):
        return
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


def _depth(config: RunConfig) -> Iterator[str]:
    model = config.model
    if not isinstance(model, MlpModel | CnnModel) or num_layers(model) < DEEP:
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


def _norm(config: RunConfig, ranks: int | None) -> Iterator[str]:
    model: Any = config.model
    if isinstance(model, GptModel):
        yield f"norm: {NORMS[model.norm]} stands first in each branch, and after the last block (pre-norm)"
    if not isinstance(model, HiddenLayers):
        return
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


def _dropout(config: RunConfig) -> Iterator[str]:
    model: Any = config.model
    if isinstance(model, GptModel) and model.dropout:
        yield f"dropout: {model.dropout:g} of the embeddings, in the attention, and at the end of each branch"
    if not isinstance(model, HiddenLayers) or not any(model.dropouts):
        return
    dropouts = model.dropouts
    rates = ", ".join(f"{rate:g}" for rate in (dropouts if len(set(dropouts)) > 1 else dropouts[:1]))
    if isinstance(model, MlpModel) and model.residual:
        yield f"dropout: {rates} within each block, between its two layers"
    else:
        yield f"dropout: {rates} after the activation of the {'fully connected' if _is_cnn(model) else 'hidden'} layers"
    if max(dropouts) > 0.5:
        yield f"WARNING: model.dropout: {max(dropouts):g} drops more than it keeps; 0.1 to 0.5 is usual"
    if _first(dropouts) < _last_batch_norm(model):
        yield (
            "dropout: some stands before a later BatchNorm, whose statistics then differ between training and "
            "evaluation (Li et al. 2019, arXiv:1801.05134); dropping only after the last norm avoids it"
        )


def _unused(config: RunConfig) -> Iterator[str]:
    """Say of what a single value asks of all hidden layers that there is none."""
    model: Any = config.model
    if not isinstance(model, HiddenLayers) or model.hidden:
        return
    if isinstance(model, MlpModel) and model.norm in NORMS:
        yield "WARNING: model.norm: there is no hidden layer to have it; list some in model.hidden, or use none"
    if model.dropout:
        yield "WARNING: model.dropout: there is no hidden layer to drop from; list some in model.hidden, or use 0"


def _is_cnn(model: HiddenLayers) -> bool:
    return isinstance(model, CnnModel)


def _first(dropouts: Sequence[float]) -> int:
    return next(index for index, rate in enumerate(dropouts) if rate)


def _last_batch_norm(model: HiddenLayers) -> int:
    """Return the last hidden layer that begins with, or follows upon, a BatchNorm; -1 where there is none."""
    norms = [*model.norms, *(model.norms[-1:] if isinstance(model, MlpModel) and model.residual else [])]
    return max((index for index, norm in enumerate(norms) if norm == "batch"), default=-1)


def _output(config: RunConfig) -> Iterator[str]:
    model = config.model
    is_softmax = isinstance(model, PerceptronModel) and model.activation == "softmax"
    if is_softmax or (isinstance(model, MlpModel) and model.output == "softmax"):
        yield "output: softmax; the targets have to be shares of a whole, which add up to 1"


def _transformer(config: RunConfig) -> Iterator[str]:
    if config.model.kind not in TRANSFORMERS:
        return
    warmup = config.schedule.warmup_steps
    if warmup:
        yield f"warm-up: {warmup:,} updates"
    else:
        yield "WARNING: schedule.warmup_steps: a Transformer wants a warm-up, of 1 to 10 % of the updates"
    if config.clip.kind == "norm":
        yield f"clipping: norm {config.clip.max_norm:g}"
    else:
        yield "WARNING: clip.kind: a Transformer wants its gradient clipped; use kind: norm, max_norm: 1.0"


# ---------------------------------------------------------------- how long, and how it is judged


def _num_updates(config: RunConfig, rows: KnownRows | None) -> int | None:
    """Return the most updates that the run can have, or None if nothing limits them that is known."""
    run = config.run
    by_epochs = run.max_epochs * rows.updates_per_epoch if run.max_epochs and rows else None
    return min((limit for limit in (run.max_steps, by_epochs) if limit is not None), default=None)


def _num_evaluations(config: RunConfig, rows: KnownRows | None) -> int | None:
    """Return the most evaluations that the run can have, that of its end included; None as of `_num_updates`."""
    run, evaluation = config.run, config.evaluation
    epochs_in_updates = evaluation.every_epochs * rows.updates_per_epoch if evaluation.every_epochs and rows else None
    pairs = [
        (run.max_epochs, evaluation.every_epochs),
        (_num_updates(config, rows), evaluation.every_steps or epochs_in_updates),
    ]
    return min((-(-whole // part) for whole, part in pairs if whole and part), default=None)


def _patience(config: RunConfig, rows: KnownRows | None) -> Iterator[str]:
    stopping = config.early_stopping
    if stopping is None:
        yield "patience: none; the run uses up its budget, and BEST is the lowest val/loss"
        return
    patience, evaluations = stopping.patience_evaluations, _num_evaluations(config, rows)
    # The first evaluation is the best so far, and a run that stops at its last one does not stop early.
    if evaluations is not None and 1 + patience >= evaluations:
        yield (
            f"WARNING: early_stopping.patience_evaluations: {patience} are not used up before the end of a run of "
            f"{evaluations} evaluations, so it never stops early"
        )
    else:
        yield f"patience: {patience} evaluations without a better {stopping.metric}"


def _plateau(config: RunConfig, rows: KnownRows | None) -> Iterator[str]:
    schedule = config.schedule
    if not isinstance(schedule, PlateauSchedule):
        return
    patience, evaluations = schedule.patience_evaluations, _num_evaluations(config, rows)
    if evaluations is not None and 2 + patience >= evaluations:
        yield (
            f"WARNING: schedule.patience_evaluations: {patience} are not exceeded before the end of a run of "
            f"{evaluations} evaluations, so the rate never falls"
        )
    else:
        yield f"plateau: the rate falls after more than {patience} evaluations without a better {schedule.metric}"
    stopping = config.early_stopping
    if stopping and stopping.metric == schedule.metric and stopping.patience_evaluations <= 1 + patience:
        yield (
            "WARNING: schedule.patience_evaluations: the run stops early before the rate falls; use less than "
            f"early_stopping.patience_evaluations, {stopping.patience_evaluations}, by two or more"
        )


def _average(config: RunConfig, rows: KnownRows | None) -> Iterator[str]:
    if config.ema is None:
        return
    looked_back_on, updates = round(1 / (1 - config.ema.decay)), _num_updates(config, rows)
    if updates is not None and looked_back_on > updates / 2:
        yield (
            f"WARNING: ema.decay: {config.ema.decay:g} looks back on {looked_back_on:,} updates, most of the run's "
            f"{updates:,}, so its beginning counts too; use {1 - 10 / max(updates, 20):.2g} or so"
        )
    else:
        yield f"average: the weights of the last {looked_back_on:,} updates or so are what is evaluated and exported"


def _imbalance(config: RunConfig, rows: KnownRows | None) -> Iterator[str]:
    task, stopping = config.task, config.early_stopping
    if not isinstance(task, ClassificationTask):
        return
    counts = rows.classes if rows else {}
    rarest = min(counts, key=lambda name: counts[name], default=None)
    share = counts[rarest] / sum(counts.values()) if rarest is not None else None
    who = "" if share is None else f"; the rarest, {rarest}, has {100 * share:.1f} % of the rows"
    is_rare = share is not None and share * len(counts) < RARE
    is_evened_out = task.class_weights is not None or config.data.sampling == "balanced"
    if task.class_weights is not None:
        yield f"imbalance: classes are weighted in the loss{who}"
    elif is_evened_out:
        yield f"imbalance: rows of every class are drawn equally often{who}"
    elif is_rare:
        yield (
            f"imbalance: every row counts alike{who}; if it matters, use task.class_weights=balanced and val/macro_f1"
        )
    elif share is not None:
        yield f"imbalance: little{who}"
    else:
        yield "imbalance: every row counts alike; if a class is rare, use task.class_weights=balanced and val/macro_f1"
    if stopping and stopping.metric == "val/accuracy" and (is_rare or is_evened_out):
        yield "WARNING: early_stopping.metric: accuracy hides rare classes; use val/macro_f1"

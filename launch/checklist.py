"""The design checklist of `harness check`: what an introductory chapter asks of a configuration, and its answers."""

from collections.abc import Iterator, Sequence
from typing import Any

from harness.config import RunConfig
from harness.config.models import SATURATING, CnnModel, HiddenLayers, MlpModel, PerceptronModel
from harness.config.tasks import ClassificationTask

DEEP = 6
"""Layers from which on a network without norms or shortcuts seldom trains."""
TRANSFORMERS = ("gpt", "pretrained")
SMALL_BATCH = 8
"""Rows from which on downwards the statistics of BatchNorm are noise (Wu & He 2018, arXiv:1803.08494)."""


def checklist(config: RunConfig, *, ranks: int | None) -> list[str]:
    """Return a line for each question, `WARNING: ` before those whose answer does not fit.

    Args:
        ranks: how many there will be, if that is known.
    """
    lines = [*_init(config), *_depth(config), *_norm(config, ranks), *_dropout(config), *_transformer(config)]
    return [*lines, *_patience(config), *_average(config), *_imbalance(config)]


def _init(config: RunConfig) -> Iterator[str]:
    model: Any = config.model
    if not isinstance(model, PerceptronModel | MlpModel | CnnModel):
        return
    activation, init = model.activation, model.init
    if activation in ("none", "softmax"):
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


def _depth(config: RunConfig) -> Iterator[str]:
    model = config.model
    if not isinstance(model, MlpModel) or len(model.hidden) < DEEP:
        return
    has_norm = all(norm != "none" for norm in model.norms)
    if model.activation in SATURATING and not model.residual:
        yield (
            f"WARNING: model.activation: gradients vanish in {len(model.hidden)} layers of {model.activation}; "
            "use relu with norm=batch, or residual=true"
        )
    elif not has_norm and not model.residual:
        yield f"WARNING: model.norm: {len(model.hidden)} layers without norms or shortcuts; use batch, or residual=true"
    else:
        helps = [name for name, is_there in {"norms": has_norm, "shortcuts": model.residual}.items() if is_there]
        yield f"depth: {len(model.hidden)} layers with {' and '.join(helps)}"


def _norm(config: RunConfig, ranks: int | None) -> Iterator[str]:
    model: Any = config.model
    if not isinstance(model, HiddenLayers) or "batch" not in (model.norm, *model.norms):
        return
    yield "norm: BatchNorm stands before the activation, dropout after it"
    if ranks is None:
        return
    rows = config.strategy.micro_batch or config.data.global_batch // ranks
    if rows <= SMALL_BATCH and not model.sync_batch_norm:
        yield (
            f"WARNING: model.norm: BatchNorm sees {rows} rows at a time ({config.data.global_batch} over {ranks} "
            "ranks); use fewer ranks, a larger data.global_batch or micro-batch, or norm=layer"
        )


def _dropout(config: RunConfig) -> Iterator[str]:
    model: Any = config.model
    if not isinstance(model, HiddenLayers):
        return
    dropouts: Sequence[float] = model.dropouts
    if any(dropout > 0.5 for dropout in dropouts):
        yield f"WARNING: model.dropout: {max(dropouts):g} drops more than it keeps; 0.1 to 0.5 is usual"
    first_norms = [index for index, norm in enumerate(model.norms) if norm == "batch"]
    dropped = [index for index, dropout in enumerate(dropouts) if dropout]
    if first_norms and dropped and min(dropped) < max(first_norms):
        yield (
            "dropout: some stands before a later BatchNorm, whose statistics then differ between training and "
            "evaluation (Li et al. 2019, arXiv:1801.05134); dropping only after the last norm avoids it"
        )


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


def _patience(config: RunConfig) -> Iterator[str]:
    stopping = config.early_stopping
    if stopping is None:
        yield "patience: none; the run uses up its budget, and BEST is the lowest val/loss"
        return
    wants_max = stopping.metric in HIGHER_IS_BETTER
    if wants_max != (stopping.mode == "max"):
        wanted = "max" if wants_max else "min"
        yield f"WARNING: early_stopping.mode: {stopping.metric} is better the {_way(wanted)} it is; use mode: {wanted}"
    every, epochs = config.evaluation.every_epochs, config.run.max_epochs
    if every and epochs and stopping.patience_evaluations * every >= epochs:
        yield (
            f"WARNING: early_stopping.patience_evaluations: {stopping.patience_evaluations} evaluations are as long as "
            f"the run of {epochs} epochs, so it never stops early"
        )
    else:
        yield f"patience: {stopping.patience_evaluations} evaluations without a better {stopping.metric}"


def _average(config: RunConfig) -> Iterator[str]:
    if config.ema is None:
        return
    updates, budget = round(1 / (1 - config.ema.decay)), config.run.max_steps
    if budget is not None and updates > budget / 2:
        yield (
            f"WARNING: ema.decay: {config.ema.decay:g} looks back on {updates:,} updates, most of the run's "
            f"{budget:,}, so its beginning counts too; use {1 - 10 / budget:.2g} or so"
        )
    else:
        yield f"average: the weights of the last {updates:,} updates or so are what is evaluated and exported"


HIGHER_IS_BETTER = (
    *("val/accuracy", "val/macro_f1", "val/f1", "val/precision", "val/recall", "val/auc", "val/average_precision"),
    "val/r2",
)


def _way(mode: str) -> str:
    return "higher" if mode == "max" else "lower"


def _imbalance(config: RunConfig) -> Iterator[str]:
    task, stopping = config.task, config.early_stopping
    if not isinstance(task, ClassificationTask):
        return
    if task.class_weights is not None:
        yield "imbalance: classes are weighted in the loss"
        if stopping and stopping.metric == "val/accuracy":
            yield "WARNING: early_stopping.metric: accuracy hides rare classes, which are weighted; use val/macro_f1"
    else:
        yield "imbalance: every row counts alike; if a class is rare, use task.class_weights=balanced and val/macro_f1"

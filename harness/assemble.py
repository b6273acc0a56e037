"""Puts a run together from a config, the rows and the network, and refuses parts that do not fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.agenda import Agenda
from harness.checkpoint.store import CheckpointStore
from harness.config.checks import check_metrics
from harness.config.run_config import RunConfig
from harness.config.training import AdafactorOptim, MuonOptim
from harness.doctor.promises import Found, look
from harness.errors import ConfigError, DataError
from harness.fits import LengthsOfSplits, check_batch_norm, check_padding, check_sync_batch_norm, lengths_asked_for
from harness.observers.base import Observers
from harness.optim import OfParameters
from harness.own_code import refused_as
from harness.ranks.group import Ranks
from harness.rows.batches import TrainingBatches, ValidationBatches
from harness.rows.dataset import DatasetRows, own_rows
from harness.rows.lengths import RowLengths
from harness.rows.order import BalancedRows, BatchPlan, RowOrder, RowsByLength, ShardedRows, TokenLimit
from harness.rows.rows import AnyRows, InShards, labels_of
from harness.rows.splits import READING, DataSplits
from harness.run import Run
from harness.schedule import check_fits
from harness.scores import check_metric
from harness.stopping import Judge, StopSignals
from harness.strategy.build import AUTOCAST, DTYPES, build_strategy, moved
from harness.tasks.base import TaskLoss
from harness.watch.flops import NUM_ROWS, training_flops_per_row
from harness.watch.peak_flops import peak_flops
from harness.watch.stopwatch import Stopwatch


def assemble(
    config: RunConfig, ranks: Ranks, splits: DataSplits, model: nn.Module, *, directory: Path, signals: StopSignals
) -> Run:
    """Return the run on this rank, with no observers yet. Collective.

    Raises:
        ConfigError: the parts do not fit together.
        DataError: the validation rows cannot judge the run.
    """
    lengths = lengths_asked_for(config, ranks, splits)
    plan = BatchPlan(
        num_rows=len(splits.train),
        global_batch=config.data.global_batch,
        world_size=ranks.world_size,
        micro_batch=config.strategy.micro_batch,
        seed=config.run.seed,
        order=_row_order(config, splits, lengths),
        token_limit=_token_limit(config, lengths.train),
    )
    agenda = Agenda(config, plan.steps_per_epoch)
    device, dtype = ranks.device, DTYPES[config.strategy.precision]
    with ranks.raise_on_all_ranks("putting the run together"):
        check_fits(config.schedule, total_updates=agenda.total_updates)
        config.task.check_judges(config, splits)
        task = config.task.build(splits, device=device, dtype=dtype)
    batches = TrainingBatches(
        splits.train, plan, rank=ranks.rank, device=device, dtype=dtype, augmentation=splits.augmentation
    )
    model = moved(model, device, dtype)
    pads_left = getattr(model, "pads_left", False)
    found, groups = _look(config, ranks, task, batches, model, validation=splits.validation)
    own = own_rows(splits.train, splits.validation)
    _check_same_rows(own, ranks)
    share_of_peak_per_row = _share_of_peak_per_row(config, ranks, task, batches, model)
    strategy = build_strategy(config, model, ranks, groups=groups)
    strategy.notices = (*strategy.notices, *found.notices)
    strategy.warm_up(lambda: task.forward(strategy.forward, batches.at(0)[0].data))
    return Run(
        config=config,
        strategy=strategy,
        task=task,
        plan=plan,
        batches=batches,
        validation=_validation(config, ranks, splits, lengths),
        agenda=agenda,
        judge=Judge(config),
        signals=signals,
        checkpoints=CheckpointStore(directory / "checkpoints", strategy, config.checkpoint),
        data_digest=f"{splits.train.digest()}-{splits.validation.digest()}{'-padded left' * pads_left}",
        read_otherwise=(*splits.read_otherwise, *["pads short rows at their beginning"] * pads_left),
        facts={**_facts(splits), "rows": {name: rows.compared for name, rows in own.items()}},
        observers=Observers(),
        stopwatch=Stopwatch(device, tells_reduction=strategy.tells_reduction),
        share_of_peak_per_row=share_of_peak_per_row,
        promises=found.promises,
        seconds_looked=found.seconds,
    )


def _validation(config: RunConfig, ranks: Ranks, splits: DataSplits, lengths: LengthsOfSplits) -> ValidationBatches:
    return ValidationBatches(
        splits.validation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        batch_rows=config.strategy.micro_batch or config.data.global_batch // ranks.world_size,
        device=ranks.device,
        dtype=DTYPES[config.strategy.precision],
        token_limit=_token_limit(config, lengths.validation),
    )


def _facts(splits: DataSplits) -> dict[str, Any]:
    """Return what a checkpoint says of the data."""
    return {
        "reading": READING,
        "input_shape": splits.input_shape,
        "num_outputs": splits.num_outputs,
        "preprocessing": splits.preprocessing,
        "tokenizer": splits.tokenizer and splits.tokenizer.to_json(),
    }


def _look(
    config: RunConfig, ranks: Ranks, task: TaskLoss, batches: TrainingBatches, model: nn.Module, *, validation: AnyRows
) -> tuple[Found, OfParameters]:
    """Try the parts on a few rows, and refuse those that do not fit. Collective."""
    with ranks.raise_on_all_ranks("trying one row"), refused_as(ConfigError, "one row, before any update,"):
        limit = batches.plan.token_limit
        row = int(limit.lengths.argmin()) if limit else 0  # the shortest leaves a norm least to take the variance of
        check_sync_batch_norm(model, batches.plan, converted=config.model.wants_sync_batch_norm)
        check_batch_norm(model, batches.plan, lambda: task.forward(model, batches.some([row]).data))
    autocast = AUTOCAST[config.strategy.precision]
    waits = config.strategy.kind in ("ddp", "zero3")
    found = look(
        model,
        task,
        batches,
        ranks,
        autocast=autocast,
        validation=validation,
        only_ddp=_only_ddp(config),
        waits=waits,
        is_ours=config.model.is_ours,
    )
    with ranks.raise_on_all_ranks("asking the task"), refused_as(ConfigError, "task:"):
        metrics = task.metrics()
        for name, metric in metrics.items():
            check_metric(name, metric)
        check_metrics(config, [f"val/{name}" for name in (*task.terms, *metrics)])
        check_padding(found.only_in_training, batches.plan)
        return found, task.parameter_groups(model)


def _check_same_rows(own: Mapping[str, DatasetRows], ranks: Ranks) -> None:
    """Refuse rows that a rank has made otherwise than rank zero. Collective."""
    of_rank_zero = ranks.broadcast({name: rows.compared for name, rows in own.items()})
    with ranks.raise_on_all_ranks("comparing the rows of all ranks"):
        for name, rows in own.items():
            here = f"on rank {ranks.rank}"
            if different := rows.difference(of_rank_zero[name], there="on rank 0", here=here):
                raise DataError(
                    f"the {name} rows of {rows.name} are not the same on all ranks: {different}. Is something of the "
                    "machine, the process or the time in them?"
                )


def _share_of_peak_per_row(
    config: RunConfig, ranks: Ranks, task: TaskLoss, batches: TrainingBatches, model: nn.Module
) -> float | None:
    if ranks.device.type != "cuda":
        return None
    name, allows_tf32 = torch.cuda.get_device_name(ranks.device), torch.backends.cuda.matmul.allow_tf32
    peak = peak_flops(name, precision=config.strategy.precision, allows_tf32=allows_tf32)
    if peak is None:
        return None
    rows = batches.some([0] * NUM_ROWS)  # BatchNorm refuses to train on one
    return training_flops_per_row(model, task.forward, rows) / (peak * ranks.world_size)


def _only_ddp(config: RunConfig) -> str:
    """Return why no other strategy could train this run, if that is so."""
    if isinstance(config.optim, AdafactorOptim | MuonOptim):
        return f"{config.optim.kind} looks at whole weight matrices: ddp only"
    return "gradient_noise is of the clipped gradient: ddp only" if config.gradient_noise else ""


def _token_limit(config: RunConfig, lengths: RowLengths | None) -> TokenLimit | None:
    max_tokens = config.strategy.micro_batch_tokens
    return None if max_tokens is None or lengths is None else TokenLimit(lengths, max_tokens)


def _row_order(config: RunConfig, splits: DataSplits, lengths: LengthsOfSplits) -> RowOrder | None:
    if config.data.sampling == "by_length":
        assert lengths.train is not None, "an order by length wants the lengths"
        return RowsByLength(lengths.train, global_batch=config.data.global_batch, seed=config.run.seed)
    if isinstance(splits.train, InShards):
        return ShardedRows(splits.train.rows_per_shard, seed=config.run.seed)
    if config.data.sampling == "uniform":
        return None
    labels = labels_of(splits.train)
    if labels is None:
        raise ConfigError(
            "data.sampling: balanced wants a label of every row, in memory and beforehand; these rows have no column "
            "`targets` of whole numbers in memory, so use data.sampling=uniform and weights in the task"
        )
    return BalancedRows(labels.numpy(), seed=config.run.seed)

"""Puts a run together from a config, the rows and the network, and refuses parts that do not fit."""

from pathlib import Path

import torch
from torch import nn

from harness.agenda import Agenda
from harness.catalogue.classification.classes import check_judges
from harness.catalogue.images.augment import Augmentation
from harness.catalogue.images.section import ImageSection
from harness.catalogue.networks import batch_norms
from harness.catalogue.table.columns import READING
from harness.catalogue.table.shards import ShardedColumns
from harness.catalogue.tasks import build_task
from harness.checkpoint.store import CheckpointStore
from harness.config.run_config import RunConfig
from harness.errors import ConfigError
from harness.observers.base import Observers
from harness.ranks.group import Ranks
from harness.rows.batches import TrainingBatches, ValidationBatches
from harness.rows.order import BalancedRows, BatchPlan, RowOrder, ShardedRows
from harness.rows.splits import DataSplits
from harness.run import Run
from harness.schedule import check_fits
from harness.stopping import Judge, StopSignals
from harness.strategy.build import AUTOCAST, DTYPES, build_strategy
from harness.strategy.unused import freeze_unused
from harness.watch.flops import training_flops_per_row
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
    plan = BatchPlan(
        num_rows=len(splits.train),
        global_batch=config.data.global_batch,
        world_size=ranks.world_size,
        micro_batch=config.strategy.micro_batch,
        seed=config.run.seed,
        order=_row_order(config, splits),
    )
    agenda = Agenda(config, plan.steps_per_epoch)
    with ranks.together("putting the run together"):
        check_fits(config.schedule, total_updates=agenda.total_updates)
        check_judges(config, splits.validation, splits.preprocessing.get("classes"))
        check_batch_norm(model, plan, input_shape=splits.input_shape)
    share_of_peak_per_row = _share_of_peak_per_row(config, ranks, splits, model)
    device, dtype = ranks.device, DTYPES[config.strategy.precision]
    batches = TrainingBatches(
        splits.train, plan, rank=ranks.rank, device=device, dtype=dtype, augmentation=_augmentation(config)
    )
    inputs = batches.at(0)[0].inputs
    pads_left = getattr(model, "pads_left", False)
    autocast = AUTOCAST[config.strategy.precision]
    notices = freeze_unused(model.to(device=device, dtype=dtype), inputs, ranks, autocast=autocast)
    strategy = build_strategy(config, model, ranks)
    strategy.notices = (*strategy.notices, *notices)
    with ranks.together("preparing the task"):
        task = build_task(config.task, splits, device=device, dtype=dtype)
    strategy.warm_up(inputs)
    return Run(
        config=config,
        strategy=strategy,
        task=task,
        plan=plan,
        batches=batches,
        validation=ValidationBatches(
            splits.validation,
            rank=ranks.rank,
            world_size=ranks.world_size,
            batch_rows=config.strategy.micro_batch or config.data.global_batch // ranks.world_size,
            device=device,
            dtype=dtype,
        ),
        agenda=agenda,
        judge=Judge(config),
        signals=signals,
        checkpoints=CheckpointStore(directory / "checkpoints", strategy, config.checkpoint),
        data_digest=f"{splits.train.digest()}-{splits.validation.digest()}{'-padded left' * pads_left}",
        read_otherwise=(*splits.read_otherwise, *["pads short rows at their beginning"] * pads_left),
        facts={
            "reading": READING,
            "input_shape": splits.input_shape,
            "num_outputs": splits.num_outputs,
            "preprocessing": splits.preprocessing,
            "tokenizer": splits.tokenizer and splits.tokenizer.to_json(),
        },
        observers=Observers(),
        stopwatch=Stopwatch(device, tells_reduction=strategy.tells_reduction),
        share_of_peak_per_row=share_of_peak_per_row,
    )


def check_batch_norm(model: nn.Module, plan: BatchPlan, *, input_shape: tuple[int, ...]) -> None:
    """Refuse a batch arithmetic that would give BatchNorm a single row to take the variance of.

    Raises:
        ConfigError: names the layer and the batch that is too small.
    """
    layers = batch_norms(model, input_shape=input_shape)
    if not layers:
        return
    for position in {0, plan.steps_per_epoch - 1}:
        for rank in range(plan.world_size):
            sizes = [stop - start for start, stop in plan.micro_batches(position, rank)]
            if 1 in sizes:
                raise ConfigError(
                    f"data.global_batch: batch {position + 1:,} of an epoch has {plan.rows_at(position)} rows, which "
                    f"leaves rank {rank} of {plan.world_size} a micro-batch of one row, and BatchNorm (layer "
                    f"{layers[0]}) wants two or more; with {plan.num_rows:,} training rows use another "
                    "data.global_batch, strategy.micro_batch or number of ranks, or model.norm=none"
                )


def _share_of_peak_per_row(config: RunConfig, ranks: Ranks, splits: DataSplits, model: nn.Module) -> float | None:
    if ranks.device.type != "cuda":
        return None
    name, allows_tf32 = torch.cuda.get_device_name(ranks.device), torch.backends.cuda.matmul.allow_tf32
    peak = peak_flops(name, precision=config.strategy.precision, allows_tf32=allows_tf32)
    if peak is None:
        return None
    return training_flops_per_row(model, splits.validation.inputs[:1]) / (peak * ranks.world_size)


def _row_order(config: RunConfig, splits: DataSplits) -> RowOrder | None:
    if isinstance(splits.train, ShardedColumns):
        return ShardedRows(splits.train.rows_per_shard, seed=config.run.seed)
    if config.data.sampling == "balanced":
        return BalancedRows(splits.train.targets.numpy(), seed=config.run.seed)
    return None


def _augmentation(config: RunConfig) -> Augmentation | None:
    data = config.data
    if not isinstance(data, ImageSection) or not (data.augment_shift_pixels or data.augment_horizontal_flip):
        return None
    return Augmentation(
        shift_pixels=data.augment_shift_pixels, horizontal_flip=data.augment_horizontal_flip, seed=config.run.seed
    )

"""Refuses parts of a run that do not fit, by trying one row, and by the lengths of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.config.run_config import RunConfig
from harness.errors import ConfigError
from harness.ranks.group import Ranks
from harness.rows.dataset import DatasetRows
from harness.rows.lengths import WRITE_LENGTHS, RowLengths, lengths_digest, lengths_of
from harness.rows.order import BatchPlan
from harness.rows.rows import AnyRows
from harness.rows.splits import DataSplits

OTHER_BATCHES = "another data.global_batch, strategy.micro_batch or number of ranks"


def check_batch_norm(model: nn.Module, plan: BatchPlan, forward: Callable[[], Any]) -> None:
    """Refuse a batch arithmetic that would give BatchNorm a single row to take the variance of.

    Args:
        forward: sends one row through `model`.
    Raises:
        ConfigError: names the layer and the batch that is too small.
    """
    layers = batch_norms(model, forward)
    if not layers:
        return
    if _is_cut_by_tokens(plan):
        raise ConfigError(
            "strategy.micro_batch_tokens: what is left of a rank's share may be a micro-batch of one row in any "
            f"update, and BatchNorm (layer {layers[0]}) wants two or more; use strategy.micro_batch, or model.norm=none"
        )
    for position in {0, plan.steps_per_epoch - 1}:
        for rank in range(plan.world_size):
            sizes = [stop - start for start, stop in plan.micro_batches(position, rank)]
            if 1 in sizes:
                raise ConfigError(
                    f"data.global_batch: batch {position + 1:,} of an epoch has {plan.rows_at(position)} rows, which "
                    f"leaves rank {rank} of {plan.world_size} a micro-batch of one row, and BatchNorm (layer "
                    f"{layers[0]}) wants two or more; with {plan.num_rows:,} training rows use "
                    f"{OTHER_BATCHES}, or model.norm=none"
                )


def _is_cut_by_tokens(plan: BatchPlan) -> bool:
    """Whether how many micro-batches an update has, and of how many rows, follows from which rows it has."""
    return plan.token_limit is not None and plan.most_micro_batches > 1


def check_sync_batch_norm(model: nn.Module, plan: BatchPlan, *, converted: bool) -> None:
    """Refuse a batch arithmetic that leaves a rank without a row where all ranks take statistics together.

    Such a rank runs a row in eval mode, which takes none, and the others would wait for its.

    Args:
        converted: BatchNorm becomes SyncBatchNorm before the run.
    Raises:
        ConfigError: names the batch and the rank.
    """
    own = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if plan.world_size == 1 or not (own or converted):
        return
    waiting = f"SyncBatchNorm (layer {own[0]})" if own else "model.sync_batch_norm"
    if _is_cut_by_tokens(plan):
        raise ConfigError(
            f"strategy.micro_batch_tokens: a rank may have fewer micro-batches than another, and {waiting} would "
            "wait for it; use strategy.micro_batch, or another norm"
        )
    if without := _without_rows(plan):
        raise ConfigError(f"data.global_batch: {without}, and {waiting} would wait for it; use {OTHER_BATCHES}")


def check_padding(only_in_training: Sequence[str], plan: BatchPlan) -> None:
    """Refuse a batch arithmetic that leaves a rank without a row where some parameters are used in training mode alone.

    Such a rank runs a row in eval mode to keep the others company, and its reduction would wait for their gradients.

    Raises:
        ConfigError: names a parameter, the batch and the rank.
    """
    if only_in_training and plan.world_size > 1 and _is_cut_by_tokens(plan):
        raise ConfigError(
            "strategy.micro_batch_tokens: in any update a rank may have fewer micro-batches than another, and "
            f"{only_in_training[0]} is used in training mode only; use strategy.micro_batch, or one rank"
        )
    if only_in_training and (without := _without_rows(plan)):
        raise ConfigError(
            f"data.global_batch: {without}, and {only_in_training[0]} is used in training mode only; with "
            f"{plan.num_rows:,} training rows use {OTHER_BATCHES}"
        )


def _without_rows(plan: BatchPlan) -> str:
    """Return a sentence for the first micro-batch of an epoch that leaves a rank without a row; nothing without one."""
    for position in sorted({0, plan.steps_per_epoch - 1}):
        for rank in range(plan.world_size):
            if any(start == stop for start, stop in plan.micro_batches(position, rank)):
                return (
                    f"batch {position + 1:,} of an epoch has {plan.rows_at(position)} rows, which leaves rank {rank} "
                    f"of {plan.world_size} a micro-batch without a row"
                )
    return ""


def batch_norms(model: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """Return the names of the layers that cannot train on one row: their statistics would be of a single value.

    A BatchNorm of images is one of them where it sees images of 1x1, so one row goes through the network.

    Args:
        forward: sends it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not layers:
        return []
    single: set[nn.Module] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            single.add(module)

    hooks = [module.register_forward_pre_hook(note) for module in layers.values()]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        forward()
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return [name for name, module in layers.items() if module in single]


class LengthsOfSplits(NamedTuple):
    """Of the rows of both splits, (N,) each; None where nothing follows from them."""

    train: RowLengths | None = None
    validation: RowLengths | None = None


def lengths_asked_for(config: RunConfig, ranks: Ranks, splits: DataSplits) -> LengthsOfSplits:
    """Return the lengths that the order of rows, or the size of micro-batches, follows from. Collective.

    Raises:
        ConfigError: the rows do not say them, say others on another rank, or one is longer than a micro-batch.
        DataError: they say something else.
    """
    tokens, found = config.strategy.micro_batch_tokens, LengthsOfSplits()
    if config.data.sampling == "by_length":
        found = _lengths(ranks, {"train": splits.train}, "data.sampling: by_length", instead="data.sampling=uniform")
    if tokens is not None:
        both = {"train": splits.train, "validation": splits.validation}
        key = f"strategy.micro_batch_tokens: {tokens:,}"
        found = _lengths(ranks, both, key, instead="strategy.micro_batch")
        for (split, rows), lengths in zip(both.items(), found, strict=True):
            _check_longest(rows, lengths, f"of the {split} split", max_tokens=tokens)
    return found


def _lengths(ranks: Ranks, splits: Mapping[str, AnyRows], key: str, *, instead: str) -> LengthsOfSplits:
    with ranks.raise_on_all_ranks("asking for the lengths of the rows"):
        found = {split: lengths_of(rows) for split, rows in splits.items()}
        if missing := [split for split, lengths in found.items() if lengths is None]:
            raise ConfigError(
                f"{key} wants the length of every row beforehand, and the {missing[0]} split does not say it; "
                f"{WRITE_LENGTHS}, or use {instead}"
            )
    digests = ranks.gather_objects([lengths_digest(lengths) for lengths in found.values() if lengths is not None])
    if others := [rank for rank, of_rank in enumerate(digests) if of_rank != digests[0]]:
        raise ConfigError(
            f"{key} wants the same lengths on every rank, and rank {others[0]} has others than rank 0; let them follow "
            "from the data alone"
        )
    return LengthsOfSplits(**found)


def _check_longest(rows: AnyRows, lengths: RowLengths | None, of: str, *, max_tokens: int) -> None:
    """Refuse rows of which one alone would be larger than a micro-batch may be."""
    assert lengths is not None, "their lengths are missing"
    longest = int(lengths.argmax())
    if (length := int(lengths[longest])) <= max_tokens:
        return
    number = rows.numbers([longest])[0] if isinstance(rows, DatasetRows) else longest
    num_longer = int((lengths > max_tokens).sum())
    raise ConfigError(
        f"strategy.micro_batch_tokens: row {number:,} {of} has length {length:,}, and a micro-batch of it alone would "
        f"have more than {max_tokens:,} tokens; {num_longer:,} of {len(lengths):,} rows are longer than that. Use "
        f"{length:,} or more, or leave out what is longer"
    )

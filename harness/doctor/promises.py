"""What a run promises, and whether the network, the rows and the loss that it was given let it keep that.

One look before anything is wrapped: user code runs on a few rows, on every rank, and leaves no trace in weights,
buffers, gradients or random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

from harness.doctor.first_rows import (
    LOOKED_AT_ROWS,
    SHOWN,
    Trial,
    check_loss,
    check_network,
    check_padding_is_weighted,
    check_scores,
    draws_at_random,
    may_pad,
    spread,
    told_of_company,
)
from harness.doctor.hidden_state import check_same_weights, check_weights_are_kept, watched
from harness.errors import ConfigError
from harness.own_code import refused_as
from harness.ranks.group import Ranks
from harness.rows.batches import TrainingBatches
from harness.rows.dataset import first_of, own_rows
from harness.rows.rows import AnyRows
from harness.strategy.untouched import no_trace
from harness.strategy.unused import freeze, unused_parameters
from harness.tasks.adapted import AdaptedTask
from harness.tasks.base import PairTask, TaskLoss

Verdict = Literal["held", "held if", "not"]
SAY_SO = (
    ", so it depends on which rows come together, and the run on its number of ranks. If that is meant, as in a "
    "contrastive loss, say mixes_rows = True in the task; if not, look for a mean or a norm over dimension 0"
)
OF_PADDING = (
    ". Rows are padded to the longest beside them, and the padding may reach the result (by the way back of a "
    "bidirectional RNN, a mean over time, attention without a mask): mask it, or use pack_padded_sequence"
)
IS_LOST = "changes in a forward pass and is no buffer, so it is lost when the run is resumed: register_buffer it"
DOING = "one look at the first rows, before any update,"
OF_A_RANK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Whose statistics are those of the rows of one rank; SyncBatchNorm's are not."""


@dataclass(frozen=True)
class Promise:
    """One thing that a run promises."""

    name: str
    verdict: Verdict
    reason: str = ""

    def as_data(self) -> dict[str, str]:
        """Return it as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """What a look found."""

    notices: tuple[str, ...]
    promises: tuple[Promise, ...]
    only_in_training: tuple[str, ...]
    """Parameters that the loss depends on in training mode alone."""
    seconds: float


def look(
    module: nn.Module,
    task: TaskLoss,
    batches: TrainingBatches,
    ranks: Ranks,
    *,
    autocast: torch.dtype | None,
    validation: AnyRows | None = None,
    only_ddp: str = "",
    waits: bool = True,
    is_ours: bool = True,
) -> Found:
    """Return what the network, the task and the rows of this run let it promise. Collective.

    Args:
        module: on its device, not wrapped yet; parameters that the loss does not depend on are frozen in it.
        autocast: what the run computes in, if in less than the type of its weights.
        validation: the rows that the run is judged by.
        only_ddp: why no other strategy could train this run, if that is so.
        is_ours: whether the network is of the catalogue, all of which use the same parameters for any rows.
        waits: whether the strategy waits for the gradient of every parameter from every rank.
    Raises:
        ConfigError: ranks have built other networks, a loss mixes rows unsaid, no parameter is left to train.
    """
    began = time.perf_counter()
    with ranks.raise_on_all_ranks("looking at the network"):
        check_network(module)
    with ranks.raise_on_all_ranks("taking the first rows"):
        first, few = batches.at(0)[0], batches.some(range(min(batches.plan.num_rows, LOOKED_AT_ROWS)))
        unlike, mixes = _look_at_rows(batches.rows, validation)
    trial = Trial(module, task, ranks.device, autocast)
    with no_trace(module, ranks.device):
        weights = check_same_weights(module, ranks)
        with ranks.raise_on_all_ranks("looking at the loss of the first rows"), refused_as(ConfigError, DOING):
            notices = check_loss(module, task, trial.losses_of(few), few, batches)
            check_padding_is_weighted(task, batches)
            if isinstance(task, AdaptedTask):
                check_scores(module, task, trial.outputs_of, few, ranks)
            draws = draws_at_random(module, trial.losses_of(few))
            strays, calls, is_same_again = watched(module, trial.losses_of(first), ranks.device)
            can_tell = not unlike and is_same_again and not task.mixes_rows
            company = told_of_company(module, task, few, batches) if can_tell else ""
            of_padding = OF_PADDING if company and may_pad(batches) else ""
            if company and not isinstance(task, PairTask):
                raise ConfigError(f"task: {company}{SAY_SO}{of_padding}")
            whole = (trial.losses_of(batch) for batch in spread(batches, first))
            unused = unused_parameters(module, trial.losses_of(few), whole, draws=draws, is_known=is_ours)
            check_weights_are_kept(module, weights)
        unused_notices, sometimes = freeze(module, unused, ranks, waits=waits)
        notices += unused_notices
    same_calls = len(set(ranks.gather_objects(calls))) == 1
    strays = sorted({name for of_rank in ranks.gather_objects(strays) for name in of_rank})
    is_same_again = all(ranks.gather_objects(is_same_again))
    notices += tuple(f"{name} {IS_LOST}" for name in strays[:SHOWN])
    unlike = next(filter(None, ranks.gather_objects(unlike)), [])
    promises = (
        Promise("order of rows exact", "held"),
        _any_number_of_ranks(module, task, f"{company}{of_padding}", draws=draws, mixes=mixes),
        _resume(strays, unlike, is_same_again=is_same_again),
        _any_strategy(only_ddp, same_calls=same_calls, sometimes=sometimes),
        Promise("export", "held"),
    )
    return Found(notices, promises, tuple(unused.in_eval_mode), time.perf_counter() - began)


def _look_at_rows(train: AnyRows, validation: AnyRows | None) -> tuple[list[str], bool]:
    """Return which rows of a Dataset are not the same twice, and whether a collate of its own draws at random."""
    own = own_rows(train, validation)
    unlike = [
        f"{split} row {first_of(numbers)} of {rows.name}" for split, rows in own.items() if (numbers := rows.look())
    ]
    return unlike, any(rows.collate_draws for rows in own.values())


def _any_number_of_ranks(module: nn.Module, task: TaskLoss, company: str, *, draws: bool, mixes: bool) -> Promise:
    name = "any number of ranks"
    if company:
        return Promise(name, "not", company)
    if task.mixes_rows:
        return Promise(name, "not", "the loss mixes the rows of a micro-batch, whose size follows from it (mixes_rows)")
    if mixes:
        return Promise(name, "not", "collate draws at random, so what it draws depends on which rows come together")
    norms = [of for of, child in module.named_modules() if type(child) in OF_A_RANK]
    if norms:
        return Promise(name, "not", f"BatchNorm ({norms[0]}) takes the statistics of a rank's micro-batch")
    if draws:
        return Promise(
            name, "held if", "what is drawn at random in the network, as by dropout, may be other numbers on each rank"
        )
    return Promise(name, "held")


def _resume(strays: Sequence[str], unlike: Sequence[str], *, is_same_again: bool) -> Promise:
    name = "resume exact"
    if unlike:
        return Promise(
            name,
            "not",
            f"{unlike[0]}, asked for twice with the same seed, is not the same: it draws from a generator of its own, "
            "or keeps what was drawn for it; draw anew from torch, numpy.random or random, or seed that generator with "
            "torch.initial_seed()",
        )
    if strays:
        return Promise(name, "not", f"{', '.join(strays[:SHOWN])} changes and is no buffer")
    if not is_same_again:
        return Promise(
            name,
            "not",
            "the loss of the same rows is another the second time, with the same weights, buffers and random numbers: "
            "the network or the task keeps something that a checkpoint has not",
        )
    return Promise(name, "held")


def _any_strategy(only_ddp: str, *, same_calls: bool, sometimes: Sequence[str]) -> Promise:
    name = "any strategy"
    if only_ddp:
        return Promise(name, "not", only_ddp)
    if sometimes:
        what = (
            f"{sometimes[0]} is used for some rows or at some times only, and ddp on several ranks and zero3 would wait"
        )
        return Promise(name, "not", what)
    if not same_calls:
        return Promise(name, "not", "modules are called in another order on other ranks, and zero3 would wait for ever")
    return Promise(name, "held")

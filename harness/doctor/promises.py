"""What a run promises, and whether the network, the rows and the loss that it was given let it keep that.

One look before anything is wrapped: user code runs on a few rows, on every rank, and leaves no trace in weights,
buffers, gradients or random numbers.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.own_code import is_of_user, refused_as, told
from harness.ranks.group import Ranks
from harness.rows.batches import Batch, TrainingBatches
from harness.rows.own import DatasetRows
from harness.rows.tree import paths
from harness.scores import prepared
from harness.strategy.untouched import no_trace
from harness.strategy.unused import freeze, unused_parameters
from harness.tasks.adapted import ONE_STEP, STEPS, AdaptedTask
from harness.tasks.base import LOSS, PairTask, TaskLoss

Verdict = Literal["held", "held if", "not"]
LOOKED_AT_ROWS = 4
"""Whose loss is compared with that of its halves; two rows each, since BatchNorm wants two."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far apart the losses of one row may be, relative to the largest, where batches are of another size."""
TOLERANCE_ON_GPU = 5e-3
"""The same where products of matrices may be rounded to TF32."""
SHOWN = 3
SAY_SO = (
    ", so it depends on which rows come together, and the run on its number of ranks. If that is meant, as in a "
    "contrastive loss, say mixes_rows = True in the task; if not, look for a mean or a norm over dimension 0"
)
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
    only_ddp: str = "",
) -> Found:
    """Return what the network, the task and the rows of this run let it promise. Collective.

    Args:
        module: on its device, not wrapped yet; parameters that the loss does not depend on are frozen in it.
        autocast: what the run computes in, if in less than the type of its weights.
        only_ddp: why no other strategy could train this run, if that is so.
    Raises:
        ConfigError: ranks have built other networks, a loss mixes rows unsaid, no parameter is left to train.
    """
    began = time.perf_counter()
    with ranks.raise_on_all_ranks("taking the first rows"):
        first, few = batches.at(0)[0], batches.some(range(min(batches.plan.num_rows, LOOKED_AT_ROWS)))
        is_repeatable = not isinstance(batches.rows, DatasetRows) or batches.rows.is_repeatable()
    with no_trace(module, ranks.device):
        _check_same_weights(module, ranks)

        def forward(batch: Batch) -> Any:
            with torch.autocast(ranks.device.type, dtype=autocast, enabled=autocast is not None):
                return _forward(task, module, batch)

        def losses_of(batch: Batch) -> Callable[[], Tensor]:
            return lambda: _loss(task, forward(batch), batch)

        with ranks.raise_on_all_ranks("looking at the loss of the first rows"), refused_as(ConfigError, DOING):
            check_steps(module)
            notices = _check_loss(module, task, losses_of(few), few)
            if isinstance(task, AdaptedTask):
                _check_scores(module, task, forward, few, ranks)
            company = "" if task.mixes_rows or not is_repeatable else _told_of_company(module, task, few, batches)
            if company and not isinstance(task, PairTask):
                raise ConfigError(f"task: {company}{SAY_SO}")
            strays, calls = _watched(module, losses_of(first))
            unused = unused_parameters(module, [losses_of(few), losses_of(first)])
        notices += freeze(module, unused.always, ranks)
    same_calls = len(set(ranks.gather_objects(calls))) == 1
    strays = ranks.broadcast(strays)
    notices += tuple(
        f"{name} changes in a forward pass and is no buffer, so it is lost when the run is resumed: register_buffer it"
        for name in strays[:SHOWN]
    )
    is_repeatable = all(ranks.gather_objects(is_repeatable))
    promises = (
        Promise("order of rows exact", "held"),
        _any_number_of_ranks(module, task, company),
        _resume(strays, is_repeatable=is_repeatable),
        _any_strategy(only_ddp, same_calls=same_calls),
        Promise("export", "held"),
    )
    return Found(notices, promises, tuple(unused.in_eval_mode), time.perf_counter() - began)


def _forward(task: TaskLoss, module: nn.Module, batch: Batch) -> Any:
    """Return the outputs for a batch.

    Raises:
        ConfigError: the network takes other arguments than the task calls it with.
    """
    try:
        return task.forward(module, batch.data)
    except TypeError as error:
        if is_of_user(error) or traceback.extract_tb(error.__traceback__)[-1].name != "_call_impl":
            raise
        raise ConfigError(
            f"model: {type(module).__name__} does not take what task {getattr(task, 'name', type(task).__name__)} "
            f"calls it with ({error}); a task of your own calls it in forward(network, batch)"
        ) from error


def _check_scores(
    module: nn.Module, task: AdaptedTask, forward: Callable[[Batch], Any], few: Batch, ranks: Ranks
) -> None:
    """Refuse metrics that do not take what they are given, before an evaluation finds it out.

    Raises:
        ConfigError: names the metric.
    """
    module.eval()
    with torch.no_grad():
        scored = task.scored(forward(few), few.data)
    for name, metric in task.metrics().items():
        fresh = prepared(name, copy.deepcopy(metric), ranks.device)
        try:
            fresh.update(*scored)
        except Exception as error:
            raise ConfigError(
                f"metric {name}: update of {type(metric).__name__} raised {told(error)} when it was given what "
                "scored(outputs, batch) returns, or both where the task has no scored"
            ) from error


def _loss(task: TaskLoss, outputs: Any, batch: Batch) -> Tensor:
    """Return the sum of the loss of a batch.

    Raises:
        ConfigError: a task of the catalogue cannot take these outputs, or these rows.
    """
    try:
        return task.loss_sums(outputs, batch)[LOSS]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if not isinstance(task, PairTask):
            raise
        shapes = ", ".join(
            f"{path or 'a tensor'} {tuple(leaf.shape)}" for path, leaf in paths(outputs) if isinstance(leaf, Tensor)
        )
        raise ConfigError(
            f"task {type(task).__name__} cannot take what the model returns for {batch.num_rows} rows ({shapes}): "
            f"{told(error)}"
        ) from error


def _check_same_weights(module: nn.Module, ranks: Ranks) -> None:
    """Refuse a network whose construction depends on the rank. Collective."""
    sums = {name: _checksum(tensor.detach()) for name, tensor in module.state_dict(keep_vars=True).items()}
    of_ranks = ranks.gather_objects(sums)
    for rank, found in enumerate(of_ranks):
        others = [name for name in of_ranks[0] | found if found.get(name) != of_ranks[0].get(name)]
        if others:
            raise ConfigError(
                f"model: rank {rank} has built other first weights than rank 0 ({len(others)} tensors, such as "
                f"{others[0]}), so the ranks would train different networks; a constructor may depend on the seed of "
                "torch, and not on the rank, the time or a generator of its own"
            )


def _checksum(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes with a tensor; nothing but one number of it is read."""
    shape = tuple(tensor.shape)
    if not tensor.numel():
        return shape, 0
    words = tensor.contiguous().view(-1).view(torch.uint8 if tensor.element_size() % 4 else torch.int32).long()
    places = torch.arange(1, len(words) + 1, device=words.device)
    return shape, int((words * places).sum())


def check_steps(module: nn.Module) -> None:
    """Refuse a network that wants to make its updates itself.

    Raises:
        ConfigError: it has a method for that.
    """
    if steps := [step for step in STEPS if hasattr(module, step)]:
        raise ConfigError(f"model: {type(module).__name__} has {steps[0]}, but {ONE_STEP}; its loss goes into a task")


def _check_loss(module: nn.Module, task: TaskLoss, losses: Callable[[], Tensor], few: Batch) -> tuple[str, ...]:
    """Refuse weights that nothing could be learned from; return a sentence for rows whose loss is no number."""
    module.train()
    loss = losses()
    weight = float(task.weight_sum(few))
    if math.isnan(weight):
        raise ConfigError(
            "task: weights of the first rows are negative or NaN; 0 leaves a target out, 1 counts it once"
        )
    if bool(loss.isfinite()):
        return ()
    with torch.no_grad():
        of_rows = task.row_losses(task.forward(module, few.data), few)
    bad = few.ids[(~of_rows.isfinite()).to(few.ids.device)].tolist()
    which = f"row {', '.join(map(str, bad[:SHOWN]))}" if bad else f"the first {few.num_rows} rows"
    return (
        f"the loss of {which} is {loss.item()} before any update, and an update with such a row is not applied; look "
        "at these rows, and at divisions and logarithms in the loss",
    )


def _told_of_company(module: nn.Module, task: TaskLoss, few: Batch, batches: TrainingBatches) -> str:
    """Return a sentence if the loss of a row depends on which rows come with it, in eval mode; else nothing."""
    if few.num_rows < LOOKED_AT_ROWS:
        return ""
    module.eval()
    ids = few.ids.tolist()
    halves = [batches.some(ids[: len(ids) // 2]), batches.some(ids[len(ids) // 2 :])]
    with torch.no_grad():
        whole, *parts = (task.row_losses(task.forward(module, b.data), b).double() for b in (few, *halves))
    apart = torch.cat(parts)
    tolerance = TOLERANCE_ON_GPU if whole.is_cuda else TOLERANCE[next(module.parameters()).dtype]
    differs = (whole - apart).abs() > tolerance * whole.abs().max().clamp(min=1.0)
    if not differs.any():
        return ""
    place = int(differs.to(torch.uint8).argmax())
    return (
        f"the loss of row {ids[place]} is {whole[place]:.6g} beside {len(ids) - 1} other rows and {apart[place]:.6g} "
        f"beside {len(ids) // 2 - 1}, in eval mode"
    )


def _watched(module: nn.Module, losses: Callable[[], Tensor]) -> tuple[list[str], str]:
    """Return the names of attributes that a forward pass changes, and a digest of the order of module calls."""
    names = {child: name for name, child in module.named_modules()}
    order = hashlib.blake2b(digest_size=8)
    hooks = [
        child.register_forward_pre_hook(lambda child, _: order.update(f"{names[child]}/".encode())) for child in names
    ]
    before = {name: _attributes(child) for child, name in names.items()}
    kind = type(module).__name__
    module.train()
    losses()
    for hook in hooks:
        hook.remove()
    changed = [
        ".".join(filter(None, [kind, name, attribute]))
        for child, name in names.items()
        for attribute, value in _attributes(child).items()
        if value != before[name].get(attribute)
    ]
    return changed, order.hexdigest()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what in a module's attributes could be state that is no buffer: numbers, tensors and lists of them.

    A tensor with a gradient function is what the forward pass has just made, and no state.
    """
    found = {}
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training":
            found[name] = _state_of(value)
    return {name: value for name, value in found.items() if value is not None}


def _state_of(value: Any) -> Any:
    if isinstance(value, int | float):
        return value
    if isinstance(value, Tensor):
        return None if value.requires_grad else (id(value), value._version)
    if isinstance(value, list | tuple) and value and all(isinstance(each, Tensor | int | float) for each in value):
        return [_state_of(each) for each in value]
    if isinstance(value, Mapping) and value and all(isinstance(each, Tensor | int | float) for each in value.values()):
        return {name: _state_of(each) for name, each in value.items()}
    return None


def _any_number_of_ranks(module: nn.Module, task: TaskLoss, company: str) -> Promise:
    name = "any number of ranks"
    if company:
        return Promise(name, "not", company)
    if task.mixes_rows:
        return Promise(name, "not", "the loss mixes the rows of a micro-batch, whose size follows from it (mixes_rows)")
    norms = [of for of, child in module.named_modules() if type(child) in OF_A_RANK]
    if norms:
        return Promise(name, "not", f"BatchNorm ({norms[0]}) takes the statistics of a rank's micro-batch")
    return Promise(name, "held")


def _resume(strays: Sequence[str], *, is_repeatable: bool) -> Promise:
    name = "resume exact"
    if not is_repeatable:
        return Promise(name, "not", "row 0, asked for twice, is not the same: it draws from a generator of its own")
    if strays:
        return Promise(name, "not", f"{', '.join(strays[:SHOWN])} changes and is no buffer")
    return Promise(name, "held")


def _any_strategy(only_ddp: str, *, same_calls: bool) -> Promise:
    name = "any strategy"
    if only_ddp:
        return Promise(name, "not", only_ddp)
    if not same_calls:
        return Promise(name, "not", "modules are called in another order on other ranks, and zero3 would wait for ever")
    return Promise(name, "held")

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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from harness.checkpoint import rng
from harness.errors import ConfigError
from harness.own_code import is_of_user, refused_as, told
from harness.ranks.group import Ranks
from harness.rows.batches import Batch, TrainingBatches
from harness.rows.own import DatasetRows
from harness.rows.tree import leaves, paths
from harness.scores import prepared
from harness.strategy.untouched import no_trace
from harness.strategy.unused import freeze, unused_parameters
from harness.tasks.adapted import ONE_STEP, STEPS, WRITE_WEIGHTS, AdaptedTask
from harness.tasks.base import LOSS, PairTask, TaskLoss

Verdict = Literal["held", "held if", "not"]
LOOKED_AT_ROWS = 4
"""Whose loss is compared with that of its halves; two rows each, since BatchNorm wants two."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far apart the losses of one row may be, relative to the largest, where batches are of another size."""
SMALL_LOSS = 0.01
"""Losses below are compared as if they were as large, since logits are rounded too."""
TOLERANCE_ON_GPU = 5e-3
"""The same where products of matrices may be rounded to TF32."""
SAME_AGAIN = 1e-6
"""How far apart the losses of the same rows may be, relative to them."""
OF_TORCH = {*vars(nn.Module())}
"""Attributes of every module."""
SHOWN = 3
SPREAD = 8
"""Micro-batches that are looked at for parameters that the first rows do not use."""
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
    waits: bool = True,
    is_ours: bool = True,
) -> Found:
    """Return what the network, the task and the rows of this run let it promise. Collective.

    Args:
        module: on its device, not wrapped yet; parameters that the loss does not depend on are frozen in it.
        autocast: what the run computes in, if in less than the type of its weights.
        only_ddp: why no other strategy could train this run, if that is so.
        is_ours: whether the network is of the catalogue, all of which use the same parameters for any rows.
        waits: whether the strategy waits for the gradient of every parameter from every rank.
    Raises:
        ConfigError: ranks have built other networks, a loss mixes rows unsaid, no parameter is left to train.
    """
    began = time.perf_counter()
    with ranks.raise_on_all_ranks("looking at the network"):
        _check_network(module)
    with ranks.raise_on_all_ranks("taking the first rows"):
        first, few = batches.at(0)[0], batches.some(range(min(batches.plan.num_rows, LOOKED_AT_ROWS)))
        is_repeatable = not isinstance(batches.rows, DatasetRows) or batches.rows.is_repeatable()
    network = _OnlyCalled(module)
    with no_trace(module, ranks.device):
        weights = _check_same_weights(module, ranks)

        def forward(batch: Batch) -> Any:
            with torch.autocast(ranks.device.type, dtype=autocast, enabled=autocast is not None):
                outputs = _forward(task, module, network, batch)
            if not any(isinstance(leaf, Tensor) for leaf in leaves(outputs)):
                raise ConfigError(
                    f"model: in the {type(outputs).__name__} that it returns no tensor is found; return a tensor, or a "
                    "dict, list, tuple, NamedTuple or dataclass of some"
                )
            return outputs

        def losses_of(batch: Batch) -> Callable[[], Tensor]:
            return lambda: _loss(task, forward(batch), batch)

        with ranks.raise_on_all_ranks("looking at the loss of the first rows"), refused_as(ConfigError, DOING):
            notices = _check_loss(module, task, losses_of(few), few, batches)
            _check_padding_is_weighted(task, batches)
            if isinstance(task, AdaptedTask):
                _check_scores(module, task, forward, few, ranks)
            draws = _draws_at_random(module, losses_of(few))
            strays, calls, is_same_again = _watched(module, losses_of(first), ranks.device)
            can_tell = is_repeatable and is_same_again and not task.mixes_rows
            company = _told_of_company(module, task, few, batches) if can_tell else ""
            if company and not isinstance(task, PairTask):
                raise ConfigError(f"task: {company}{SAY_SO}")
            whole = (losses_of(batch) for batch in _spread(batches, first))
            unused = unused_parameters(module, losses_of(few), whole, draws=draws, is_known=is_ours)
            _check_weights_are_kept(module, weights)
        unused_notices, sometimes = freeze(module, unused, ranks, waits=waits)
        notices += unused_notices
    same_calls = len(set(ranks.gather_objects(calls))) == 1
    strays = sorted({name for of_rank in ranks.gather_objects(strays) for name in of_rank})
    is_same_again = all(ranks.gather_objects(is_same_again))
    notices += tuple(
        f"{name} changes in a forward pass and is no buffer, so it is lost when the run is resumed: register_buffer it"
        for name in strays[:SHOWN]
    )
    is_repeatable = all(ranks.gather_objects(is_repeatable))
    promises = (
        Promise("order of rows exact", "held"),
        _any_number_of_ranks(module, task, company, draws=draws),
        _resume(strays, is_repeatable=is_repeatable, is_same_again=is_same_again),
        _any_strategy(only_ddp, same_calls=same_calls, sometimes=sometimes),
        Promise("export", "held"),
    )
    return Found(notices, promises, tuple(unused.in_eval_mode), time.perf_counter() - began)


def _forward(task: TaskLoss, module: nn.Module, network: Callable[..., Any], batch: Batch) -> Any:
    """Return the outputs for a batch.

    Raises:
        ConfigError: the network takes other arguments than the task calls it with.
    """
    try:
        return task.forward(network, batch.data)
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


class _OnlyCalled:
    """A network as a task may use it: in a run it stands behind its strategy, which has nothing but the call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a task can call the network and nothing else, and asked it for {name}; have the network return what the "
            "task needs"
        )


def _check_network(module: nn.Module) -> None:
    """Refuse a network whose parameters or state a run could not train or keep."""
    check_steps(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise ConfigError(
                f"model: {name} has no shape before its first forward pass (a Lazy module); give its layer the number "
                "of features, such as by a parameter that bears a fact's name"
            )
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            raise ConfigError(
                f"model: parameter {name} is {parameter.dtype}, which the optimizers do not take; keep "
                "torch.view_as_real of it and make it complex in forward"
            )
    for name, child in module.named_modules():
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            raise ConfigError(
                f"model: {name or type(module).__name__} has a state beside its parameters and buffers "
                "(get_extra_state), which a checkpoint would not have; register_buffer it"
            )


def _check_same_weights(module: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """Refuse a network whose construction depends on the rank; return checksums of its tensors. Collective."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    sums = {name: _checksum(tensor.detach()) for name, tensor in tensors}
    of_ranks = ranks.gather_objects(sums)
    for rank, found in enumerate(of_ranks):
        others = [name for name in of_ranks[0] | found if found.get(name) != of_ranks[0].get(name)]
        if others:
            raise ConfigError(
                f"model: rank {rank} has built other first weights than rank 0 ({len(others)} tensors, such as "
                f"{others[0]}), so the ranks would train different networks; a constructor may depend on the seed of "
                "torch, and not on the rank, the time or a generator of its own"
            )
    return sums


def _check_weights_are_kept(module: nn.Module, before: Mapping[str, Any]) -> None:
    """Refuse a network whose forward pass changes its own parameters, which the look has done now."""
    for name, parameter in module.named_parameters():
        if _checksum(parameter.detach()) != before[name]:
            raise ConfigError(
                f"model: a forward pass changes its parameter {name}, as an average of weights or a clamp does; keep "
                "such a tensor in a buffer (register_buffer), or do it in the network's arithmetic"
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


def _check_loss(
    module: nn.Module, task: TaskLoss, losses: Callable[[], Tensor], few: Batch, batches: TrainingBatches
) -> tuple[str, ...]:
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
    bad = batches.numbers(few.ids[(~of_rows.isfinite()).to(few.ids.device)].tolist())
    which = f"row {', '.join(map(str, bad[:SHOWN]))}" if bad else f"the first {few.num_rows} rows"
    return (
        f"the loss of {which} is {float(loss.detach())} before any update, and an update with such a row is not "
        "applied; look at these rows, and at divisions and logarithms in the loss",
    )


def _check_padding_is_weighted(task: TaskLoss, batches: TrainingBatches) -> None:
    """Refuse rows that may be padded under a loss that would count the padding."""
    may_be_padded = isinstance(batches.rows, DatasetRows) and batches.rows.has_own_collate
    if may_be_padded and not task.is_weighted and task.targets_per_row > 1:
        raise ConfigError(
            f"task: the loss has {task.targets_per_row} values a row, and the data bring a collate, which may pad "
            f"rows: {WRITE_WEIGHTS}"
        )


def _draws_at_random(module: nn.Module, losses: Callable[[], Tensor]) -> bool:
    """Return whether a pass moves a generator of this process, as dropout does.

    Two passes with other losses are no sign of it: a count outside the network makes such as well.
    """
    module.train()
    before = rng.capture()
    with torch.no_grad():
        losses()
    return any(not torch.equal(state, before[name]) for name, state in rng.capture().items())


def _spread(batches: TrainingBatches, first: Batch) -> Iterator[Batch]:
    """Yield the first micro-batch, and after it some of other updates of the first epoch."""
    yield first
    last = batches.plan.steps_per_epoch - 1  # which may be smaller
    for position in range(1, last, -(-last // SPREAD)) if last > 1 else ():
        yield batches.at(position)[0]


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
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    tolerance = TOLERANCE_ON_GPU if whole.is_cuda else TOLERANCE[dtype]
    differs = (whole - apart).abs() > tolerance * whole.abs().max().clamp(min=SMALL_LOSS)
    if not differs.any():
        return ""
    place = int(differs.to(torch.uint8).argmax())
    return (
        f"the loss of row {ids[place]} is {whole[place]:.6g} beside {len(ids) - 1} other rows and {apart[place]:.6g} "
        f"beside {len(ids) // 2 - 1}, in eval mode"
    )


def _watched(module: nn.Module, losses: Callable[[], Tensor], device: torch.device) -> tuple[list[str], str, bool]:
    """Send the same rows through a network twice, with the same random numbers and buffers.

    Returns:
        The names of attributes that the second pass finds otherwise than it leaves them, such as a counter (what is
        only kept of the last rows is as it was), a digest of the order of module calls, and whether both losses are
        the same.
    """
    names = {child: name for name, child in module.named_modules()}
    order = hashlib.blake2b(digest_size=8)
    hooks = [
        child.register_forward_pre_hook(lambda child, _: order.update(f"{names[child]}/".encode())) for child in names
    ]
    kind = type(module).__name__
    module.train()
    with no_trace(module, device):
        first = losses().detach()
    for hook in hooks:
        hook.remove()
    before = {name: _attributes(child) for child, name in names.items()}
    second = losses().detach()
    changed = [
        ".".join(filter(None, [kind, name, attribute]))
        for child, name in names.items()
        for attribute, value in _attributes(child).items()
        if value != before[name].get(attribute)
    ]
    tolerance = TOLERANCE_ON_GPU if first.is_cuda else SAME_AGAIN
    return changed, order.hexdigest(), torch.allclose(first, second, rtol=tolerance, atol=0.0, equal_nan=True)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what in a module's attributes could be state that is no buffer: numbers, tensors and trees of them.

    A tensor with a gradient function is what the forward pass has just made, and no state.
    """
    found = {name: _state_of(value) for name, value in vars(module).items() if name not in OF_TORCH}
    return {name: value for name, value in found.items() if value is not None}


def _state_of(value: Any) -> Any:
    """Return what is compared: numbers as they are, checksums of arrays."""
    found: Any = None
    match value:
        case int() | float():
            found = value
        case torch.Generator():
            found = _checksum(value.get_state())
        case np.ndarray():
            found = value.tobytes()
        case Tensor() if not value.requires_grad and value.layout == torch.strided:
            found = _checksum(value)
        case list() | tuple() | deque():
            found = [_state_of(each) for each in value]
        case Mapping():
            found = {name: _state_of(each) for name, each in value.items()}
    return found


def _any_number_of_ranks(module: nn.Module, task: TaskLoss, company: str, *, draws: bool) -> Promise:
    name = "any number of ranks"
    if company:
        return Promise(name, "not", company)
    if task.mixes_rows:
        return Promise(name, "not", "the loss mixes the rows of a micro-batch, whose size follows from it (mixes_rows)")
    norms = [of for of, child in module.named_modules() if type(child) in OF_A_RANK]
    if norms:
        return Promise(name, "not", f"BatchNorm ({norms[0]}) takes the statistics of a rank's micro-batch")
    if draws:
        return Promise(
            name, "held if", "what is drawn at random in the network, as by dropout, may be other numbers on each rank"
        )
    return Promise(name, "held")


def _resume(strays: Sequence[str], *, is_repeatable: bool, is_same_again: bool) -> Promise:
    name = "resume exact"
    if not is_repeatable:
        return Promise(name, "not", "row 0, asked for twice, is not the same: it draws from a generator of its own")
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

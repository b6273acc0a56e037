"""What a user's network, loss and metrics do with the first rows, and what is refused of it."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from harness.checkpoint import rng
from harness.doctor.hidden_state import TOLERANCE_ON_GPU
from harness.errors import ConfigError
from harness.own_code import is_of_user, told
from harness.ranks.group import Ranks
from harness.rows.batches import Batch, TrainingBatches
from harness.rows.dataset import DatasetRows
from harness.rows.tree import leaves, paths
from harness.scores import prepared
from harness.tasks.adapted import ONE_STEP, STEPS, WRITE_WEIGHTS, AdaptedTask
from harness.tasks.base import LOSS, PairTask, TaskLoss

LOOKED_AT_ROWS = 4
"""Whose loss is compared with that of its halves; two rows each, since BatchNorm wants two."""
SHOWN = 3
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far apart the losses of one row may be, relative to the largest, where batches are of another size."""
SMALL_LOSS = 0.01
"""Losses below are compared as if they were as large, since logits are rounded too."""
SPREAD = 8
"""Micro-batches that are looked at for parameters that the first rows do not use."""


def _outputs_of(task: TaskLoss, module: nn.Module, network: Callable[..., Any], batch: Batch) -> Any:
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


def check_scores(
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


def _loss_of(task: TaskLoss, outputs: Any, batch: Batch) -> Tensor:
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


class Trial:
    """Sends rows through the bare network of a run and its task.

    Args:
        autocast: what the run computes in, if in less than the type of its weights.
    """

    def __init__(self, module: nn.Module, task: TaskLoss, device: torch.device, autocast: torch.dtype | None) -> None:
        self._module, self._task, self._device, self._autocast = module, task, device, autocast
        self._network = _OnlyCalled(module)

    def outputs_of(self, batch: Batch) -> Any:
        """Return what the network returns for a batch.

        Raises:
            ConfigError: it takes other arguments than the task calls it with, or returns no tensor.
        """
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            outputs = _outputs_of(self._task, self._module, self._network, batch)
        if not any(isinstance(leaf, Tensor) for leaf in leaves(outputs)):
            raise ConfigError(
                f"model: in the {type(outputs).__name__} that it returns no tensor is found; return a tensor, or a "
                "dict, list, tuple, NamedTuple or dataclass of some"
            )
        return outputs

    def losses_of(self, batch: Batch) -> Callable[[], Tensor]:
        """Return what computes the sum of the loss of a batch."""
        return lambda: _loss_of(self._task, self.outputs_of(batch), batch)


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


def check_network(module: nn.Module) -> None:
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


def check_steps(module: nn.Module) -> None:
    """Refuse a network that wants to make its updates itself.

    Raises:
        ConfigError: it has a method for that.
    """
    if steps := [step for step in STEPS if hasattr(module, step)]:
        raise ConfigError(f"model: {type(module).__name__} has {steps[0]}, but {ONE_STEP}; its loss goes into a task")


def check_loss(
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


def may_pad(batches: TrainingBatches) -> bool:
    """Return whether a batch may have more of a row than the row has."""
    return isinstance(batches.rows, DatasetRows) and batches.rows.may_pad


def check_padding_is_weighted(task: TaskLoss, batches: TrainingBatches) -> None:
    """Refuse rows that may be padded under a loss that would count the padding."""
    if may_pad(batches) and not task.is_weighted and task.targets_per_row > 1:
        raise ConfigError(
            f"task: the loss has {task.targets_per_row} values a row, and rows may be padded (by data.collate, or a "
            f"collate of the data): {WRITE_WEIGHTS}"
        )


def draws_at_random(module: nn.Module, losses: Callable[[], Tensor]) -> bool:
    """Return whether a pass moves a generator of this process, as dropout does.

    Two passes with other losses are no sign of it: a count outside the network makes such as well.
    """
    module.train()
    before = rng.capture()
    with torch.no_grad():
        losses()
    return any(not torch.equal(state, before[name]) for name, state in rng.capture().items())


def spread(batches: TrainingBatches, first: Batch) -> Iterator[Batch]:
    """Yield the first micro-batch, and after it some of other updates of the first epoch."""
    yield first
    last = batches.plan.steps_per_epoch - 1  # which may be smaller
    for position in range(1, last, -(-last // SPREAD)) if last > 1 else ():
        yield batches.at(position)[0]


def told_of_company(module: nn.Module, task: TaskLoss, few: Batch, batches: TrainingBatches) -> str:
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

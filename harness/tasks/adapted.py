"""A task of a user's: its un-reduced loss as the sum and the weight that the loop divides by each other."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.problems import nearest_name
from harness.errors import ConfigError
from harness.rows.batches import Batch
from harness.tasks.base import LOSS

LEDGER_KEYS = (
    *("event", "step", "loss", "grad_norm", "clip_coefficient", "learning_rate", "loss_scale", "num_targets"),
    *("samples_seen", "applied", "seconds", "samples_per_second", "tokens_per_second", "memory_bytes", "mfu"),
)
"""What a line of an update has already; a term of a user's cannot be called so."""
METHODS = {
    "forward": ("network", "batch"),
    "loss": ("outputs", "batch"),
    "weights": ("batch",),
    "metrics": (),
    "scored": ("outputs", "batch"),
    "examples": ("outputs", "batch"),
    "parameter_groups": ("network",),
}
"""What a task may have, and what it is called with."""
SLIP = 0.85
"""How alike two names are of which one is a slip of the other: `weight` of `weights`; not `loss_fn` of `loss`."""
SETTINGS = ("lr_factor", "weight_decay")
WRITE_WEIGHTS = (
    "add a method weights(self, batch) that returns 1.0 for each target that counts and 0.0 for padding, in the "
    'shape of the loss, such as (batch["label"] != -100).float()'
)
STEPS = ("training_step", "optimizer_step", "configure_optimizers", "optimizers", "closure")
"""What a part has that wants to make the update itself."""
ONE_STEP = (
    "an update is one step of one optimizer, made by the harness; two optimizers (as a GAN wants) and steps of the "
    "second order do not fit (docs/parts.md)"
)


class AdaptedTask:
    """A task that says of each target what its loss is, and nothing of sums, ranks or means.

    Args:
        part: has `loss(outputs, batch)`, and may have the others of `METHODS`, `mixes_rows` and `counts_tokens`.
        name: of its kind, for messages.
    """

    def __init__(self, part: Any, *, name: str) -> None:
        self._part, self.name = part, name
        self.is_weighted = getattr(part, "weights", None) is not None
        self.mixes_rows = bool(getattr(part, "mixes_rows", False))
        self.counts_tokens = bool(getattr(part, "counts_tokens", False)) and not self.is_weighted
        self.targets_per_row = 0
        """From the first loss on known, if `weights` does not say how many there are."""
        self._terms: list[str] = []
        if steps := [step for step in STEPS if hasattr(part, step)]:
            raise self._error(f"has {steps[0]}, but {ONE_STEP}")
        for method in METHODS:
            if not hasattr(part, method) and (near := _misspelt(method, type(part))):
                raise self._error(
                    f"has a method {near} and no {method}; if {method} is meant, call it so, else let {near} begin "
                    "with _"
                )
        if not callable(getattr(part, "loss", None)):
            near = nearest_name("loss", [name for name in dir(part) if not name.startswith("_")])
            raise self._error(
                f"has no loss(outputs, batch){f' (nearest: {near})' if near else ''}; it returns one value a target"
            )
        for method, arguments in METHODS.items():
            self._check_arguments(method, arguments)

    def _check_arguments(self, method: str, arguments: tuple[str, ...]) -> None:
        found = getattr(self._part, method, None)
        if found is None:
            return
        if not callable(found):
            raise self._error(f"{method} is a {type(found).__name__}; it is called as {method}({', '.join(arguments)})")
        with suppress(ValueError):  # one of C tells nothing of its arguments
            try:
                inspect.signature(found).bind(*arguments)
            except TypeError as error:
                raise self._error(
                    f"{method}{inspect.signature(found)} cannot be called as {method}({', '.join(arguments)}): {error}"
                ) from None

    @property
    def terms(self) -> Sequence[str]:
        return self._terms

    def forward(self, network: Callable[..., Any], data: Any) -> Any:
        forward = getattr(self._part, "forward", None)
        return network(data) if forward is None else forward(network, data)

    def loss_sums(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        terms = self._losses(outputs, batch)
        if not self.is_weighted:
            return {name: values.sum() for name, values in terms.items()}
        weights = self._weights(batch, terms[LOSS])
        return {name: _weighted(values, weights).sum() for name, values in terms.items()}

    def row_losses(self, outputs: Any, batch: Batch) -> Tensor:
        values = self._losses(outputs, batch)[LOSS]
        if self.is_weighted:
            values = _weighted(values, self._weights(batch, values))
        return values.reshape(batch.num_rows, -1).sum(dim=1)

    def weight_sum(self, batch: Batch) -> Tensor | int:
        if not self.is_weighted:
            return batch.num_rows * self.targets_per_row
        weights = self._weights(batch)
        # Without a look at the host: a weight below 0 makes every loss NaN, so nothing is learned from it.
        return weights.sum() + torch.where((weights < 0).any(), torch.nan, 0.0)

    def parameter_groups(self, network: nn.Module) -> Mapping[str, Mapping[str, float]]:
        groups = getattr(self._part, "parameter_groups", None)
        if groups is None:
            return {}
        found: Mapping[str, Mapping[str, float]] = groups(network)
        names = [name for name, _ in network.named_parameters()]
        for name, settings in found.items():
            if name not in names:
                near = nearest_name(name, names)
                raise self._error(f"parameter_groups names {name}, which the network has not (nearest: {near})")
            if other := [key for key in settings if key not in SETTINGS]:
                raise self._error(f"parameter_groups sets {other[0]} of {name}; {' and '.join(SETTINGS)} can be set")
        return found

    def examples(self, outputs: Any, data: Any, places: Tensor) -> dict[str, list[Any]]:
        examples = getattr(self._part, "examples", None)
        if examples is None:
            return {}
        columns: Mapping[str, Sequence[Any]] = examples(outputs, data)
        return {name: [values[place] for place in places.tolist()] for name, values in columns.items()}

    def metrics(self) -> dict[str, Any]:
        metrics = getattr(self._part, "metrics", None)
        return {} if metrics is None else dict(metrics())

    def scored(self, outputs: Any, data: Any) -> tuple[Any, ...]:
        scored = getattr(self._part, "scored", None)
        found = (outputs, data) if scored is None else scored(outputs, data)
        return found if isinstance(found, tuple) else (found,)

    def only_answer(self, metrics: Mapping[str, Any]) -> None:
        return None

    # -------------------------------------------------------- what a user returns

    def _losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the terms as the user's loss has them, checked by their shapes alone: nothing is read."""
        found = self._part.loss(outputs, batch.data)
        terms = dict(found) if isinstance(found, dict) else {LOSS: found}
        if LOSS not in terms:
            raise self._error(
                f"its loss returned a dict with {', '.join(map(str, terms))}; the term `loss`, which is trained on, is "
                "missing"
            )
        terms = {LOSS: terms[LOSS], **terms}
        for name, values in terms.items():
            self._check_term(name, values, batch, like=terms[LOSS])
        if not self._terms:
            self._terms = list(terms)
            self._check_names(self._terms)
        if list(terms) != self._terms:
            raise self._error(
                f"its loss returned the terms {', '.join(terms)}, and {', '.join(self._terms)} before; return the same "
                "ones always"
            )
        return terms

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names[1:]:
            if not name.isidentifier() or name in LEDGER_KEYS or name.endswith("_fraction"):
                raise self._error(f"its loss returned the term {name!r}, which no column of the ledger can be called")

    def _check_term(self, name: str, values: Any, batch: Batch, *, like: Any) -> None:
        what = "its loss" if name == LOSS else f"the term {name} of its loss"
        if not isinstance(values, Tensor) or not values.is_floating_point():
            found = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise self._error(f"{what} is {found}; a tensor of floats is wanted, one value a target")
        if values.dim() == 0:
            raise self._error(
                f"{what} is one number, shape (); return one value a target and leave the mean to the harness, such as "
                'cross_entropy(outputs, batch["label"], reduction="none")'
            )
        if len(values) != batch.num_rows:
            raise self._error(
                f"{what} has shape {tuple(values.shape)} for {batch.num_rows} rows; its first dimension is the rows"
            )
        if values.shape != like.shape:
            raise self._error(
                f"{what} has shape {tuple(values.shape)}, `loss` has {tuple(like.shape)}; all have one value a target"
            )
        if name != LOSS or self.is_weighted:
            return
        per_row = values.numel() // batch.num_rows
        if not self._terms:
            self.targets_per_row = per_row
        elif per_row != self.targets_per_row:
            raise self._error(
                f"{what} has {per_row} values a row, and had {self.targets_per_row} before, so the rows of a batch do "
                f"not tell how many targets it has; {WRITE_WEIGHTS}"
            )

    def _weights(self, batch: Batch, values: Tensor | None = None) -> Tensor:
        weights = self._part.weights(batch.data)
        if not isinstance(weights, Tensor):
            raise self._error(
                f"weights returned {type(weights).__name__}; a tensor of the shape of the loss is wanted, or no method "
                "weights where every target counts alike"
            )
        if values is not None and weights.shape != values.shape:
            raise self._error(
                f"weights have shape {tuple(weights.shape)}, the loss has {tuple(values.shape)}; they are one a target"
            )
        return weights if weights.is_floating_point() else weights.to(torch.get_default_dtype())

    def _error(self, problem: str) -> ConfigError:
        error = ConfigError(f"task {self.name}: {problem}")
        error.is_of_one_rank = True  # as far as this one knows
        return error


def adapted(part: Any, *, name: str) -> AdaptedTask:
    """Return a user's task as the loop knows tasks.

    Raises:
        ConfigError: it has no `loss`.
    """
    return AdaptedTask(part, name=name)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Return values times weights; what has the weight 0 is 0, be it NaN."""
    return torch.where((weights == 0) & ~values.isfinite(), 0.0, values * weights)


def _misspelt(method: str, part: type[Any]) -> str | None:
    """Return a method of a class that is called almost as one that nothing would call."""
    names = [name for name, found in vars(part).items() if inspect.isroutine(found) and not name.startswith("_")]
    return next(iter(difflib.get_close_matches(method, names, n=1, cutoff=SLIP)), None)

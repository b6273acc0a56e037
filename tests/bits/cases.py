"""What is trained: the configs of `configs/`, made short, and variants of them with what none of them has.

Shorter are the number of updates, the tables and texts (or more of the rows validate) and the warm-up; what an update
does is the config's. Each takes up an epoch's ragged last batch, the end of warm-up and an evaluation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet

STRATEGIES = ("ddp", "zero3")
SHORT_TEXT_BYTES = 1_200


@dataclass(frozen=True)
class Case:
    """A config, and how it is made short.

    Args:
        config: its name in `configs/`, without .yaml.
        variant: what else is asked for; empty is the config as it is.
        data: names of `harness data prepare`.
    """

    config: str
    updates: int
    overrides: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    variant: str = ""
    by_strategy: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """More overrides under one strategy."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return f"{self.config}+{self.variant}" if self.variant else self.config

    def arguments(self, strategy: str, *, updates: int | None) -> list[str]:
        """Return the overrides for a strategy; `updates` in the place of the case's own number."""
        steps = f"run.max_steps={updates or self.updates}"
        own = (*self.overrides, *self.by_strategy.get(strategy, ()))
        return ["tracking.report=false", f"strategy.kind={strategy}", steps, *own]


ADAMW = ("optim={kind: adamw, peak_lr: 2e-3, weight_decay: 0.1, betas: [0.9, 0.99]}",)
"""In the place of Muon, which is for ddp alone."""
SHAKESPEARE = (
    *("data.tokenizer.vocab_size=512", "model.ngrams.rows=2048"),
    *("schedule.warmup_steps=4", "evaluation={every_epochs: 1}", "checkpoint.every_steps=1000"),
)
MNIST = ("data.validation_fraction=0.9", "schedule.warmup_steps=5")
KRK = ("schedule.warmup_steps=5",)
CASES = (
    Case("digits_mlp", 18, ("data.validation_fraction=0.5", "evaluation.every_epochs=1"), ("digits",)),
    Case("default_mlp", 20, ("data.validation_fraction=0.8", "schedule.warmup_steps=8"), ("default",)),
    Case("fraud_mlp", 10, data=("fraud",)),
    Case("krk_sigmoid12", 11, (*KRK, "diagnostics.every_steps=5"), ("krk",)),
    Case("krk_relu12", 11, KRK, ("krk",)),
    Case("krk_residual12", 11, KRK, ("krk",)),
    Case("mnist_cnn", 10, MNIST),
    Case("shakespeare_gpt", 15, SHAKESPEARE, ("shakespeare",), by_strategy={"zero3": ADAMW}),
    Case("shakespeare_gpt_20min", 8, SHAKESPEARE, ("shakespeare",), by_strategy={"zero3": ADAMW}),
    Case("reviews_minilm", 5, ("schedule.warmup_steps=2",), ("reviews", "minilm")),
    Case(
        "mnist_cnn",
        10,
        (
            *(*MNIST, "data.augment_shift_pixels=2", "data.augment_horizontal_flip=true", "ema={decay: 0.9}"),
            *("strategy.micro_batch=8", "model.norm=batch", "model.residual=true", "checkpoint.every_steps=4"),
            "model.channels=[8, 16]",
        ),
        variant="augment,ema,accumulation",
    ),
    Case(
        "digits_mlp",
        18,
        (
            *("data.validation_fraction=0.5", "optim={kind: sgd, peak_lr: 0.1, momentum: 0.9, nesterov: true}"),
            *("clip={kind: value, max_value: 0.01}", "schedule={kind: step, every_epochs: 1, factor: 0.5}"),
            *("evaluation.every_epochs=1", "diagnostics.every_steps=6", "tracking.sample_table_rows=3"),
        ),
        ("digits",),
        variant="sgd,clip-by-value",
        by_strategy={"ddp": ("gradient_noise={eta: 0.01}",)},
    ),
    Case(
        "default_mlp",
        20,
        (
            *("data.validation_fraction=0.8", "data.sampling=balanced", "task.label_smoothing=0.1"),
            *("strategy.precision=fp16", "model.dropout=0.2"),
            "schedule={kind: plateau, metric: val/loss, patience_evaluations: 0, warmup_steps: 4}",
            "evaluation={every_steps: 3}",
        ),
        ("default",),
        variant="balanced,fp16,plateau",
    ),
    Case(
        "shakespeare_gpt",
        10,  # Not an epoch: its last batch leaves ranks without rows, which crash in 0.1.0, as dropout is back on when
        # their eval-mode forward is computed again.
        (
            *(*SHAKESPEARE, *ADAMW, "model.experts={count: 4, top_k: 2}", "model.dropout=0.1", "ema={decay: 0.9}"),
            *("model.layers=2", "strategy.activation_checkpointing=true", "strategy.micro_batch=4"),
        ),
        ("shakespeare",),
        variant="experts,dropout,checkpointing",
    ),
)


def cases_of(configs: Sequence[str], asked: Sequence[str]) -> list[Case]:
    """Return the cases that are asked for by name, or by that of their config; all without one.

    Args:
        configs: names of all that are in `configs/`; one that is not in CASES is trained for 20 updates.
    Raises:
        ValueError: there is no such case.
    """
    known = [*CASES, *(Case(name, 20) for name in configs if name not in {case.config for case in CASES})]
    if unknown := set(asked) - {name for case in known for name in (case.name, case.config)}:
        raise ValueError(
            f"there is no {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in known)}"
        )
    chosen = [case for case in known if case.name in asked]
    chosen += [case for case in known if case.variant and case.config in asked and case not in chosen]
    return chosen if asked else known


def shorten_text(source: Path, to: Path) -> None:
    """Copy the first lines of a text."""
    head = source.read_bytes()[:SHORT_TEXT_BYTES]
    to.write_bytes(head[: head.rfind(b"\n") + 1])


def _shorten_table(choose: Callable[[Any], Sequence[int]], source: Path, to: Path) -> None:
    table = pyarrow.parquet.read_table(source)
    pyarrow.parquet.write_table(table.take(list(choose(table))), to)


def first(count: int) -> Callable[[Path, Path], None]:
    """Copy the first rows of a table."""
    return partial(_shorten_table, lambda table: range(min(count, table.num_rows)))


def every(step: int) -> Callable[[Path, Path], None]:
    """Copy every `step`th row of a table."""
    return partial(_shorten_table, lambda table: range(0, table.num_rows, step))


def of_each(target: str, count: int) -> Callable[[Path, Path], None]:
    """Copy the first rows of each class, so that none is missing."""

    def choose(table: Any) -> list[int]:
        rows: dict[Any, list[int]] = defaultdict(list)
        for row, label in enumerate(table.column(target).to_pylist()):
            rows[label].append(row)
        return sorted(row for of_class in rows.values() for row in of_class[:count])

    return partial(_shorten_table, choose)


SHORTEN: dict[str, Callable[[Path, Path], None]] = {
    "shakespeare/": shorten_text,
    "reviews.parquet": first(100),
    "reviews_test.parquet": first(40),
    "fraud.parquet": every(10),
    "krk.parquet": of_each("moves", 80),
}
"""How to copy what would else take minutes, by the beginning of names below `data/`."""

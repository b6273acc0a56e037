"""Runs of parts of a user's own, with the harness and with nothing but torch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from harness.assemble import assemble
from harness.config.io import load_config
from harness.config.run_config import RunConfig
from harness.loop import evaluate, train_step
from harness.rows.lengths import lengths_of
from harness.rows.order import BatchPlan, RowsByLength, permutation_key, random_bits
from harness.rows.rows import ColumnTree
from harness.rows.splits import DataSplits
from harness.rows.tree import map_tree
from harness.stopping import StopSignals
from harness.strategy.build import DTYPES
from tests.distributed.scenarios import join

EXAMPLES = Path(__file__).parents[2] / "examples"
PADDING: dict[str, dict[str, float]] = {"ragged": {"steps": 0, "side": -100}}
"""Of each tensor of an example, what data.collate pads it with."""
ROWS, UPDATES, BATCH, MAX_NORM = 67, 7, 24, 0.5
"""The last batch of an epoch has 19 rows, which no number of ranks divides."""


@dataclass(frozen=True)
class Own:
    """One way to train an example for a few updates."""

    example: str
    strategy: str = "ddp"
    precision: str = "fp32"
    micro_batch: int | None = None
    micro_batch_tokens: int | None = None
    overrides: tuple[str, ...] = ()
    num_rows: int | None = ROWS
    """Key of the data part; None leaves it out."""
    padding: tuple[tuple[str, float], ...] = ()
    """As PADDING has it, for what is no example."""

    def config(self) -> RunConfig:
        micro_batch = (
            f"micro_batch: {self.micro_batch or 'null'}, micro_batch_tokens: {self.micro_batch_tokens or 'null'}"
        )
        strategy = f"{{kind: {self.strategy}, precision: {self.precision}, {micro_batch}}}"
        given = (
            *([] if self.num_rows is None else [f"data.num_rows={self.num_rows}"]),
            *(
                f"data.global_batch={BATCH}",
                f"run.max_steps={UPDATES}",
                "run.max_epochs=null",
            ),
            *(f"strategy={strategy}", f"clip.max_norm={MAX_NORM}"),
            *("schedule={kind: constant}", "early_stopping=null", "optim.peak_lr=0.01"),
        )
        return load_config(EXAMPLES / self.example / "run.yaml", (*given, *self.overrides)).config


@dataclass
class Course:
    """What a run did."""

    terms: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    micro_batches: list[int] = field(default_factory=list)
    """Of each update, on this rank."""
    num_padding: int = 0
    """Of these, without a row."""


def parts_of(config: RunConfig) -> tuple[DataSplits, nn.Module]:
    splits = config.data.open(config.task, seed=config.run.seed)
    torch.manual_seed(config.run.seed)
    return splits, config.model.build(splits.facts)


def with_the_harness(owns: list[Own]) -> list[Course]:
    """Train on this rank, one run after the other in one process group."""
    return [_with_the_harness(own) for own in owns]


def _with_the_harness(own: Own) -> Course:
    config, course = own.config(), Course()
    ranks = join("zero" if own.strategy != "ddp" else "ddp")
    splits, model = parts_of(config)
    run = assemble(config, ranks, splits, model, directory=Path("/nowhere"), signals=StopSignals())
    for position in range(UPDATES):
        rate = run.strategy.tensor(run.learning_rate(position + 1), dtype=torch.float64)
        report = train_step(run, position, rate)
        sums = run.strategy.sum(torch.stack([term.double() for term in report.terms.values()])).tolist()
        course.terms.append(dict(zip(report.terms, sums, strict=True)))
        course.norms.append(report.gradient.total.item())
        batches = run.batches.at(position)
        course.micro_batches.append(len(batches))
        course.num_padding += sum(batch.is_padding for batch in batches)
    state = dict(run.strategy.state())
    course.weights = {name: state[f"model/{name}"].detach().clone() for name in run.strategy.parameter_names}
    course.scores = evaluate(run, step=UPDATES)
    return course


def with_plain_pytorch(own: Own) -> Course:
    """Train on whole global batches in one process, with nothing of the harness but its order of rows."""
    config, course = own.config(), Course()
    dtype = DTYPES[own.precision]
    splits, model = parts_of(config)
    model = model.to(dtype)
    part = config.task.build(splits, device=torch.device("cpu"), dtype=dtype)._part  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    lengths = lengths_of(splits.train) if config.data.sampling == "by_length" else None
    order = None if lengths is None else RowsByLength(lengths, global_batch=BATCH, seed=config.run.seed)
    plan = BatchPlan(
        num_rows=len(splits.train),
        global_batch=BATCH,
        world_size=1,
        micro_batch=None,
        seed=config.run.seed,
        order=order,
    )
    for position in range(UPDATES):
        rows = rows_of(splits.train, plan.sample_ids(position, 0), dtype, own, epoch=plan.epoch_of(position))
        terms = means(part, model, rows)
        optimizer.zero_grad()
        terms["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        course.terms.append({name: term.item() for name, term in terms.items()})
        course.norms.append(norm.item())
    course.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = rows_of(splits.validation, np.arange(len(splits.validation)), dtype, own, epoch=0)
    course.scores = scores_of(part, model.eval(), rows)
    return course


def rows_of(rows: Any, ids: np.ndarray, dtype: torch.dtype, own: Own, *, epoch: int) -> Any:
    """Some rows as one batch, by torch's own collate, that of the data set, or torch's padding; seeded one by one."""
    if isinstance(rows, ColumnTree):
        tree = map_tree(lambda column: column[torch.from_numpy(ids)], rows.tree)
    else:
        numbers = np.array(rows.numbers(ids))
        seeds = random_bits(numbers, key=permutation_key(own.config().run.seed, epoch, "row"))
        taken = [seeded(rows._dataset, *each) for each in zip(numbers.tolist(), seeds.tolist(), strict=True)]
        padding = PADDING.get(own.example) or dict(own.padding)
        collate = getattr(rows._dataset, "collate", None) or (lambda rows: padded(rows, padding))
        tree = collate(taken)
    return map_tree(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def seeded(dataset: Any, number: int, seed: int) -> Any:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global state is what the example draws from
    torch.manual_seed(seed)
    return dataset[number]


def padded(rows: list[Any], padding: dict[str, float]) -> Any:
    if not padding:
        return default_collate(rows)
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def means(part: Any, model: nn.Module, data: Any) -> dict[str, Tensor]:
    found = part.loss(part.forward(model, data), data)
    terms = found if isinstance(found, dict) else {"loss": found}
    weights = part.weights(data) if hasattr(part, "weights") else torch.ones_like(terms["loss"])
    return {name: (values * weights).sum() / weights.sum() for name, values in terms.items()}


@torch.no_grad()
def scores_of(part: Any, model: nn.Module, data: Any) -> dict[str, float]:
    losses = {f"val/{name}": term.item() for name, term in means(part, model, data).items()}
    metrics = part.metrics() if hasattr(part, "metrics") else {}
    for metric in metrics.values():
        metric.update(*part.scored(part.forward(model, data), data))
    return losses | {f"val/{name}": float(metric.compute()) for name, metric in metrics.items()}

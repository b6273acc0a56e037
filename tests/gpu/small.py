"""Runs small enough to compare with plain PyTorch, through the harness and by hand, on the device that there is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from harness.assemble import assemble
from harness.catalogue.text.tokenizers import Bytes
from harness.config.run_config import RunConfig
from harness.interval import Interval
from harness.loop import fit, train_step
from harness.observers.base import Observer, Observers
from harness.ranks.env import Placement, placement
from harness.ranks.group import Ranks
from harness.ranks.join import join_ranks
from harness.rows.order import BatchPlan
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits
from harness.run import Run
from harness.state import TrainState
from harness.stopping import StopSignals
from harness.strategy import build
from harness.strategy.build import AUTOCAST, DTYPES
from harness.strategy.loss_scale import LossScale
from tests.sections import build_model

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "hidden": [32, 32], "norm": "layer"},
    "gpt": {"kind": "gpt", "layers": 2, "width": 32, "heads": 2},
}
INPUTS, CLASSES, BLOCK = 10, 5, 16
PEAK_LR, WARMUP, MAX_NORM, DECAY = 1e-2, 4, 0.5, 0.1
SCALE, GROWTH_INTERVAL = 2.0**24, 3
"""Of fp16: so large that the first updates overflow, and so soon doubled again that later ones do."""


def device() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Job:
    """One small run on random rows; the last batch of an epoch is smaller, and another epoch begins."""

    network: str = "mlp"
    precision: str = "fp32"
    updates: int = 7
    strategy: str = "ddp"
    micro_batch: int | None = None
    ema_decay: float | None = None
    activation_checkpointing: bool = False
    offload: bool = False
    dropout: float = 0.0
    optimizer: str = "adamw"
    rows: int = 67
    global_batch: int = 16

    @property
    def config(self) -> RunConfig:
        """What a person would write."""
        is_text = self.network == "gpt"
        strategy: dict[str, Any] = {"kind": self.strategy, "precision": self.precision}
        strategy |= {"micro_batch": self.micro_batch, "activation_checkpointing": self.activation_checkpointing}
        if self.strategy == "zero3":
            strategy["persistence_threshold_elements"] = 0  # or networks of this size would be kept whole
        if self.offload:
            strategy["offload_optimizer"] = True
            strategy |= {"offload_parameters": True} if self.strategy == "zero3" else {}
        data = {"source": "text", "path": "none", "block": BLOCK} if is_text else {"source": "mnist_5k"}
        momentum = {"momentum": 0.9} if self.optimizer in ("sgd", "muon") else {}
        return RunConfig.model_validate(
            {
                "run": {"name": "small", "max_steps": self.updates, "seed": 3},
                "model": {**NETWORKS[self.network], "dropout": self.dropout},
                "data": {**data, "global_batch": self.global_batch},
                "task": {"kind": "causal_lm"} if is_text else {"kind": "classification", "num_classes": CLASSES},
                "optim": {"kind": self.optimizer, "peak_lr": PEAK_LR, "weight_decay": DECAY, **momentum},
                "schedule": {"kind": "constant", "warmup_steps": WARMUP},
                "clip": {"kind": "norm", "max_norm": MAX_NORM},
                "ema": None if self.ema_decay is None else {"decay": self.ema_decay},
                "strategy": strategy,
                "tracking": {"log_every_steps": 1},
            }
        )

    def splits(self) -> DataSplits:
        """Its rows, which validate as well."""
        generator = torch.Generator().manual_seed(1)
        if self.network == "gpt":
            ids = torch.randint(Bytes.num_tokens, (self.rows, BLOCK + 1), generator=generator)
            columns = Columns(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            return DataSplits(columns, columns, (BLOCK,), Bytes.num_tokens, tokenizer=Bytes())
        inputs = torch.randn(self.rows, INPUTS, generator=generator)
        columns = Columns(inputs, torch.randint(CLASSES, (self.rows,), generator=generator))
        return DataSplits(columns, columns, (INPUTS,), CLASSES)

    def model(self) -> nn.Module:
        """The network with its first weights, on the CPU."""
        torch.manual_seed(0)
        splits = self.splits()
        return build_model(self.config.model, input_shape=splits.input_shape, num_outputs=splits.num_outputs)


@dataclass
class Trace:
    """What a run did."""

    losses: list[float]
    norms: list[float]
    scales: list[float]
    weights: dict[str, Tensor]
    """At its end, on the CPU."""

    def largest_difference(self, other: Trace) -> float:
        """Return by how much two runs differ in one weight at most, in fp64."""
        assert self.weights.keys() == other.weights.keys(), "two runs of other networks were compared"
        pairs = [(weight.double(), other.weights[name].double()) for name, weight in self.weights.items()]
        return max((a - b).abs().max().item() for a, b in pairs)


class Seen(Observer):
    """Keeps the lines of the ledger, and calls back after every interval."""

    def __init__(self, after: Callable[[], None] = lambda: None) -> None:
        self.lines: list[dict[str, Any]] = []
        self._after = after

    def on_update(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def on_settled(self) -> None:
        self._after()


@cache
def place_of_this_process() -> Placement:
    """Return what the launcher said; DeepSpeed is told things by the same variables later."""
    return placement()


def joined(strategy: str) -> Ranks:
    """Join the other ranks, in a process group if the strategy wants one."""
    return join_ranks(place_of_this_process(), timeout_seconds=60, alone_in_group=strategy != "ddp")


def assembled(job: Job, folder: Path, model: nn.Module | None = None) -> Run:
    """Put the run of a job together on this rank, in the process group of its strategy."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return assemble(
        job.config,
        joined(job.strategy),
        job.splits(),
        job.model() if model is None else model,
        directory=folder,
        signals=StopSignals(),
    )


def by_harness(job: Job, look: Callable[[Run], None] = lambda _: None, *, folder: str | None = None) -> Trace:
    """Train with the harness's own loop on this rank, with its evaluation and its save at the end.

    Args:
        look: is shown the run after each update.
        folder: for what is saved, which all ranks have; one rank alone needs none.
    """
    scale = partial(LossScale, scale=SCALE, growth_interval=GROWTH_INTERVAL)
    with tempfile.TemporaryDirectory() as own, patch.object(build, "LossScale", scale):
        run = assembled(job, Path(folder or own))
        seen = Seen(lambda: look(run))
        run.observers = Observers([seen])
        torch.manual_seed(7)  # dropout
        try:
            result = fit(run, TrainState())
        finally:
            run.checkpoints.close()
    assert result.step == job.updates, f"it ended after {result.step} of {job.updates} updates: {result.reason}"
    weights = {key.removeprefix("model/"): tensor for key, tensor in run.strategy.state() if key.startswith("model/")}
    return Trace(
        losses=[line["loss"] for line in seen.lines],
        norms=[line["grad_norm"] for line in seen.lines],
        scales=[line["loss_scale"] for line in seen.lines if "loss_scale" in line],
        weights={name: weight.detach().cpu().clone() for name, weight in weights.items()},
    )


def by_hand(job: Job) -> Trace:
    """Train on whole batches in one process, with nothing of the harness but the network and the order of rows."""
    here, dtype, autocast = device(), DTYPES[job.precision], AUTOCAST[job.precision]
    model, splits = job.model().to(here, dtype), job.splits()
    inputs, targets = splits.train.inputs.to(here), splits.train.targets.to(here)  # type: ignore[union-attr]
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, fused=True)
    scaler = torch.amp.GradScaler(
        here.type, init_scale=SCALE, growth_interval=GROWTH_INTERVAL, enabled=job.precision == "fp16"
    )
    plan = BatchPlan(num_rows=job.rows, global_batch=job.global_batch, world_size=1, micro_batch=None, seed=3)
    trace, applied, position = Trace([], [], [], {}), 0, 0
    while applied < job.updates:
        ids = torch.from_numpy(plan.sample_ids(position, 0)).to(here)
        position += 1
        with torch.autocast(here.type, dtype=autocast, enabled=autocast is not None):
            outputs = model(inputs[ids])
        loss = nn.functional.cross_entropy(outputs.to(dtype).flatten(0, -2), targets[ids].flatten())
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (applied + 1) / WARMUP)
        optimizer.zero_grad()
        trace.scales += [scaler.get_scale()] if scaler.is_enabled() else []
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        applied += int(norm.isfinite())
        trace.losses.append(loss.item())
        trace.norms.append(norm.item())
    trace.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    for tied in [name for name in trace.weights if name == "head.weight" and job.network == "gpt"]:
        del trace.weights[tied]  # the embedding's, by its second name
    return trace


def make_updates(run: Run, state: TrainState, *, until: int) -> list[dict[str, Any]]:
    """Train to `until` applied updates as `fit` does, without evaluating and saving; return the ledger's lines."""
    seen = Seen()
    run.observers = Observers([seen])
    while state.step < until:
        interval = Interval(run, state)
        for position in interval.positions:
            interval.count(train_step(run, position, interval.learning_rate()))
        interval.close()
    return seen.lines

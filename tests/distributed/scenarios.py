"""Training runs small enough to compare with plain PyTorch, as functions that `run_ranks` can call by name."""

import contextlib
import io
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.assemble import assemble
from harness.catalogue.text.tokenizers import Bytes
from harness.checkpoint.store import CheckpointStore
from harness.config.run import Diagnostics
from harness.config.run_config import RunConfig
from harness.config.tracking import Tracking
from harness.loop import train_step
from harness.ranks.env import placement
from harness.ranks.group import Ranks
from harness.ranks.join import join_ranks
from harness.rows.order import BatchPlan
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits
from harness.run import Run
from harness.stopping import StopSignals
from harness.strategy.build import AUTOCAST, DTYPES
from harness.strategy.loss_scale import LossScale
from tests.sections import build_model, parsed

MODELS: dict[str, dict[str, Any]] = {
    "perceptron": {"kind": "perceptron", "activation": "sigmoid"},
    "robust_mlp": {"kind": "mlp", "hidden": [16, 16], "norm": "batch"},
    "deep_mlp": {"kind": "mlp", "hidden": [12, 8], "norm": ["layer", "none"], "activation": "swiglu"},
    "residual_mlp": {"kind": "mlp", "hidden": [12, 12, 8], "norm": "layer", "activation": "gelu", "residual": True},
    "resnet": {"kind": "cnn", "channels": [4, 6], "hidden": [8], "norm": "layer", "residual": True},
}
"""Networks of ours, from ten numbers or an image of 8x8 to logits of 5 classes."""
BLOCK = 6
"""Tokens of a row of the gpt networks."""
GPT: dict[str, Any] = {"kind": "gpt", "layers": 2, "width": 16, "heads": 2}
GPT_FORMS: dict[str, dict[str, Any]] = {
    "gpt": GPT,
    "gpt_swiglu": {**GPT, "norm": "rms", "activation": "swiglu", "tied_embeddings": False, "positions": "rotary"},
    "gpt_dropout": {**GPT, "dropout": 0.5},
    "gpt_ngrams": {**GPT, "ngrams": {"rows": 7, "longest": 3}},
    "gpt_experts": {**GPT, "experts": {"count": 4, "top_k": 2, "load_balance": 0.0}},
    "gpt_many_experts": {**GPT, "experts": {"count": 100, "top_k": 1, "load_balance": 0.5}},
}


@dataclass(frozen=True)
class Spec:
    """One small run: `updates` updates of `network` on `rows` random rows."""

    network: str = "mlp"
    rows: int = 67  # not a multiple of the batch: the last one of an epoch is smaller
    global_batch: int = 16
    micro_batch: int | None = None
    updates: int = 7  # 4 of warm-up, then a cosine; the fifth is the rest of an epoch, and another begins
    precision: str = "fp32"
    optimizer: str = "adamw"
    max_norm: float | None = 0.05  # small enough to clip most updates
    max_value: float | None = None
    strategy: str = "ddp"
    activation_checkpointing: bool = False
    kept_whole: int = 0
    ema_decay: float | None = None
    noise_eta: float | None = None
    task: tuple[tuple[str, Any], ...] = ()
    """More keys of the task's section."""
    mutant: str | None = None
    loss_scale: tuple[tuple[str, Any], ...] = (("init_scale", 2.0**16), ("growth_interval", 2000))
    """Options of torch's GradScaler, for fp16."""

    @property
    def config(self) -> RunConfig:
        """The harness's view of this run."""
        clip: dict[str, Any] = {"kind": "none"}
        if self.max_norm is not None:
            clip = {"kind": "norm", "max_norm": self.max_norm}
        elif self.max_value is not None:
            clip = {"kind": "value", "max_value": self.max_value}
        weight_decay = {} if self.optimizer == "adam" else {"weight_decay": 0.1}
        momentum = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        values: dict[str, Any] = {
            "run": {"name": "spec", "max_steps": self.updates, "seed": 3},
            **self._parts,
            "optim": {"kind": self.optimizer, "peak_lr": 1e-3, **weight_decay, **momentum},
            "schedule": {"kind": "cosine", "warmup_steps": 4} if self.updates > 4 else {"kind": "constant"},
            "clip": clip,
            "gradient_noise": None if self.noise_eta is None else {"eta": self.noise_eta},
            "ema": None if self.ema_decay is None else {"decay": self.ema_decay},
            "strategy": {
                "kind": self.strategy,
                "micro_batch": self.micro_batch,
                "precision": self.precision,
                "activation_checkpointing": self.activation_checkpointing,
                # These networks are so small that ZeRO-3 would keep them whole.
                **({"persistence_threshold_elements": self.kept_whole} if self.strategy == "zero3" else {}),
            },
        }
        return RunConfig.model_validate(values)

    @property
    def _parts(self) -> dict[str, Any]:
        if self.network in GPT_FORMS:
            return {
                "model": GPT_FORMS[self.network],
                "data": {"source": "text", "path": "none", "block": BLOCK, "global_batch": self.global_batch},
                "task": {"kind": "causal_lm"},
            }
        task = {"kind": "classification", "num_classes": 5} if self.is_classification else {"kind": "regression"}
        return {
            "model": {"kind": "mlp", "hidden": [8]},
            "data": {"source": "mnist_5k", "global_batch": self.global_batch},
            "task": {**task, **dict(self.task)},
        }

    @property
    def is_classification(self) -> bool:
        """Whether the network ends in logits of 5 classes."""
        return self.network in ("cnn", "norm_mlp", "transformer", *MODELS)

    def model(self) -> nn.Module:
        """The network with its first weights."""
        torch.manual_seed(0)
        match self.network:
            case "mlp":
                return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
            case "cnn":
                return nn.Sequential(
                    nn.Conv2d(1, 4, 3, padding=1),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                    nn.Conv2d(4, 8, 3, padding=1),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                    nn.Flatten(),
                    nn.Linear(8 * 2 * 2, 5),
                )
            case "norm_mlp":
                return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
            case "transformer" | "odd" | "steep":
                return {"transformer": TinyTransformer, "odd": OddOneOut, "steep": Steep}[self.network]()
            case name if name in GPT_FORMS:
                return build_model(self.config.model, input_shape=(BLOCK,), num_outputs=Bytes.num_tokens)
            case name if name in MODELS:
                shape = tuple(self.columns().inputs.shape[1:])
                return build_model(parsed("model", MODELS[name]), input_shape=shape, num_outputs=5)
        raise ValueError(self.network)

    def columns(self) -> Columns:
        """Its rows."""
        generator = torch.Generator().manual_seed(1)
        if self.network in GPT_FORMS:
            ids = torch.randint(Bytes.num_tokens, (self.rows * BLOCK + 1,), generator=generator, dtype=torch.int16)
            return Columns(ids[:-1].view(self.rows, BLOCK), ids[1:].view(self.rows, BLOCK))
        shape = (1, 8, 8) if self.network in ("cnn", "resnet") else (10,)
        inputs = torch.randn(self.rows, *shape, generator=generator)
        if self.is_classification:
            return Columns(inputs, torch.randint(5, (self.rows,), generator=generator))
        return Columns(inputs, torch.randn(self.rows, 1, generator=generator))

    def splits(self) -> DataSplits:
        """Its rows, which validate as well."""
        columns = self.columns()
        if self.network in GPT_FORMS:
            return DataSplits(columns, columns, (BLOCK,), Bytes.num_tokens, tokenizer=Bytes())
        return DataSplits(columns, columns, tuple(columns.inputs.shape[1:]), 5 if self.is_classification else 1)


class TinyTransformer(nn.Module):
    """Two encoder layers over ten numbers read as ten tokens: (B, 10) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 16)
        self.place = nn.Parameter(0.02 * torch.randn(10, 16))
        layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.embed(x.unsqueeze(-1)) + self.place)  # (B, 10, 16)
        logits: Tensor = self.head(h.mean(dim=1))
        return logits


class OddOneOut(nn.Module):
    """Tied weights, a frozen layer, a buffer, a single-element bias: (B, 10) -> (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.tied = nn.Linear(10, 10, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(10, 7).requires_grad_(False)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 1)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.frozen(torch.tanh(self.tied(torch.tanh(self.first(x))))))
        outputs: Tensor = self.last(self.norm(h))
        return outputs


@dataclass
class Trace:
    """What a run did: everything that must agree between any two ways of running it."""

    losses: list[float]
    norms: list[float]
    coefficients: list[float]
    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]
    scales: list[float] = field(default_factory=list)
    """Of the loss, before each update."""


def plain_loss(spec: Spec, targets: Tensor) -> Callable[..., Tensor]:
    """Return torch's loss for the spec's task, the mean over a batch.

    Args:
        targets: of all training rows.
    """
    if targets.is_floating_point():
        return nn.functional.mse_loss
    options: dict[str, Any] = dict(spec.task)
    weights = options.get("class_weights")
    if weights == "balanced":
        weights = [len(targets) / (5 * sum(int(label) == c for label in targets)) for c in range(5)]
    weight = None if weights is None else torch.tensor(weights, dtype=DTYPES[spec.precision])
    return partial(nn.functional.cross_entropy, weight=weight, label_smoothing=options.get("label_smoothing", 0.0))


def plain_optimizer(spec: Spec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch's optimizer for the spec; matrices decay."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    match spec.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=1e-3, fused=True)
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)
            for parameter in parameters:  # where the first update is skipped, torch's fused one starts from anything
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
    raise ValueError(spec.optimizer)


def plain_pytorch(spec: Spec, num_slices: int = 1) -> Trace:
    """Train on the whole global batch in one process, with nothing of the harness but its order of rows.

    Args:
        num_slices: forward passes that the batch is cut into; only BatchNorm can tell the difference.
    """
    dtype = DTYPES[spec.precision]
    model, columns, config = spec.model().to(dtype), spec.columns(), spec.config
    inputs, targets = (
        column.to(dtype) if column.is_floating_point() else column.long()
        for column in (columns.inputs, columns.targets)
    )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = plain_optimizer(spec, [p for _, p in named])
    schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if spec.updates > 4:
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=spec.updates - 4)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], milestones=[4])
    loss_of = plain_loss(spec, targets)
    scaler = torch.amp.GradScaler("cpu", enabled=spec.precision == "fp16", **dict(spec.loss_scale))
    plan = BatchPlan(
        num_rows=spec.rows, global_batch=spec.global_batch, world_size=1, micro_batch=None, seed=config.run.seed
    )
    trace = Trace([], [], [], [], {})
    for position in range(spec.updates):
        ids = torch.from_numpy(plan.sample_ids(position, 0))
        outputs = []
        cuts = [index * len(ids) // num_slices for index in range(num_slices + 1)]
        for part in (ids[start:stop] for start, stop in pairwise(cuts)):
            with torch.autocast("cpu", dtype=AUTOCAST[spec.precision], enabled=AUTOCAST[spec.precision] is not None):
                outputs.append(model(inputs[part]).to(dtype))
        predicted, wanted = torch.cat(outputs), targets[ids]
        if spec.network in GPT_FORMS:
            predicted, wanted = predicted.flatten(0, 1), wanted.flatten()
        loss = loss_of(predicted, wanted)
        optimizer.zero_grad()
        trace.scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        trace.gradients.append({name: p.grad.clone() for name, p in named})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_norm or float("inf"))
        coefficient = min(1.0, (spec.max_norm or float("inf")) / (norm.item() + 1e-6))
        if spec.max_value is not None:
            torch.nn.utils.clip_grad_value_(model.parameters(), spec.max_value)
            coefficient = (torch.nn.utils.get_total_norm([p.grad for _, p in named]) / norm).item()
        scaler.step(optimizer)
        scaler.update()
        if norm.isfinite():  # the rate follows the updates that were applied
            schedule.step()
        trace.losses.append(loss.item())
        trace.norms.append(norm.item())
        trace.coefficients.append(coefficient)
    trace.parameters = {name: p.detach().clone() for name, p in named}
    return trace


def join(strategy: str = "ddp") -> Ranks:
    """Join the process group of `run_ranks`, or of `run_standing_ranks` if this rank has not done so."""
    place = placement()
    if dist.is_initialized():
        return Ranks(rank=place.rank, world_size=place.world_size, device=torch.device("cpu"))
    return join_ranks(place, timeout_seconds=50, alone_in_group=strategy != "ddp")


def assemble_spec(spec: Spec, directory: str = "/nowhere") -> Run:
    """Put the run of a spec together on this rank."""
    if directory != "/nowhere":
        (Path(directory) / "checkpoints").mkdir(parents=True, exist_ok=True)
    return assemble(spec.config, join(), spec.splits(), spec.model(), directory=Path(directory), signals=StopSignals())


def harness_trace(spec: Spec, updates: int | None = None) -> Trace:
    """Train with the harness on this rank, for all updates of the spec or for the first few."""
    from tests.distributed.mutants import MUTANTS

    run = assemble_spec(spec)
    step = train_step
    if spec.mutant:
        step = MUTANTS[spec.mutant](run, spec.model())
    strategy = run.strategy
    if spec.precision == "fp16":
        options: dict[str, Any] = dict(spec.loss_scale)
        strategy.loss_scale = LossScale(
            strategy.device, scale=options["init_scale"], growth_interval=options["growth_interval"]
        )
    trace = Trace([], [], [], [], {})
    applied = 0
    update = strategy.update

    def look_then_update(learning_rate: Tensor, *, position: int) -> Any:
        trace.gradients.append({name: gradient.clone() for name, gradient in strategy.gradients()})
        return update(learning_rate, position=position)

    strategy.update = look_then_update  # type: ignore[method-assign]
    for position in range(updates or spec.updates):
        rate = strategy.tensor(run.learning_rate(applied + 1), dtype=torch.float64)
        report = step(run, position, rate)
        applied += int(report.gradient.applied)
        if report.gradient.loss_scale is not None:
            trace.scales.append(report.gradient.loss_scale.item())
        trace.losses.append(strategy.sum(report.terms["loss"].double().reshape(1)).item())
        trace.norms.append(report.gradient.total.item())
        trace.coefficients.append(report.gradient.coefficient.item())
    state = dict(strategy.state())
    trace.parameters = {name: state[f"model/{name}"].detach().clone() for name in strategy.parameter_names}
    return trace


def train_main(*arguments: str) -> int:
    """Run `python -m harness.train` in this process, as one rank, without the report at its end."""
    from harness.train import main

    return main([*arguments, "tracking.report=false"])


def train_main_and_listen(*arguments: str) -> tuple[int, str]:
    """Do the same, and return what was said on stderr as well."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return train_main(*arguments), said.getvalue()


def fit_dirty(spec: Spec, directory: str) -> dict[str, Any]:
    """Do as `fit_spec` does, with uninitialised memory made to hold NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return fit_spec(spec, directory)


def fit_spec(
    spec: Spec,
    directory: str,
    log_every_steps: int = 10,
    diagnostics_every_steps: int = 0,
    stop_asked_of: int | None = None,
) -> dict[str, Any]:
    """Fit a spec from the start with a ledger in `directory`; return how it ended, its weights and what was raised.

    Args:
        stop_asked_of: the rank that has had a SIGTERM before it begins.
    """
    from harness.errors import HarnessError
    from harness.loop import fit
    from harness.observers.base import Observers
    from harness.observers.ledger import Ledger
    from harness.state import TrainState

    (Path(directory) / "checkpoints").mkdir(exist_ok=True)
    config = spec.config.model_copy(
        update={
            "tracking": Tracking(log_every_steps=log_every_steps),
            "diagnostics": Diagnostics(every_steps=diagnostics_every_steps),
        }
    )
    ranks, signals = join(spec.strategy), StopSignals()
    if ranks.rank == stop_asked_of:
        signals.received = signal.SIGTERM
    run = assemble(config, ranks, spec.splits(), spec.model(), directory=Path(directory), signals=signals)
    if run.strategy.rank == 0:
        run.observers = Observers([Ledger(Path(directory), keep_bytes=0)])
    state, error, reason = TrainState(), None, None
    try:
        reason = fit(run, state).reason
    except HarnessError as raised:
        error = f"{raised.exit_code} {raised}"
    weights = dict(run.strategy.state())
    parameters = {name: weights[f"model/{name}"].detach().clone() for name in run.strategy.parameter_names}
    run.observers.close()
    return {"reason": reason, "step": state.step, "position": state.position, "error": error, "parameters": parameters}


class Poisoned(nn.Module):
    """A linear model whose gradient, or loss, is not finite for rows that start with a 7.

    Args:
        loss_too: the loss is not finite either; otherwise only the gradient is NaN.
        loss_only: the loss is infinite and the gradient is not.
    """

    def __init__(self, *, loss_too: bool, loss_only: bool) -> None:
        super().__init__()
        self.loss_too, self.loss_only = loss_too, loss_only
        self.first = nn.Linear(10, 4)
        self.second = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        good = (x[:, :1] != 7).to(x.dtype)  # (B, 1)
        outputs: Tensor = self.second(self.first(x))
        if self.loss_only:
            # The square of 1e20 is infinite in fp32; the gradient of these outputs is 0.
            return torch.where(good > 0, outputs, 1e20)
        if self.loss_too:
            return outputs / good
        # 0 * sqrt(0 * h) is 0, its gradient 0 * infinity
        return outputs + 0 * torch.sqrt(torch.where(good > 0, 1.0, 0 * outputs))


@dataclass(frozen=True)
class PoisonedSpec(Spec):
    """Rows of which some make the gradient NaN; none is drawn by chance."""

    network: str = "poisoned"
    poisoned_rows: tuple[int, ...] = ()
    loss_too: bool = True
    loss_only: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Poisoned(loss_too=self.loss_too, loss_only=self.loss_only)

    def columns(self) -> Columns:
        columns = super().columns()
        columns.inputs[list(self.poisoned_rows), 0] = 7.0
        return columns

    def splits(self) -> DataSplits:
        clean = Columns(*(tensor[:1].contiguous() for tensor in vars(Spec.columns(self)).values()))
        return DataSplits(self.columns(), clean, (10,), 1)


def neuron_update(learning_rate: float, rows: int) -> dict[str, float]:
    """One update of relu(w x + b) with w = b = 0.5 on `rows` rows of x = 2, target 1."""
    values = Spec(optimizer="sgd", max_norm=None, rows=rows, global_batch=8).config.model_dump(mode="json")
    values["optim"] = {"kind": "sgd", "peak_lr": learning_rate}
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    columns = Columns(torch.full((rows, 1), 2.0), torch.ones(rows, 1))
    config = RunConfig.model_validate(values)
    run = assemble(
        config, join(), DataSplits(columns, columns, (1,), 1), model, directory=Path("/nowhere"), signals=StopSignals()
    )
    gradients: dict[str, Tensor] = {}
    update = run.strategy.update

    def look_then_update(rate: Tensor, *, position: int) -> Any:
        gradients.update({name: gradient.clone() for name, gradient in run.strategy.gradients()})
        return update(rate, position=position)

    run.strategy.update = look_then_update  # type: ignore[method-assign]
    report = train_step(run, 0, run.strategy.tensor(learning_rate, dtype=torch.float64))
    return {
        "loss": run.strategy.sum(report.terms["loss"].reshape(1)).item(),
        "gradient": gradients["0.weight"].item(),
        "weight": model[0].weight.item(),
    }


def cost_of_spec(spec: Spec, directory: str) -> dict[str, Any]:
    """`cost_of_updates` of a spec's run."""
    return cost_of_updates(assemble_spec(spec, directory))


def cost_of_updates(run: Run) -> dict[str, Any]:
    """Count host reads and collectives in the updates of one interval, and at the end of the interval.

    Reads that the dispatcher does not show are counted by wrapping Tensor's methods, for the rest of this process.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    from harness.interval import Interval
    from harness.state import TrainState

    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                count("host reads")
            if func.namespace == "c10d":
                count(func._schema.name)
            return func(*args, **(kwargs or {}))

    run.agenda.updates_until_vote, run.agenda.seconds_per_update = 1000, 1e-6
    state = TrainState()
    for name in ("tolist", "numpy", "cpu", "__array__"):
        original = getattr(torch.Tensor, name)

        def reading(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            count("host reads")
            return original(*args, **kwargs)

        setattr(torch.Tensor, name, reading)
    result: dict[str, Any] = {}
    for _ in range(2):  # the first interval is a warm-up
        interval = Interval(run, state)
        counts.clear()
        with Counter():
            for position in interval.positions:
                interval.count(train_step(run, position, interval.learning_rate()))
        result["updates"] = dict(counts)
        counts.clear()
        with Counter():
            interval.close()
        result["settle"] = dict(counts)
        result["length"] = len(interval.positions)
    return result


def save_now(store: CheckpointStore, step: int, *, is_best: bool = False) -> Path:
    """Save and wait for it; raise why it failed."""
    store.directory.path.mkdir(parents=True, exist_ok=True)
    store.begin(step, {"step": step, "optimizer": store._strategy.optimizer_settings()}, is_best=is_best)
    result = store.finish()
    assert result is not None
    if result.problem:
        raise result.problem
    return result.directory


def train_updates(run: Run, positions: range) -> None:
    """Make some updates."""
    for position in positions:
        train_step(run, position, run.strategy.tensor(run.learning_rate(position + 1), dtype=torch.float64))


def save_after(spec: Spec, directory: str, updates: int) -> dict[str, Tensor]:
    """Train a few updates, save, and return the state that was saved."""
    run = assemble_spec(spec, directory)
    train_updates(run, range(updates))
    save_now(run.checkpoints, updates)
    return {key: tensor.detach().cpu().clone() for key, tensor in run.strategy.state()}


def load_and_train(
    spec: Spec, directory: str, updates: int, other: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Load the newest checkpoint and train on to `updates`; return the state as loaded, at the end, and the losses.

    Args:
        other: another directory, to save in what was loaded.
    """
    run = assemble_spec(spec, directory)
    loaded = run.checkpoints.load()
    assert loaded is not None
    run.checkpoints.restore(loaded)
    if other is not None:
        save_now(CheckpointStore(Path(other) / "checkpoints", run.strategy, run.config.checkpoint), loaded.step)
    first = {key: tensor.detach().cpu().clone() for key, tensor in run.strategy.state()}
    losses = []
    for position in range(loaded.step, updates):
        rate = run.strategy.tensor(run.learning_rate(position + 1), dtype=torch.float64)
        report = train_step(run, position, rate)
        losses.append(run.strategy.sum(report.terms["loss"].double().reshape(1)).item())
    return first, {key: tensor.detach().cpu().clone() for key, tensor in run.strategy.state()}, losses


def evaluate_with_a_liar(spec: Spec) -> dict[str, float]:
    """Evaluate where every rank but zero computes other scores."""
    from harness import loop
    from harness.scores import Scores

    class Liar(Scores):
        def compute(self, gather: Any) -> dict[str, float]:
            true = super().compute(gather)
            return {name: value + run.strategy.rank for name, value in true.items()}

    run = assemble_spec(spec)
    loop.Scores = Liar  # type: ignore[misc]
    return loop.evaluate(run, step=0)


def build_with(spec: Spec, changes: dict[str, Any]) -> str:
    """Build the engine of a spec from another DeepSpeed dictionary than its config asks for; return what is said."""
    from harness.errors import ConfigError
    from harness.strategy import build_zero

    derive = build_zero.deepspeed_config

    def wrong(*args: Any, **kwargs: Any) -> dict[str, Any]:
        derived = derive(*args, **kwargs)
        derived["zero_optimization"] |= changes.get("zero_optimization", {})
        return {**derived, **{key: value for key, value in changes.items() if key != "zero_optimization"}}

    build_zero.deepspeed_config = wrong  # type: ignore[assignment]
    try:
        assemble_spec(spec)
    except ConfigError as error:
        return str(error)
    return ""


def weights_after_evaluation(spec: Spec) -> tuple[int, int, int]:
    """Return how many elements of the weights this rank holds after an update, after an evaluation, and in all."""
    from harness.loop import evaluate

    run = assemble_spec(spec)

    def held() -> int:
        return sum(parameter.numel() for parameter in run.strategy.module.parameters())

    train_step(run, 0, run.strategy.tensor(1e-3, dtype=torch.float64))
    after_update = held()
    evaluate(run, step=0)
    return after_update, held(), run.strategy.num_parameters


class Steep(nn.Module):
    """A linear model with elements of the gradient that are finite and too large for their norm to be."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 8)
        self.second = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.second(self.first(x))
        return h + (3e37 * h - (3e37 * h).detach())  # only the gradient is larger

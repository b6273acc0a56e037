"""What sections of a configuration cannot want at once; each problem is one `path: problem` line."""

from harness.config import RunConfig
from harness.config.data import TableData
from harness.config.models import CnnModel, MlpModel, PerceptronModel
from harness.config.tasks import ClassificationTask, RegressionTask
from harness.config.training import AdafactorOptim, MuonOptim, PlateauSchedule, Schedule, WsdSchedule


def contradictions(config: RunConfig) -> list[str]:
    """Return what no two sections can want at once, one `path: problem` a line."""
    problems = []
    metrics = {"early_stopping.metric": config.early_stopping.metric} if config.early_stopping else {}
    if isinstance(config.schedule, PlateauSchedule):
        metrics["schedule.metric"] = config.schedule.metric
    for path, metric in metrics.items():
        if metric not in config.task.metrics:
            problems.append(f"{path}: {config.task.kind} has no {metric!r}; it has {', '.join(config.task.metrics)}")
    if isinstance(config.model, CnnModel) and isinstance(config.data, TableData):
        problems.append(f"model.kind: cnn wants images, data.source is {config.data.source}; use model.kind=mlp")
    if isinstance(config.task, RegressionTask) and not isinstance(config.data, TableData):
        problems.append(f"task.kind: {config.data.source} has labels; use task.kind=classification")
    if isinstance(config.optim, AdafactorOptim | MuonOptim) and config.strategy.kind != "ddp":
        problems.append(
            f"optim.kind: {config.optim.kind} looks at whole weight matrices, which {config.strategy.kind} cuts into "
            "pieces; use strategy.kind=ddp, or optim.kind=adamw"
        )
    if isinstance(config.task, ClassificationTask):
        problems += [
            f"{path}: softmax is part of the loss of classification already, which wants what goes into it; "
            f"use {path}={wanted}"
            for path, wanted in _softmax_outputs(config)
        ]
    if config.run.max_steps is not None:
        problems += phase_problems(config.schedule, total_updates=config.run.max_steps)
    return problems


def _softmax_outputs(config: RunConfig) -> list[tuple[str, str]]:
    match config.model:
        case PerceptronModel(activation="softmax"):
            return [("model.activation", "none")]
        case MlpModel(output="softmax"):
            return [("model.output", "linear")]
    return []


def phase_problems(schedule: Schedule, *, total_updates: int) -> list[str]:
    """Return what is wrong with a schedule whose phases are longer than the run; at most one line."""
    phases = {"warmup_steps": schedule.warmup_steps}
    if isinstance(schedule, WsdSchedule):
        phases["decay_steps"] = schedule.decay_steps
    if sum(phases.values()) <= total_updates:
        return []
    found = " + ".join(f"{name} {count:,}" for name, count in phases.items())
    return [
        f"schedule: {found} is more than the {total_updates:,} updates of the run; shorten it, or raise run.max_epochs "
        "or run.max_steps"
    ]


def batch_problems(config: RunConfig, *, world_size: int) -> list[str]:
    """Return what is wrong with the global batch on `world_size` ranks, one `path: problem` a line."""
    global_batch, micro_batch = config.data.global_batch, config.strategy.micro_batch
    if global_batch % world_size:
        below, above = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
        sizes = " or ".join(str(size) for size in (below, above) if size)
        return [
            f"data.global_batch: {global_batch} does not divide over {world_size} ranks; use {sizes}, "
            f"or start {_nearest_divisors(global_batch, world_size)} ranks"
        ]
    share = global_batch // world_size
    if micro_batch is not None and micro_batch > share:
        return [
            f"strategy.micro_batch: {micro_batch} is more than a rank's share of {share} rows "
            f"({global_batch} over {world_size} ranks); use {share} or less"
        ]
    if micro_batch is not None and share % micro_batch:
        return [
            f"strategy.micro_batch: a rank's share of {share} rows does not divide into micro-batches of "
            f"{micro_batch}; use {_nearest_divisors(share, micro_batch)}"
        ]
    return []


def _nearest_divisors(total: int, wanted: int) -> str:
    # 100,000 numbers each way: a mistyped batch of 10**15 rows must not be counted through.
    below = range(min(wanted - 1, total), 0, -1)[:100_000]
    above = range(wanted + 1, total + 1)[:100_000]
    nearest = [next((n for n in near if total % n == 0), None) for near in (below, above)]
    return " or ".join(str(n) for n in nearest if n is not None) or "1"

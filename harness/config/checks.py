"""What sections of a configuration cannot want at once; each problem is one `path: problem` line."""

from collections.abc import Collection

from harness.config.fields import Mode
from harness.config.problems import nearest_name
from harness.config.run_config import RunConfig
from harness.config.training import AdafactorOptim, DecaySchedule, MuonOptim, PlateauSchedule, Schedule, WsdSchedule
from harness.errors import ConfigError


def contradictions(config: RunConfig) -> list[str]:
    """Return what no two sections can want at once, one `path: problem` a line."""
    task = config.task
    problems = []
    for path, (metric, mode) in judging_metrics(config).items():
        wanted, way = ("max", "higher") if metric in task.higher_is_better else ("min", "lower")
        if task.metric_names is None and metric != "val/loss":  # of a user's task, see `check_metrics`
            continue
        if metric not in (task.metric_names or ("val/loss",)):
            problems.append(f"{path}.metric: {task.why_there_is_none(metric)}")
        elif mode != wanted:
            problems.append(f"{path}.mode: {metric} is better the {way} it is; use {path}.mode={wanted}")
    if config.data.sampling == "balanced" and task.is_ours and not task.has_labels:
        problems.append("data.sampling: balanced wants labels; use data.sampling=uniform, or task.kind=classification")
    problems += _length_problems(config)
    for section in (config.model, config.data, task):
        problems += section.problems(config)
    if isinstance(config.optim, AdafactorOptim | MuonOptim) and config.strategy.kind != "ddp":
        problems.append(
            f"optim.kind: {config.optim.kind} looks at whole weight matrices, which {config.strategy.kind} cuts into "
            "pieces; use strategy.kind=ddp, or optim.kind=adamw"
        )
    if config.gradient_noise is not None and config.strategy.kind != "ddp":
        problems.append(
            f"gradient_noise: {config.strategy.kind} clips within its step, and the noise is of the clipped gradient; "
            "use strategy.kind=ddp, or gradient_noise=null"
        )
    if isinstance(config.optim, MuonOptim) and not config.model.starts_from_nothing:
        problems.append("optim.kind: muon is for networks that start from nothing; use optim.kind=adamw")
    total_updates = config.run.max_steps or _total_steps(config.schedule)
    if total_updates is not None:  # without either it is known with the data
        problems += phase_problems(config.schedule, total_updates=total_updates)
    return list(dict.fromkeys(problems))  # two sections may say the same of each other


def _length_problems(config: RunConfig) -> list[str]:
    """Return what is wrong with asking for the lengths of rows, one `path: problem` a line."""
    data, tokens, problems = config.data, config.strategy.micro_batch_tokens, []
    if data.is_ours and not data.has_lengths:
        why = f"wants the length of every row, which {data.source} does not say; use"
        own = "a Dataset of your own with `lengths`"
        if data.sampling == "by_length":
            problems.append(f"data.sampling: by_length {why} data.sampling=uniform, or {own}")
        if tokens is not None:
            problems.append(f"strategy.micro_batch_tokens: {tokens:,} {why} strategy.micro_batch, or {own}")
    if tokens is not None and config.model.wants_sync_batch_norm:
        problems.append(
            "strategy.micro_batch_tokens: a rank may have fewer micro-batches than another, and model.sync_batch_norm "
            "would wait for it; use strategy.micro_batch, or model.sync_batch_norm=false"
        )
    return problems


def judging_metrics(config: RunConfig) -> dict[str, tuple[str, Mode]]:
    """Return the metrics that decide something about a run, and their modes, by the section that names them."""
    stopping, schedule = config.early_stopping, config.schedule
    metrics = {"early_stopping": (stopping.metric, stopping.mode)} if stopping else {}
    if best := config.checkpoint.best:
        metrics["checkpoint.best"] = (best.metric, best.mode)
    if isinstance(schedule, PlateauSchedule):
        metrics["schedule"] = (schedule.metric, schedule.mode)
    return metrics


def check_metrics(config: RunConfig, names: Collection[str]) -> None:
    """Refuse to judge a run by a metric that its task does not have.

    Args:
        names: all that an evaluation has, such as val/loss, known when the task is built.
    Raises:
        ConfigError: names the nearest.
    """
    problems = []
    for path, (metric, _) in judging_metrics(config).items():
        if metric not in names:
            nearest = nearest_name(metric, names)
            hint = f" (nearest: {nearest})" if nearest else ""
            problems.append(f"{path}.metric: {config.task.kind} has no {metric!r}{hint}; it has {', '.join(names)}")
    if problems:
        raise ConfigError("\n  ".join(problems))


def _total_steps(schedule: Schedule) -> int | None:
    return schedule.total_steps if isinstance(schedule, DecaySchedule) else None


def phase_problems(schedule: Schedule, *, total_updates: int) -> list[str]:
    """Return what is wrong with a schedule whose phases are longer than the run; at most one line."""
    phases = {"warmup_steps": schedule.warmup_steps}
    if isinstance(schedule, WsdSchedule):
        phases["decay_steps"] = schedule.decay_steps
    if sum(phases.values()) <= (length := schedule.length(total_updates)):
        return []
    found = " + ".join(f"{name} {count:,}" for name, count in phases.items())
    if _total_steps(schedule):
        return [f"schedule: {found} is more than total_steps {length:,}; shorten it, or raise schedule.total_steps"]
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
            f"or start {_possible_ranks(config, world_size=world_size)} ranks"
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


def _possible_ranks(config: RunConfig, *, world_size: int) -> str:
    """Return every number of ranks up to 64, or to twice those wanted, that the batch divides over."""
    global_batch, micro_batch = config.data.global_batch, config.strategy.micro_batch or 1
    pieces = global_batch // micro_batch if global_batch % micro_batch == 0 else global_batch
    # 100,000 at most: a mistyped number of ranks must not be counted through.
    sizes = [str(n) for n in range(1, max(64, 2 * world_size) + 1)[:100_000] if pieces % n == 0]
    return " or ".join(filter(None, [", ".join(sizes[:-1]), sizes[-1]]))


def _nearest_divisors(total: int, wanted: int) -> str:
    # 100,000 numbers each way: a mistyped batch of 10**15 rows must not be counted through.
    below = range(min(wanted - 1, total), 0, -1)[:100_000]
    above = range(wanted + 1, total + 1)[:100_000]
    nearest = [next((n for n in near if total % n == 0), None) for near in (below, above)]
    return " or ".join(str(n) for n in nearest if n is not None) or "1"

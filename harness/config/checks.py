"""What sections of a configuration cannot want at once; each problem is one `path: problem` line."""

from harness.catalogue.causal_lm.section import CausalLmTask
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.cnn.section import CnnModel
from harness.catalogue.gpt.section import GptModel
from harness.catalogue.mlp.section import MlpModel, PerceptronModel
from harness.catalogue.pretrained.section import PretrainedModel
from harness.catalogue.regression.section import RegressionTask
from harness.catalogue.table.section import ShardedTableData, TableData
from harness.catalogue.text.section import PretrainedTokenizer, TextData
from harness.catalogue.text_table.section import TextTableData
from harness.config.fields import Mode
from harness.config.kinds import HIGHER_IS_BETTER, Data, Model, Task
from harness.config.run_config import RunConfig
from harness.config.training import AdafactorOptim, DecaySchedule, MuonOptim, PlateauSchedule, Schedule, WsdSchedule


def contradictions(config: RunConfig) -> list[str]:
    """Return what no two sections can want at once, one `path: problem` a line."""
    problems = []
    for path, (metric, mode) in judging_metrics(config).items():
        wanted, way = ("max", "higher") if metric in HIGHER_IS_BETTER else ("min", "lower")
        if metric not in config.task.metrics:
            problems.append(f"{path}.metric: {_why_there_is_none(metric, config.task)}")
        elif mode != wanted:
            problems.append(f"{path}.mode: {metric} is better the {way} it is; use {path}.mode={wanted}")
    if config.data.sampling == "balanced" and not isinstance(config.task, ClassificationTask):
        problems.append("data.sampling: balanced wants labels; use data.sampling=uniform, or task.kind=classification")
    if isinstance(config.data, TableData) and not config.data.in_memory and config.strategy.precision == "fp64":
        problems.append("data.in_memory: false keeps columns in fp32, strategy.precision is fp64; use fp32")
    if isinstance(config.model, CnnModel) and isinstance(config.data, TableData):
        problems.append(f"model.kind: cnn wants images, data.source is {config.data.source}; use model.kind=mlp")
    problems += _language_problems(config)
    if isinstance(config.task, RegressionTask) and not isinstance(config.data, TableData | TextData):
        problems.append(f"task.kind: {config.data.source} has labels; use task.kind=classification")
    problems += _text_problems(config)
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
    if isinstance(config.optim, MuonOptim) and isinstance(config.model, PretrainedModel):
        problems.append("optim.kind: muon is for networks that start from nothing; use optim.kind=adamw")
    if isinstance(config.task, ClassificationTask):
        problems += _imbalance_problems(config.task, config.data)
    problems += _output_problems(config)
    total_updates = config.run.max_steps or _total_steps(config.schedule)
    if total_updates is not None:  # without either it is known with the data
        problems += phase_problems(config.schedule, total_updates=total_updates)
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


def _imbalance_problems(task: ClassificationTask, data: Data) -> list[str]:
    if task.class_weights is not None and data.sampling == "balanced":
        return ["task.class_weights: rare classes count more already by data.sampling: balanced; leave one of them out"]
    if task.class_weights == "balanced" and isinstance(data, ShardedTableData):
        return [f"task.class_weights: the labels of {data.source} are not counted beforehand; list the weights"]
    return []


def _why_there_is_none(metric: str, task: Task) -> str:
    if isinstance(task, ClassificationTask) and metric in task.metrics_of_one_class:
        wanted = "; or use val/macro_f1, which is of all" if metric == "val/f1" else ""
        return f"{metric} is a score of one class of {task.num_classes}; say which with task.positive_class{wanted}"
    return f"{task.kind} has no {metric!r}; it has {', '.join(task.metrics)}"


def _output_problems(config: RunConfig) -> list[str]:
    """Return what is wrong with the last thing that a network does to its numbers."""
    model, task = config.model, config.task
    path, function, plain = "", "", ""
    if isinstance(model, PerceptronModel):
        path, function, plain = "model.activation", model.activation, "none"
    elif isinstance(model, MlpModel):
        path, function, plain = "model.output", model.output, "linear"
    if function == plain:
        return []
    if isinstance(task, ClassificationTask):
        reason = "softmax is part of the loss of classification already, which wants what goes into it"
        if function != "softmax":
            reason = f"the loss of classification takes the softmax of any numbers, and {function} keeps some from it"
        return [f"{path}: {reason}; use {path}={plain}"]
    if function == "softmax" and isinstance(config.data, TableData) and len(config.data.targets) == 1:
        return [
            f"{path}: the softmax of one number is always 1, and data.targets names one; use {path}={plain}, or the "
            "targets that are shares of a whole"
        ]
    return []


def _language_problems(config: RunConfig) -> list[str]:
    """Running text, the task causal_lm and a model of sequences go together or not at all."""
    model, data = config.model, config.data
    if isinstance(model, PretrainedModel) and isinstance(data, TextData) and isinstance(config.task, CausalLmTask):
        return _pretrained_language_problems(model, data)
    parts = {
        "data.source": (config.data.source, isinstance(config.data, TextData), "text"),
        "task.kind": (config.task.kind, isinstance(config.task, CausalLmTask), "causal_lm"),
        "model.kind": (config.model.kind, _predicts_tokens(config.model), "gpt"),
    }
    if len({is_language for _, is_language, _ in parts.values()}) == 1:
        return []
    present = " and ".join(f"{path}={found}" for path, (found, is_language, _) in parts.items() if is_language)
    return [
        f"{path}: {found} does not go with {present}; use {path}={wanted}"
        for path, (found, is_language, wanted) in parts.items()
        if not is_language
    ]


def _pretrained_language_problems(model: PretrainedModel, data: TextData) -> list[str]:
    problems = []
    if model.head != "causal_lm":
        problems.append(f"model.head: {model.head} does not fit task.kind causal_lm; use model.head=causal_lm")
    if not isinstance(data.tokenizer, PretrainedTokenizer):
        problems.append(
            f"data.tokenizer.kind: a pretrained model knows its own tokens, not those of {data.tokenizer.kind}; leave "
            "data.tokenizer out"
        )
    return problems


def _predicts_tokens(model: Model) -> bool:
    return isinstance(model, GptModel) or (isinstance(model, PretrainedModel) and model.head == "causal_lm")


def _text_problems(config: RunConfig) -> list[str]:
    """Return where texts, tokens and the task do not meet."""
    model, data, task = config.model, config.data, config.task
    problems = []
    is_of_a_model = isinstance(data, TextData) and isinstance(data.tokenizer, PretrainedTokenizer)
    if is_of_a_model and not isinstance(model, PretrainedModel):
        problems.append(f"data.tokenizer.kind: pretrained goes with model.kind=pretrained, not {model.kind}; use bpe")
    if isinstance(data, TextTableData) and not isinstance(task, ClassificationTask):
        problems.append("task.kind: text_table has labels; use task.kind=classification")
    if isinstance(data, TextTableData) and not isinstance(model, PretrainedModel):
        problems.append(
            f"model.kind: {model.kind} wants numbers, data.source is text_table; use model.kind=pretrained "
            "model.path=DIRECTORY"
        )
    if isinstance(model, PretrainedModel) and isinstance(task, ClassificationTask):
        if not isinstance(data, TextTableData):
            problems.append(f"data.source: a pretrained model wants tokens, not {data.source}; use text_table")
        if model.head != "sequence_classification":
            problems.append(f"model.head: {model.head} does not fit task.kind classification; leave it out")
    return problems


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

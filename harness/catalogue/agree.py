"""Which kinds of the catalogue go together; of a part of a user's file nothing is claimed. Needs no torch."""

from __future__ import annotations

from harness.catalogue.causal_lm.section import CausalLmTask
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.gpt.section import GptModel
from harness.catalogue.pretrained.section import PretrainedModel
from harness.catalogue.table.section import TableData
from harness.catalogue.text.section import PretrainedTokenizer, TextData
from harness.config.run_config import RunConfig
from harness.config.slots import ModelSection


def language_problems(config: RunConfig) -> list[str]:
    """Running text, the task causal_lm and a model of sequences go together or not at all."""
    model, data = config.model, config.data
    if isinstance(model, PretrainedModel) and isinstance(data, TextData) and isinstance(config.task, CausalLmTask):
        return _pretrained_language_problems(model, data)
    parts = {
        "data.source": (data, data.source, isinstance(data, TextData), "text"),
        "task.kind": (config.task, config.task.kind, isinstance(config.task, CausalLmTask), "causal_lm"),
        "model.kind": (model, model.kind, _predicts_tokens(model), "gpt"),
    }
    ours = {path: rest for path, (section, *rest) in parts.items() if section.is_ours}
    if len({is_language for _, is_language, _ in ours.values()}) == 1:
        return []
    present = " and ".join(f"{path}={found}" for path, (found, is_language, _) in ours.items() if is_language)
    return [
        f"{path}: {found} does not go with {present}; use {path}={wanted}"
        for path, (found, is_language, wanted) in ours.items()
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


def _predicts_tokens(model: ModelSection) -> bool:
    return isinstance(model, GptModel) or (isinstance(model, PretrainedModel) and model.head == "causal_lm")


def output_problems(config: RunConfig, *, path: str, function: str, plain: str) -> list[str]:
    """Return what is wrong with the last thing that a network does to its numbers.

    Args:
        path: of the key that names it.
        plain: the value that leaves them as they are.
    """
    data, task = config.data, config.task
    if function == plain:
        return []
    if isinstance(task, ClassificationTask):
        reason = "softmax is part of the loss of classification already, which wants what goes into it"
        if function != "softmax":
            reason = f"the loss of classification takes the softmax of any numbers, and {function} keeps some from it"
        return [f"{path}: {reason}; use {path}={plain}"]
    if task.is_ours and function == "softmax" and isinstance(data, TableData) and len(data.targets) == 1:
        return [
            f"{path}: the softmax of one number is always 1, and data.targets names one; use {path}={plain}, or the "
            "targets that are shares of a whole"
        ]
    return []


def image_problems(config: RunConfig) -> list[str]:
    """A network of images wants some."""
    if isinstance(config.data, TableData):
        return [f"model.kind: cnn wants images, data.source is {config.data.source}; use model.kind=mlp"]
    return []


def number_problems(config: RunConfig) -> list[str]:
    """Regression wants numbers, which tables have."""
    if config.data.is_ours and not isinstance(config.data, TableData | TextData):
        return [f"task.kind: {config.data.source} has labels; use task.kind=classification"]
    return []

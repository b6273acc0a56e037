"""Where texts, tokens and the task of the catalogue do not meet; needs no torch."""

from __future__ import annotations

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.pretrained.section import PretrainedModel
from harness.catalogue.text.section import PretrainedTokenizer, TextData
from harness.catalogue.text_table.section import TextTableData
from harness.config.run_config import RunConfig


def tokenizer_problems(config: RunConfig, data: TextData) -> list[str]:
    """The tokens of a pretrained model are for it alone."""
    model = config.model
    if isinstance(data.tokenizer, PretrainedTokenizer) and model.is_ours and not isinstance(model, PretrainedModel):
        return [f"data.tokenizer.kind: pretrained goes with model.kind=pretrained, not {model.kind}; use bpe"]
    return []


def text_table_problems(config: RunConfig) -> list[str]:
    """A table of texts wants classes and a network of tokens."""
    model, task = config.model, config.task
    problems = []
    if task.is_ours and not isinstance(task, ClassificationTask):
        problems.append("task.kind: text_table has labels; use task.kind=classification")
    if model.is_ours and not isinstance(model, PretrainedModel):
        problems.append(
            f"model.kind: {model.kind} wants numbers, data.source is text_table; use model.kind=pretrained "
            "model.path=DIRECTORY"
        )
    return problems


def pretrained_text_problems(config: RunConfig) -> list[str]:
    """A pretrained network of classes wants tokens, and its head."""
    model, data = config.model, config.data
    problems: list[str] = []
    if not (isinstance(model, PretrainedModel) and isinstance(config.task, ClassificationTask)):
        return problems
    if data.is_ours and not isinstance(data, TextTableData):
        problems.append(f"data.source: a pretrained model wants tokens, not {data.source}; use text_table")
    if model.head != "sequence_classification":
        problems.append(f"model.head: {model.head} does not fit task.kind classification; leave it out")
    return problems

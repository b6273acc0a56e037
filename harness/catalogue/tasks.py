"""From `task.kind` to a task."""

import torch

from harness.catalogue.causal_lm.section import CausalLmTask
from harness.catalogue.causal_lm.task import CausalLm
from harness.catalogue.classification.classes import constant_targets, scored_class
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.classification.task import Classification, class_weights
from harness.catalogue.regression.section import RegressionTask
from harness.catalogue.regression.task import Regression
from harness.config.kinds import Task
from harness.rows.splits import DataSplits
from harness.tasks.base import TaskLoss


def build_task(config: Task, splits: DataSplits, *, device: torch.device, dtype: torch.dtype) -> TaskLoss:
    """Return the task of `config` for the rows of `splits`.

    Args:
        device: where the network's outputs are.
        dtype: of these outputs.
    Raises:
        DataError: class weights cannot be told from the rows.
    """
    match config:
        case ClassificationTask():
            weights = class_weights(config.class_weights, splits.train, num_classes=config.num_classes)
            weights = None if weights is None else weights.to(device=device, dtype=dtype)
            classes = splits.preprocessing.get("classes")
            scored = scored_class(config, classes)
            return Classification(config, class_weights=weights, classes=classes, scored_class=scored)
        case RegressionTask():
            return Regression(splits.num_outputs, constant=constant_targets(splits.validation))
        case CausalLmTask():
            assert splits.tokenizer, "causal_lm without text is refused by config/checks.py"
            token_bytes = torch.from_numpy(splits.tokenizer.token_bytes())
            return CausalLm(splits.input_shape[0], token_bytes, decode=splits.tokenizer.decode)

"""From `task.kind` to a task."""

import torch

from harness.config.tasks import CausalLmTask, ClassificationTask, RegressionTask, Task
from harness.data.sources import DataSplits
from harness.tasks.base import TaskLoss
from harness.tasks.language import CausalLm
from harness.tasks.supervised import Classification, Regression


def build_task(config: Task, splits: DataSplits) -> TaskLoss:
    """Return the task of `config` for the rows of `splits`."""
    match config:
        case ClassificationTask():
            return Classification(config.num_classes)
        case RegressionTask():
            return Regression(splits.num_outputs)
        case CausalLmTask():
            assert splits.tokenizer, "causal_lm without text is refused by config/checks.py"
            return CausalLm(splits.input_shape[0], torch.from_numpy(splits.tokenizer.token_bytes()))

"""From `task.kind` to a task."""

from harness.config.tasks import ClassificationTask, RegressionTask, Task
from harness.data.sources import DataSplits
from harness.tasks.base import TaskLoss
from harness.tasks.supervised import Classification, Regression


def build_task(config: Task, splits: DataSplits) -> TaskLoss:
    """Return the task of `config` for the rows of `splits`."""
    match config:
        case ClassificationTask():
            return Classification(config.num_classes)
        case RegressionTask():
            return Regression(splits.num_outputs)

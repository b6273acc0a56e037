"""The section of regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from harness.config.slots import TaskSection
from harness.parts import task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits
    from harness.tasks.base import TaskLoss


@task("regression")
class RegressionTask(TaskSection):
    """One or more numbers a row; squared error."""

    higher_is_better: ClassVar[tuple[str, ...]] = ("val/r2",)
    kind: Literal["regression"]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The numbers of an evaluation."""
        return ("val/loss", "val/mse", "val/mae", "val/r2")

    def build(self, splits: DataSplits, *, device: torch.device, dtype: torch.dtype) -> TaskLoss:
        from harness.catalogue.classification.classes import constant_targets
        from harness.catalogue.regression.task import Regression

        return Regression(splits.num_outputs, constant=constant_targets(splits.validation))

    def num_outputs(self, targets: Tensor | None) -> int:
        return targets.shape[1] if targets is not None and targets.dim() == 2 else 0

    def check_judges(self, config: RunConfig, splits: DataSplits) -> None:
        from harness.catalogue.classification.classes import check_variance

        check_variance(config, splits.validation)

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems, number_problems

        return [*language_problems(config), *number_problems(config)]

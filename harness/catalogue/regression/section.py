"""The section of regression."""

from __future__ import annotations

from typing import ClassVar, Literal

from harness.config.fields import Section


class RegressionTask(Section):
    """One or more numbers a row; squared error."""

    metrics: ClassVar = ("val/loss", "val/mse", "val/mae", "val/r2")
    kind: Literal["regression"]

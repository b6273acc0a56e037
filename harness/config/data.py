"""The sections that describe the rows: one `source:` each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.config.fields import Float, PositiveInt, Section


class DataSection(Section):
    """What every source has: how much of it validates, and how many rows one update sees over all ranks."""

    global_batch: PositiveInt
    validation_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    stratify: bool = True
    """Where rows have labels, each class has the same share of the rows that are set aside for validation."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """balanced takes as many rows of each class in an epoch: a sample of a large one, those of a small one again."""

"""Sections of the catalogue as tests call them: a network, rows, a task or a look, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from harness.config.data import DataSection
from harness.config.run_config import RunConfig
from harness.config.slots import KnownRows, ModelSection, TaskSection
from harness.parts import registered
from harness.rows.splits import DataSplits


def build_model(config: ModelSection, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the network of a section for rows of `input_shape`."""
    return config.build({"input_shape": input_shape, "num_outputs": num_outputs})


def prepare(data: DataSection, task: TaskSection, *, seed: int) -> None:
    """Do what one rank does before all open the rows."""
    data.prepare(task, seed=seed)


def load(data: DataSection, task: TaskSection, *, seed: int) -> DataSplits:
    """Return the rows of a section."""
    return data.open(task, seed=seed)


def look(data: DataSection, task: TaskSection) -> Iterator[str]:
    """Yield what a first look tells."""
    return data.look(task)


def build_task(config: TaskSection, splits: DataSplits, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the task of a section for some rows."""
    return config.build(splits, device=device, dtype=dtype)


def known_rows(config: RunConfig) -> KnownRows | None:
    """Return what is known of the rows of a configuration."""
    return config.data.known_rows(config.task)


def parsed(slot: str, values: dict[str, Any]) -> Any:
    """Return the section of a slot that plain data describe."""
    return registered().validated(slot, values)

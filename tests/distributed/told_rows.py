"""The rows and the task of an example, and beside its loss what each row has drawn: columns of the ledger.

Of each generator a row tells a whole number, so that sums of them are exact in fp64 in whatever order they are added.
"""

from __future__ import annotations

import importlib
import random
from typing import Any, Literal

import numpy as np
import torch
from told_columns import COLUMNS  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch.utils.data import Dataset

import harness


def whole_numbers() -> list[int]:
    return [random.getrandbits(16), int(np.random.randint(2**16)), int(torch.randint(2**16, ()))]


def states() -> list[Any]:
    of_numpy = np.random.get_state(legacy=False)
    return [random.getstate(), (of_numpy["state"]["pos"], of_numpy["has_gauss"]), torch.get_rng_state().tolist()]


@harness.data("told_rows")
class Told(Dataset[Any]):
    """Rows of an example that tell what was drawn for them.

    Args:
        of: module and class of the example's Dataset.
        noisy: what is moved at random, by all three generators; nothing where the example itself draws.
    """

    def __init__(
        self, split: Literal["train", "validation"], of: str = "ragged.Walks", num_rows: int = 44, noisy: str = ""
    ) -> None:
        module, name = of.split(".")
        self.rows = getattr(importlib.import_module(module), name)(split, num_rows)
        self.facts, self.noisy = getattr(self.rows, "facts", {}), noisy
        if hasattr(self.rows, "lengths"):
            self.lengths = self.rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        before = states()
        row = self.rows[i]
        if self.noisy:
            noise = random.gauss(0, 1) + np.random.randn() + float(torch.randn(()))
            row[self.noisy] = row[self.noisy] + 0.1 * noise
        drew = sum(one != other for one, other in zip(before, states(), strict=True))
        drawn = whole_numbers()
        told = [i, i * i, drew, *drawn, i * drawn[2]]
        return {**row, "told": torch.tensor(told, dtype=torch.float64)}


@harness.task("told_task")
class ToldTask:
    """The task of an example, whose loss has a term for each of COLUMNS.

    Args:
        of: module and class of the example's task.
    """

    def __init__(self, of: str = "ragged.Tag") -> None:
        module, name = of.split(".")
        self.task = getattr(importlib.import_module(module), name)()

    def forward(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.task.forward(network, batch)
        return found

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = self.task.loss(outputs, batch)
        first = self.weights(batch).flatten(1).argmax(dim=1)  # a place of each row that counts

        def at_first(column: Tensor) -> Tensor:
            places = torch.zeros_like(loss).flatten(1)
            places[torch.arange(len(first)), first] = column
            return places.view_as(loss)

        return {"loss": loss} | {name: at_first(batch["told"][:, c]) for c, name in enumerate(COLUMNS)}

    def weights(self, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.task.weights(batch)
        return found

    def metrics(self) -> Any:
        return self.task.metrics()

    def scored(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return self.task.scored(outputs, batch)

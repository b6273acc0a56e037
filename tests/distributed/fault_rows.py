"""Rows that break in one place, hold files open, or draw where the run does not look; and what trains on them."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import harness

NUM_ROWS, AT, MARKER, FAULT, CHANGE, SAID = 200, 0, "", "", 0.0, ""
"""A test writes others into its copy of this file: how many rows there are; which of them is another than the others;
a file that a worker writes before it kills itself at that row, so that it does so once; what is the matter; what is
added to the row; what the digest is."""


def noise() -> float:
    return random.gauss(0, 1) + float(np.random.randn()) + float(torch.randn(()))


@harness.data("fault_rows")
class Rows(Dataset[Any]):
    """Four numbers and their sum, moved at random in training by all three generators."""

    def __init__(self, split: Literal["train", "validation"]) -> None:
        self.is_training = split == "train"
        self.fault = FAULT.removeprefix("validation: ") if self.is_training != FAULT.startswith("validation: ") else ""
        self.own = np.random.default_rng()  # follows no seed
        if SAID:
            self.digest = lambda: SAID

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        is_it = i == AT
        if is_it and get_worker_info() is not None:
            if self.fault == "kills itself" and not Path(MARKER).exists():
                Path(MARKER).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "stops the run":
                os.kill(os.getppid(), signal.SIGTERM)
            if self.fault == "raises":
                raise KeyError("pixels")
        x = torch.from_numpy(np.random.default_rng([i, self.is_training]).normal(size=4)).float()
        y = x.sum()
        if self.is_training:
            x = x + 0.1 * noise() + CHANGE * is_it
        if self.fault == "own generator":
            x = x + float(self.own.normal())
        if self.fault == "seeded generator":
            x = x + float(np.random.default_rng(torch.initial_seed() % 2**64).normal())
        if self.fault == "of its process":
            x = x + is_it * os.getpid()
        if self.fault == "of its rank":
            x = x + is_it * int(os.environ.get("RANK", "0"))
        if self.fault == "on meta":
            x = x.to("meta")
        return {"x": x, "y": y}


@harness.data("fault_stored")
class Stored(Dataset[Any]):
    """Rows of a file that is kept open.

    Args:
        path: of an HDF5 file or an sqlite database with numbers x.
        lazily: open it with the first row.
    """

    def __init__(self, path: str, lazily: bool = False) -> None:
        self.path, self.file = path, None
        if not lazily:
            self.open()

    def open(self) -> None:
        self.opened_by = os.getpid()
        if self.path.endswith(".h5"):
            import h5py

            self.file = h5py.File(self.path, "r")
        else:
            self.file = sqlite3.connect(self.path)

    def __len__(self) -> int:
        return 120

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if self.file is None:
            self.open()
        if self.opened_by != os.getpid():
            raise OSError("another process has opened the file, and moves in it")
        if self.path.endswith(".h5"):
            number = float(self.file["x"][i])
        else:
            ((number,),) = self.file.execute("select x from numbers where i = ?", (i,)).fetchall()
        x = torch.full((4,), number) + 0.1 * noise()
        return {"x": x, "y": x.sum()}


@harness.data("fault_stream")
class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield {"x": torch.zeros(4), "y": torch.zeros(())}


@harness.data("fault_streamed")
def streamed(path: str) -> Any:
    import datasets

    return datasets.load_dataset("csv", data_files=path, split="train", streaming=True)


@harness.model("fault_line")
class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)[:, 0]
        return found


@harness.task("fault_fit")
class Fit:
    def forward(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = network(batch["x"])
        return found

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (outputs - batch["y"]) ** 2

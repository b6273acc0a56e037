"""What is asked of every training system alike: train a small network, save it, come back.

A system is driven as its own documentation shows, with the calls and defaults that a user gets; where it leaves a
choice, it has the safer one: a directory for each save, and the newest that looks whole is resumed from.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.checkpoint import rng
from harness.checkpoint.tensors import tensor_digest

SYSTEMS = {
    "harness": "tests.faults.peer_harness:Harness",
    "torch.save": "tests.faults.peer_torch:TorchSave",
    "DCP": "tests.faults.peer_dcp:DistributedCheckpoint",
    "DeepSpeed ZeRO-1": "tests.faults.peer_deepspeed:DeepSpeed",
    "Accelerate": "tests.faults.peer_accelerate:AccelerateState",
}
WORLD_SIZE = 2
ROWS = 12
"""A global batch; 1, 2 and 3 ranks divide it."""
STEPS = (10, 20)
DIES_AT_BYTE = 8192
"""Every file of tensors or random states that a rank writes is longer than this, every other one shorter."""
COLLECTIVES_TIME_OUT = timedelta(seconds=10)

Digests = dict[str, str]


def network() -> nn.Module:
    """Return 18,049 parameters in fp32, 72 kB, always with the same weights; its dropout moves the random state."""
    torch.manual_seed(0)
    hidden = (nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    return nn.Sequential(*hidden, nn.Dropout(0.1), nn.Linear(128, 1))


class System(ABC):
    """One training system on this rank."""

    @abstractmethod
    def __init__(self, directory: Path, *, keep_one: bool) -> None:
        """Build the network and its optimizer.

        Args:
            keep_one: older checkpoints make room for the newest, in the system's own way.
        """

    @abstractmethod
    def train(self, positions: range) -> None: ...

    @abstractmethod
    def save(self, step: int) -> str:
        """Save, and wait until that is done; return what the training is told of a failure that does not stop it."""

    @abstractmethod
    def load(self, step: int | None = None) -> int | None:
        """Resume from the newest checkpoint, or the one asked for; return its step, None if none is there."""

    @abstractmethod
    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights and moments by name, `model/...` and `optim/...`, and what this rank has of its own.

        That is its random state, `random/...`, where the system saves it, and its `partition/...` of the optimizer.
        """

    @staticmethod
    @abstractmethod
    def folder(directory: Path, step: int) -> Path:
        """Return where the checkpoint of a step is when several are kept."""


class PlainTraining(System):
    """DDP and AdamW by hand, for systems that only save."""

    def __init__(self, directory: Path, *, keep_one: bool) -> None:
        self.directory, self.keep_one = directory, keep_one
        dist.init_process_group("gloo", timeout=COLLECTIVES_TIME_OUT)
        self.module = network()
        self.model: nn.Module = DistributedDataParallel(self.module)
        self.optimizer: Any = torch.optim.AdamW(self.module.parameters(), lr=1e-3)

    def train(self, positions: range) -> None:
        for position in positions:
            self.optimizer.zero_grad()
            self.backward(self.loss(position))
            self.optimizer.step()

    def loss(self, position: int) -> Tensor:
        """Return the loss of this rank's rows of a batch."""
        generator = torch.Generator().manual_seed(position)
        inputs, targets = torch.randn(ROWS, 10, generator=generator), torch.randn(ROWS, 1, generator=generator)
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        return nn.functional.mse_loss(self.model(inputs[mine]), targets[mine])

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def save(self, step: int) -> str:
        self.write(step)
        return ""

    @abstractmethod
    def write(self, step: int) -> None:
        """Save."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield f"model/{name}", parameter.detach()
            for moment, tensor in self.optimizer.state[parameter].items():
                yield f"optim/{name}/{moment}", tensor

    @staticmethod
    def folder(directory: Path, step: int) -> Path:
        return directory / f"step-{step}"

    def target(self, step: int) -> Path:
        """Return where a step is saved."""
        return self.directory / "last" if self.keep_one else self.folder(self.directory, step)

    def newest(self, mark: str) -> int | None:
        """Return the step of the newest folder with a file of this name; 0 where all have one name."""
        if self.keep_one:
            return 0 if (self.directory / "last" / mark).exists() else None
        return max(
            (int(path.parent.name.removeprefix("step-")) for path in self.directory.glob(f"*/{mark}")), default=None
        )


# ---------------------------------------------------------------- what is done with them, on each rank


@dataclass
class Saved:
    """What a rank had when it saved."""

    digests: dict[int, Digests] = field(default_factory=dict)
    problem: str = ""
    """Of the last save; how the training heard of it."""


@dataclass
class Resumed:
    """What a rank has after resuming."""

    step: int | None = None
    digests: Digests = field(default_factory=dict)
    problem: str = ""


def build(system: str, directory: str, *, keep_one: bool) -> System:
    """Start a system on this rank, which says nothing from here on."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    rng.seed_everything(int(os.environ["RANK"]))
    return system_class(system)(Path(directory), keep_one=keep_one)


def system_class(name: str) -> type[System]:
    """Return what drives a system; its library is imported with it."""
    module, _, attribute = SYSTEMS[name].partition(":")
    found: type[System] = getattr(importlib.import_module(module), attribute)
    return found


def digests_of(system: System) -> Digests:
    return {key: tensor_digest(tensor) for key, tensor in system.state()}


def train_and_save(system: str, directory: str, keep_one: bool = False, dies_on: int | None = None) -> Saved:
    """Save two steps; on one rank the system's second save ends in the middle of a file.

    There the kernel ends the process as soon as a file would grow beyond DIES_AT_BYTE, whoever writes it: like SIGKILL,
    that leaves no code of the process a chance, and other than SIGKILL it comes at the same byte every time.
    """
    running, saved = build(system, directory, keep_one=keep_one), Saved()
    for step in STEPS:
        running.train(range(step - 10, step))
        if step == STEPS[-1] and dies_on == int(os.environ["RANK"]):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (DIES_AT_BYTE, DIES_AT_BYTE))
        saved.digests[step] = digests_of(running)
        try:
            told = running.save(step)
        except BaseException as error:  # that of DCP is no Exception
            saved.problem = f"raises {said(error)}"
            return saved
        if told:
            running.train(range(step, step + 5))
            saved.problem = f"training goes on: {told}"
    return saved


def resume(system: str, directory: str, keep_one: bool = False, step: int | None = None) -> Resumed:
    """Come back from what is there."""
    resumed = Resumed()
    try:
        running = build(system, directory, keep_one=keep_one)
        resumed.step = running.load(step)
        if resumed.step is not None:
            resumed.digests = digests_of(running)
    except BaseException as error:
        resumed.problem = said(error)
    return resumed


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

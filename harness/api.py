"""What a script or a notebook calls: `harness.load("runs/mnist")` is the trained network of a run, or an export."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.catalogue.pretrained.section import PretrainedModel
from harness.config.problems import nearest_name
from harness.config.run_config import RunConfig
from harness.config.slots import ModelSection
from harness.config.use import load_used
from harness.errors import CheckpointError, ConfigError, HarnessError
from harness.export import find_checkpoint, read_checkpoint, unless_deleted
from harness.exported import Saved, is_export, read_export, warn_of_other_code
from harness.record.checkpoints import CheckpointDirectory
from harness.record.files import storage_errors
from harness.strategy.base import model_tensors

if TYPE_CHECKING:
    from harness.catalogue.text.tokenizers import TextTokenizer

WANTED = "give a run directory such as runs/mnist-cnn, or a folder that harness export wrote"
HOW = "step=STEP"
AGAIN = "Call harness.load again"


@dataclass(frozen=True, eq=False, repr=False)
class Loaded:
    """A trained network, and what is needed to use it."""

    network: nn.Module
    """On the CPU, in evaluation mode; call it under `torch.no_grad()`."""
    preprocessing: dict[str, Any]
    """Plain data: of a table what made inputs of each column ("features"), and the names of the "classes"."""
    tokenizer: TextTokenizer | None
    """Of running text: `encode`, `decode`, `end`."""
    facts: dict[str, Any]
    """What the data said of themselves: `input_shape` of a row, `num_outputs`, and the names of docs/parts.md."""
    section: ModelSection
    """What the network was built from."""
    config: RunConfig | None
    """All of the run's configuration; None of an export, which knows of the network alone."""
    step: int
    metrics: dict[str, Any]
    """Its scores on the rows that validated; empty where it was saved without an evaluation."""
    path: Path
    """Of the checkpoint, or of the export."""

    def inputs(self, rows: Any) -> Tensor:
        """Return the (N, F) inputs of rows of a table, made as the run made them.

        A category that no training row had is a warning, since all of its columns are 0.

        Args:
            rows: a pandas DataFrame, or a list of N mappings of column names to values; other columns may be there.
        Raises:
            DataError: a column is missing, or a value is none that the run would have taken.
            ConfigError: the network was not trained on a table.
        """
        from harness.catalogue.table.raw import inputs_of

        features = self.preprocessing.get("features")
        if not features:
            raise ConfigError(
                f"{self.path} was not trained on a table of columns; give its network what its rows were, as "
                f"{list(self.facts['input_shape'])} each"
            )
        matrix, notices = inputs_of(rows, features)
        for notice in notices:
            warnings.warn(notice, stacklevel=2)
        floats = (tensor.dtype for _, tensor in model_tensors(self.network) if tensor.is_floating_point())
        return torch.from_numpy(matrix).to(next(floats, torch.float32))

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.network.parameters())
        numbers = {name: value for name, value in self.metrics.items() if isinstance(value, int | float)}
        scores = "".join(f", {name} {value:.4g}" for name, value in numbers.items())
        return f"<{self.section.kind} of {self.path}, step {self.step:,}, {count:,} parameters{scores}>"


def load(
    path: str | os.PathLike[str],
    use: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    step: str | int = "best",
) -> Loaded:
    """Return the trained network of a run directory, or of what `harness export` wrote.

    It has the averaged weights where the run has `ema`. Nothing is printed, and the random states of the process stay.

    Args:
        path: such as "runs/mnist-cnn". It brings no code.
        use: file or files that register the network's kind, where that is yours and not defined in this process. A
            warning names those that are not what the run was trained with.
        step: of a run "best", "latest" or the number of a checkpoint.
    Raises:
        ConfigError: there is no run and no export, or nobody knows the network's kind.
        CheckpointError: there is no such checkpoint, it is broken, or it is of another network.
        StorageError: it cannot be read.
    """
    directory = Path(path)
    with storage_errors("read", directory, advice=""):
        checkpoint = _checkpoint(directory, step)
        used = load_used(_files(use), folder=Path.cwd(), is_typed=True)
        with unless_deleted(checkpoint, again=AGAIN) if checkpoint else nullcontext():
            saved = read_checkpoint(directory, checkpoint, how=HOW) if checkpoint else read_export(directory)
            section = saved.section(advice=partial(_advice, directory, step))
            network = saved.network(section)
        tokenizer = _tokenizer(saved, section)
    warn_of_other_code(saved, used, stacklevel=2)
    return Loaded(
        network=network,
        preprocessing=saved.described["preprocessing"],
        tokenizer=tokenizer,
        facts=saved.facts,
        section=section,
        config=saved.config,
        step=saved.described["step"],
        metrics=saved.described["metrics"],
        path=saved.path,
    )


def _files(use: Any) -> list[str]:
    given = [use] if isinstance(use, str | os.PathLike) else list(use or ())
    return [os.fspath(file) for file in given]


def _checkpoint(directory: Path, step: str | int) -> Path | None:
    """Return the checkpoint of a run that is asked for; None of an export.

    Raises:
        ConfigError: it is neither.
        CheckpointError: there is no such checkpoint.
    """
    if not directory.is_dir():
        siblings = directory.parent.iterdir() if directory.parent.is_dir() else ()
        nearest = nearest_name(directory.name, [sibling.name for sibling in siblings])
        hint = f" (nearest: {directory.with_name(nearest)})" if nearest and not directory.exists() else ""
        what = "is a file" if directory.exists() else f"is no folder, seen from {Path.cwd()}"
        raise ConfigError(f"{directory} {what}{hint}; {WANTED}")
    checkpoints = CheckpointDirectory(directory / "checkpoints")
    if checkpoints.path.is_dir() and checkpoints.steps():
        return find_checkpoint(directory, str(step), how=HOW)
    if checkpoints.path.is_dir() or (directory / "run.json").exists():
        raise CheckpointError(
            f"{directory} has no checkpoint yet: its run saves one every checkpoint.every_steps, and at its end; call "
            "harness.load again then"
        )
    if is_export(directory):
        if step != "best":
            raise ConfigError(f"step: {step!r}, but {directory} is an export, which has one step; leave it out")
        return None
    if directory.absolute().parent.name == "checkpoints" and (number := directory.name.rpartition("-")[2]).isdecimal():
        run = directory.absolute().parents[1]
        raise ConfigError(f"{directory} is a checkpoint; write harness.load({str(run)!r}, step={int(number)})")
    raise ConfigError(f"{directory} is neither a run directory nor an export; {WANTED}")


def _advice(directory: Path, step: str | int, files: Sequence[str]) -> str:
    asked = "" if step == "best" else f", step={step!r}"
    return (
        "Define it in this process, or read that file and then write "
        f"harness.load({str(directory)!r}, use={list(files)}{asked})"
    )


def _tokenizer(saved: Saved, section: ModelSection) -> TextTokenizer | None:
    is_of_model = saved.tensors is None and isinstance(section, PretrainedModel) and section.head == "causal_lm"
    if saved.tokenizer is None and not is_of_model:
        return None
    from harness.catalogue.text.tokenizers import ModelTokens, tokenizer_from_json

    try:
        return tokenizer_from_json(saved.tokenizer) if saved.tokenizer else ModelTokens(saved.path)
    except HarnessError:
        raise
    except Exception as error:  # the library of tokenizers has no kind of its own
        raise CheckpointError(
            f"{saved.path}: its tokenizer cannot be read ({type(error).__name__}: {error})"
        ) from error

"""A saved network, of a checkpoint or of an export, that becomes a network again; and the files of an export."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from harness.checkpoint.tensors import TensorFiles
from harness.config.problems import problem_sentence, schema_of
from harness.config.run_config import RunConfig
from harness.config.slots import ModelSection
from harness.config.use import Used
from harness.errors import CheckpointError, ConfigError, HarnessError
from harness.own_code import told
from harness.parts import registered
from harness.record.files import storage_errors
from harness.record.manifest import read_json
from harness.record.progress import Count
from harness.strategy.base import model_tensors
from harness.strategy.untouched import same_random_numbers

MODEL, CONFIG, DESCRIPTION, TOKENIZER = "model.safetensors", "config.json", "harness.json", "tokenizer.json"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _UsedFile(_Part):
    file: str
    sha256: str


class _Described(_Part):
    """What is known of a saved network beside its tensors; anyone may have written it."""

    model: dict[str, Any]
    input_shape: list[Count]
    num_outputs: Count
    step: Count
    metrics: dict[str, Any]
    preprocessing: dict[str, Any]
    seed: int = 0
    named: list[str] = []
    """What `use` of the run said."""
    use: list[_UsedFile] = []
    """The files of that, and those that they import."""
    facts: dict[str, Any] = {}


@dataclass(frozen=True)
class Saved:
    """A network that was saved and is not built yet."""

    path: Path
    """Of the checkpoint, or of the export."""
    described: Mapping[str, Any]
    """Plain data, as an export has them: `model`, `input_shape`, `num_outputs`, `step`, `metrics`, ..."""
    tensors: Mapping[str, Tensor] | None
    """Each is read when it is asked for; None where the section reads them itself."""
    tokenizer: str | None
    """Of running text, as JSON."""
    config: RunConfig | None = None
    """Of its run; an export knows of the network alone."""

    def __post_init__(self) -> None:
        try:
            _Described.model_validate(self.described)
        except ValidationError as error:
            found = [problem_sentence(item, schema_of(_Described)) for item in error.errors(include_url=False)]
            raise ConfigError(f"{self.path}: {'; '.join(found[:3])}. This harness has not written that") from error

    @property
    def facts(self) -> dict[str, Any]:
        """What the network is built from."""
        sizes = {"input_shape": tuple(self.described["input_shape"]), "num_outputs": self.described["num_outputs"]}
        return {**self.described.get("facts", {}), **sizes}

    @property
    def files(self) -> list[str]:
        """The files that brought code, as they can be typed here: those that lie where they lay by their paths."""
        used = [file["file"] for file in self.described.get("use", [])]
        paths = {Path(file).name: file for file in used}
        names = self.described.get("named") or used[:1]
        found = [paths.get(Path(name).name, name) for name in names]
        return [file if Path(file).is_file() else Path(file).name for file in found]

    def section(self, *, advice: Callable[[Sequence[str]], str]) -> ModelSection:
        """Return the section of the network.

        Args:
            advice: what to do where its kind is not known here, by the files that have brought it.
        Raises:
            ConfigError: it is not, or not with these keys.
        """
        parts, values = registered(), self.described["model"]
        kind = values.get("kind")
        part = parts.of("model").get(kind) if isinstance(kind, str) else None
        if part is None:
            names = ", ".join(Path(file).name for file in self.files) or "code of its user"
            raise ConfigError(
                f"model.kind: {kind!r} is not built in; {names} has brought it. {advice(self.files or ['FILE'])}"
            )
        try:
            section: ModelSection = parts.validated("model", values)
        except ValidationError as error:
            schema = {"properties": {"model": parts.schemas["model"]}}
            items = ({**item, "loc": ("model", *item["loc"])} for item in error.errors(include_url=False))
            found = "; ".join(problem_sentence(item, schema) for item in items)
            raise ConfigError(f"{self.path}: {found}; {kind} is of {part.origin} here") from error
        return section.as_exported(self.path) if self.tensors is None else section

    def network(self, section: ModelSection) -> nn.Module:
        """Return the network with its tensors, on the CPU, in evaluation mode; it draws what it drew in its run.

        Raises:
            ConfigError: it cannot be built.
            CheckpointError: it has other tensors.
        """
        try:
            with same_random_numbers(), torch.device("cpu"):
                torch.default_generator.manual_seed(self.described.get("seed", 0))
                network = section.build(self.facts)
        except HarnessError:
            raise
        except Exception as error:  # of a user's code, or of ours for values that no run of ours has
            raise ConfigError(f"building the network of {self.path} raised {told(error)}") from error
        if self.tensors is not None:
            what = "files" if section.is_ours else "code"
            advice = f"Put the {what} back that the run was trained with"
            fill(network, self.tensors, of=f"{self.path} and what model.kind {section.kind!r} builds", advice=advice)
        is_double = any(tensor.dtype == torch.float64 for _, tensor in model_tensors(network))
        return (network.double() if is_double else network.float()).eval()  # also what is not saved, as in the run


def warn_of_other_code(saved: Saved, used: Used, *, stacklevel: int) -> None:
    """Warn where a file that brings code is none of those that the network was trained with.

    Args:
        stacklevel: as of `warnings.warn`, counted from here.
    """
    known = {file["sha256"] for file in saved.described.get("use", [])}
    names = [Path(file.file).name for file in used.files if file.sha256 not in known]
    if known and names:
        warnings.warn(
            f"the code of {', '.join(names)} is not what {saved.path} was trained with (its SHA-256 is another), so it "
            "may compute something else",
            stacklevel=stacklevel + 1,
        )


def is_export(directory: Path) -> bool:
    """Whether a folder looks like an export."""
    if (directory / DESCRIPTION).is_file():
        return True
    return (directory / CONFIG).is_file() and (directory / MODEL).is_file()


def read_export(directory: Path) -> Saved:
    """Return what an export holds.

    Raises:
        ConfigError: it is none, or damaged.
        CheckpointError: its tensors cannot be read.
    """
    name = DESCRIPTION if (directory / DESCRIPTION).is_file() else CONFIG
    with storage_errors("read", directory, advice=". Is it what harness export wrote?"):
        try:
            described = read_json(directory / name)
            text = (directory / TOKENIZER).read_text() if (directory / TOKENIZER).is_file() else None
        except ValueError as error:
            raise ConfigError(f"{directory}: {error}. Export the run again") from error
        if not isinstance(described, dict) or "model" not in described:
            raise ConfigError(f"{directory / name} is not what harness export writes; is it of transformers?")
        if name == DESCRIPTION:
            return Saved(directory, described, None, None)
        try:
            return Saved(directory, described, TensorFiles(directory, [MODEL]), text)
        except CheckpointError as error:
            raise CheckpointError(f"{directory / MODEL} is no file of tensors. Export the run again") from error


def fill(network: nn.Module, saved: Mapping[str, Tensor], *, of: str, advice: str) -> None:
    """Put copies of saved tensors into a network, which takes on their type.

    Copies, since a tensor of a file is a view of the file: it would change with it, or be gone.

    Args:
        of: what the tensors and the network come from, for the message: `... and ...`.
        advice: what to do where they are not of one network.
    Raises:
        CheckpointError: they are not this network's.
    """
    wanted = dict(model_tensors(network))
    others = sorted(wanted.keys() ^ saved.keys()) or [
        name for name, tensor in wanted.items() if tensor.shape != saved[name].shape
    ]
    if others:
        raise CheckpointError(
            f"{of} are of different networks: {len(others)} tensors are not the same, such as {others[0]}. {advice}"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.data = saved[name].clone()

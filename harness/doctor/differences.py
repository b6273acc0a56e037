"""How far apart runs are that were to be alike: to the bit, or to rounding.

`python -m harness.doctor.differences` is told pairs of run directories as JSON on its standard input, and answers each
with a line of JSON; `harness selftest` starts it, since it may not import torch.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.tensors import TensorFiles
from harness.observers.ledger import MEASURED, NAME, read_lines
from harness.record.manifest import KINDS, read_trainer


@dataclass(frozen=True)
class Tolerance:
    """What is rounding, after a few updates.

    The first steps of Adam have the size of the rate whatever the gradient, so an element whose gradient is nothing but
    rounding goes either way: losses and norms do not see it, weights do. Weights are therefore compared as a whole.
    """

    updates: float
    """Of losses, norms and all else in the line of an update: relative."""
    scores: float
    """Of an evaluation: relative, or absolute below 1, since a row may change sides."""
    weights: float
    """The distance between the two networks, as a share of the way that training has gone."""
    smallest: float
    """Of a way: a share of the length of the weights. What is less is rounding itself."""


TOLERANCES = {
    "fp64": Tolerance(1e-9, 1e-6, 1e-6, 1e-14),
    "fp32": Tolerance(1e-4, 1e-2, 2e-2, 1e-6),
    "tf32": Tolerance(5e-3, 5e-2, 1e-1, 1e-6),
    "bf16": Tolerance(2e-2, 1e-1, 3e-1, 1e-6),
    "fp16": Tolerance(2e-2, 1e-1, 3e-1, 1e-6),
}
"""By precision; tf32 is fp32 on a GPU, where products of matrices may be rounded to it."""
NEXT_TO_NOTHING = 1e-6
"""Numbers of an update that are less are compared as if they were as large as this."""


@dataclass(frozen=True)
class Gap:
    """Two numbers, or tensors, that were to be alike."""

    where: str
    size: float
    """How far apart they are, relative to what the tolerance of their kind is relative to."""
    tolerance: float
    told: str
    """The two values."""


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what is furthest apart."""

    compared: str
    difference: str | None
    """The first that is further apart than it may be, in the order of the run, tensors last."""
    largest: str
    """What is furthest apart, in words; empty where all is equal."""


def compare(base: Path, other: Path, *, to_the_bit: bool) -> Comparison:
    """Compare the ledgers of two run directories, and their last checkpoints.

    Args:
        to_the_bit: whether every number and tensor is to have the same bits, random states included; else losses, norms
            and scores, weights and buffers are compared to the rounding of the precision of `base`.
    """
    lines = _lines(base), _lines(other)
    folders = _checkpoints(base), _checkpoints(other)
    tolerance = None if to_the_bit else _tolerance_of(base)
    gaps = [*_line_gaps(*lines, tolerance)]
    if to_the_bit:
        tensors, others = (dict(_all_tensors(found[-1])) for found in folders)
        gaps += _bit_gaps(tensors, others)
        num_tensors = len(tensors)
    else:
        networks = _network(folders[0][0]), _network(folders[0][-1]), _network(folders[1][-1])
        parameters = _parameters(folders[0][-1])
        gaps += _network_gaps(*networks, parameters=parameters, tolerance=tolerance or TOLERANCES["fp32"])
        num_tensors = len(networks[1])
    kinds = [line["event"] for line in lines[0]]
    compared = f"{kinds.count('update')} updates, {_many(kinds.count('evaluation'), 'evaluation')}, "
    compared += f"{_many(num_tensors, 'tensor')}"
    return Comparison(compared, _difference(gaps, to_the_bit=to_the_bit), _largest(gaps))


def _difference(gaps: Sequence[Gap], *, to_the_bit: bool) -> str | None:
    """Return the first gap that is too large, in words, and the largest where that is another."""
    beyond = [gap for gap in gaps if gap.size > gap.tolerance or math.isnan(gap.size)]
    if not beyond:
        return None
    first = beyond[0]
    allowed = "" if to_the_bit else f", allowed {first.tolerance:.0e}"
    text = f"{first.where}: {first.told} ({first.size:.1e} apart{allowed})"
    largest = max(beyond, key=lambda gap: gap.size)
    more = f"; {len(beyond)} differ, most {largest.where} ({largest.size:.1e})"
    return text + (more if len(beyond) > 1 else "")


def _largest(gaps: Sequence[Gap]) -> str:
    """Return the gap that is furthest on its way to its tolerance."""
    found = max(gaps, key=lambda gap: gap.size / gap.tolerance if gap.tolerance else gap.size, default=None)
    return f"{found.size:.1e} ({found.where})" if found and found.size else ""


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


# ---------------------------------------------------------------- ledgers


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = [{key: value for key, value in line.items() if key not in MEASURED} for line in read_lines(run / NAME)]
    return [line for line in lines if line.get("event") in ("update", "evaluation")]


def _tolerance_of(run: Path) -> Tolerance:
    """Return what is rounding in a run, by its precision and device."""
    started = next(line for line in read_lines(run / "events.jsonl") if line["event"] == "started")
    precision, is_on_gpu = started["precision"], started["device"].startswith("cuda")
    return TOLERANCES["tf32" if is_on_gpu and precision == "fp32" else precision]


def _line_gaps(
    lines: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], tolerance: Tolerance | None
) -> Iterator[Gap]:
    """Yield how far apart each number of two ledgers is."""
    if len(lines) != len(others):
        yield Gap("number of lines", math.inf, 0.0, f"{len(lines)} and {len(others)}")
    for line, other in zip(lines, others, strict=False):
        is_update = line["event"] == "update"
        place = f"{line['event']} {line['step']}" if is_update else f"evaluation at update {line['step']}"
        allowed, smallest = 0.0, 0.0
        if tolerance:
            allowed = tolerance.updates if is_update else tolerance.scores
            smallest = NEXT_TO_NOTHING if is_update else 1.0
        values, other_values = dict(_leaves(line)), dict(_leaves(other))
        for key in values | other_values:
            pair = values.get(key), other_values.get(key)
            # The loss of an evaluation is a mean over rows, none of which changes sides.
            is_loss = tolerance is not None and not is_update and key == "val/loss"
            size = _apart(*pair, smallest=NEXT_TO_NOTHING if is_loss else smallest)
            limit = tolerance.updates if tolerance and is_loss else allowed
            yield Gap(f"{key} of {place}", size, limit, f"{_shown(pair[0])} and {_shown(pair[1])}")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each number of a line under its name; a score's name is its own."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, key if name in ("", "metrics") else f"{name}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]")
    else:
        yield name, value


def _apart(value: Any, other: Any, *, smallest: float) -> float:
    """Return how far apart two values are: relative to the larger, or to `smallest` where both are less."""
    are_numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (value, other))
    if not are_numbers:
        return 0.0 if value == other else math.inf
    if value == other:
        return 0.0
    return float(abs(value - other) / max(abs(value), abs(other), smallest))


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else json.dumps(value)


# ---------------------------------------------------------------- tensors


def _checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    return sorted(path.parent for path in run.glob("checkpoints/step-*/COMMIT.json"))


def _files(folder: Path, kind: str) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{kind}-*.safetensors"))


def _network(folder: Path) -> Mapping[str, Tensor]:
    return TensorFiles(folder, _files(folder, "model"))


def _parameters(folder: Path) -> frozenset[str]:
    """Return the names of what is trained in a checkpoint; what else its network has are buffers."""
    return frozenset(name for group in read_trainer(folder)["optimizer"] for name in group["parameters"])


def _all_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint by its kind and name: which rank wrote it counts for random states alone."""
    for kind in KINDS:
        yield from ((f"{kind}/{name}", tensor) for name, tensor in TensorFiles(folder, _files(folder, kind)).items())
    for file in _files(folder, "rng"):
        rank = int(file.removesuffix(".safetensors").removeprefix("rng-"))
        states = TensorFiles(folder, [file]).items()
        yield from ((f"random state {name} of rank {rank}", tensor) for name, tensor in states)


def _bit_gaps(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[Gap]:
    """Yield each tensor that has other bits."""
    for name in {**tensors, **others}:
        one, two = tensors.get(name), others.get(name)
        if one is None or two is None or (one.dtype, one.shape) != (two.dtype, two.shape):
            yield Gap(name, math.inf, 0.0, f"{_kind(one)} and {_kind(two)}")
        elif not torch.equal(_bits(one), _bits(two)):
            elements = (_bits(one) != _bits(two)).view(one.numel(), -1).any(dim=1)
            apart = (one.double() - two.double()).abs().max() / one.double().abs().max().clamp(min=1e-300)
            told = f"{int(elements.sum()):,} of {one.numel():,} elements have other bits"
            yield Gap(name, float(apart) or 1e-300, 0.0, told)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _network_gaps(
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    *,
    parameters: frozenset[str],
    tolerance: Tolerance,
) -> Iterator[Gap]:
    """Yield how far apart the weights of two networks are as a whole, and each buffer.

    Args:
        start: of the network `end`, whose way from there is what the distance of `other` is measured by.
    """
    if end.keys() != other.keys():
        different = sorted(end.keys() ^ other.keys())
        yield Gap(f"tensor {different[0]}", math.inf, 0.0, f"{len(different)} are in one checkpoint only")
        return
    way = math.hypot(*(_length(end[name], start[name]) for name in parameters))
    length = math.hypot(*(_length(end[name]) for name in parameters))
    distances = {name: _length(end[name], other[name]) for name in sorted(parameters)}
    distance = math.hypot(*distances.values())
    furthest = max(distances, key=lambda name: distances[name], default="")
    size = distance / max(way, tolerance.smallest * length) if distance else 0.0
    told = f"{distance:.2e} apart after a way of {way:.2e}"
    yield Gap(f"weights, most {furthest}", size, tolerance.weights, told)
    for name in sorted(end.keys() - parameters):
        one, two = end[name].double(), other[name].double()
        apart = float((one - two).abs().max() / one.abs().max().clamp(min=1e-12)) if one.numel() else 0.0
        limit = tolerance.weights if end[name].is_floating_point() else 0.0
        yield Gap(f"tensor {name}", apart, limit, "its largest difference is relative to its largest element")


def _length(tensor: Tensor, other: Tensor | None = None) -> float:
    """Return the 2-norm of a tensor, or of its difference from another."""
    return float((tensor.double() if other is None else tensor.double() - other.double()).norm())


def main() -> int:
    """Answer what standard input asks: a list of {base, other, to_the_bit}."""
    for pair in json.load(sys.stdin):
        found = compare(Path(pair["base"]), Path(pair["other"]), to_the_bit=pair["to_the_bit"])
        print(json.dumps(asdict(found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether two run directories tell the same training: ledgers key by key, tensors byte by byte.

It reads the files of a run directory and imports nothing of the package, whose layout may change between the two runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

MEASURED = {
    *("seconds", "samples_per_second", "tokens_per_second", "mfu", "memory_bytes"),
    *("data_wait_fraction", "compute_fraction", "reduction_fraction", "rest_fraction"),
}
"""Keys of an update's line that a clock or the allocator decides; two runs of one version differ in them as well."""
COMPUTED_EVENTS = {"gradients", "overflow", "samples"}
"""Lines of events.jsonl that the training alone decides: norms of parameters, overflows in fp16, shown answers."""
SCORE_TOLERANCE = 1e-12
"""Relative, of evaluations alone: a score is a sum over rows, which a later version may add up in another order."""

Line = dict[str, Any]


class TensorBytes(NamedTuple):
    """A tensor as it lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


@dataclass(frozen=True)
class Comparison:
    """What was compared, and the first thing that differs."""

    num_updates: int
    num_evaluations: int
    num_events: int
    num_tensors: int
    has_ragged_batch: bool
    """Whether an epoch ended with fewer rows than an update usually has."""
    difference: str | None

    def counts(self) -> str:
        """Return what was compared in words."""
        ragged = " (one ragged)" if self.has_ragged_batch else ""
        events = f"{self.num_events} events, " if self.num_events else ""
        evaluations = f"{self.num_evaluations} evaluations"
        return f"{self.num_updates} updates{ragged}, {evaluations}, {events}{self.num_tensors} tensors"


def compare_runs(base: Path, present: Path) -> Comparison:
    """Compare the ledgers of two run directories, and every tensor of their last checkpoints.

    Raises:
        FileNotFoundError: one has no ledger, or no whole checkpoint.
    """
    ledgers, events = (read_ledger(base), read_ledger(present)), (read_events(base), read_events(present))
    tensors = read_tensors(last_checkpoint(base)), read_tensors(last_checkpoint(present))
    difference = (
        ledger_difference(*ledgers)
        or ledger_difference(*events)
        or checkpoint_difference(checkpoint_names(base), checkpoint_names(present))
        or tensor_difference(*tensors)
    )
    kinds = [line["event"] for line in ledgers[0]]
    counts = kinds.count("update"), kinds.count("evaluation"), len(events[0]), len(tensors[0])
    return Comparison(*counts, has_ragged_batch(ledgers[0]), difference)


# ---------------------------------------------------------------- ledgers


def read_ledger(run: Path) -> list[Line]:
    """Return the lines of a run's ledger."""
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def read_events(run: Path) -> list[Line]:
    """Return what events.jsonl tells of the training, without the times."""
    path = run / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    computed = [line for line in lines if line["event"] in COMPUTED_EVENTS]
    return [{key: value for key, value in line.items() if key != "time"} for line in computed]


def ledger_difference(base: Sequence[Line], present: Sequence[Line]) -> str | None:
    """Return the first line and key in which two ledgers or lists of events differ, with both values; else None."""
    for line, other in zip(base, present, strict=False):
        where = f"{line.get('event')} of step {line.get('step')}"
        tolerance = SCORE_TOLERANCE if line.get("event") == "evaluation" else 0.0
        found = difference_of(_without_measured(line), _without_measured(other), tolerance=tolerance)
        if found is not None:
            key, value, other_value = found
            return f"{where}, {key}: base {value}, present {other_value}"
    if len(base) != len(present):
        return f"number of lines: base {len(base)}, present {len(present)}"
    return None


def has_ragged_batch(ledger: Sequence[Line]) -> bool:
    """Whether some updates of a ledger took fewer rows than others."""
    seen = [line["samples_seen"] for line in ledger if line["event"] == "update"]
    return len({after - before for before, after in pairwise([0, *seen])}) > 1


def _without_measured(line: Line) -> Line:
    return {key: value for key, value in line.items() if key not in MEASURED}


def difference_of(value: Any, other: Any, *, tolerance: float, key: str = "") -> tuple[str, str, str] | None:
    """Return the first place, as a dotted key, in which two pieces of JSON differ, and what each has there.

    Args:
        tolerance: relative, between two floats; 0 wants the same bits.
    """
    if isinstance(value, dict) and isinstance(other, dict):
        return _difference_of_objects(value, other, tolerance=tolerance, key=key)
    if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        pairs = ((f"{key}[{index}]", *pair) for index, pair in enumerate(zip(value, other, strict=True)))
        found = (difference_of(one, two, tolerance=tolerance, key=place) for place, one, two in pairs)
        return next((difference for difference in found if difference), None)
    if repr(value) == repr(other) or _is_close(value, other, tolerance):  # repr tells each float from every other
        return None
    return key, repr(value), repr(other)


def _difference_of_objects(value: Line, other: Line, *, tolerance: float, key: str) -> tuple[str, str, str] | None:
    for name in (*value, *(name for name in other if name not in value)):
        place = f"{key}.{name}" if key else name
        if name not in value or name not in other:
            one, two = (repr(side[name]) if name in side else "(no such key)" for side in (value, other))
            return place, one, two
        if found := difference_of(value[name], other[name], tolerance=tolerance, key=place):
            return found
    return None


def _is_close(value: Any, other: Any, tolerance: float) -> bool:
    is_number = isinstance(value, float) and isinstance(other, float)
    return is_number and tolerance > 0 and math.isclose(value, other, rel_tol=tolerance)


# ---------------------------------------------------------------- tensors


def checkpoint_names(run: Path) -> list[str]:
    """Return the whole checkpoints of a run, the oldest first."""
    return sorted(path.parent.name for path in run.glob("checkpoints/step-*/COMMIT.json"))


def checkpoint_difference(base: Sequence[str], present: Sequence[str]) -> str | None:
    """Return which checkpoints two runs have kept, where they are not the same ones."""
    return None if base == present else f"checkpoints: base {', '.join(base)}, present {', '.join(present)}"


def last_checkpoint(run: Path) -> Path:
    """Return the newest whole checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (names := checkpoint_names(run)):
        raise FileNotFoundError(f"{run} has no whole checkpoint")
    return run / "checkpoints" / names[-1]


def read_tensors(folder: Path) -> dict[str, TensorBytes]:
    """Return every tensor below a folder by its kind and name.

    Which rank wrote a weight or a moment does not count; random states are a rank's own.
    """
    tensors: dict[str, TensorBytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        kind = path.stem if path.stem.startswith("rng-") else path.stem.partition("-")[0]
        tensors |= {f"{kind}/{name}": tensor for name, tensor in _tensors_of(path)}
    return tensors


def _tensors_of(path: Path) -> Iterator[tuple[str, TensorBytes]]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, TensorBytes(entry["dtype"], tuple(entry["shape"]), content[start + first : start + last])


def tensor_difference(base: Mapping[str, TensorBytes], present: Mapping[str, TensorBytes]) -> str | None:
    """Return the first tensor that differs, and how; None where all have the same bits."""
    for name in (*base, *(name for name in present if name not in base)):
        if name not in base or name not in present:
            return f"tensor {name}: only in {'base' if name in base else 'present'}"
        if base[name] != present[name]:
            return f"tensor {name}: {_how(base[name], present[name])}"
    return None


def _how(base: TensorBytes, present: TensorBytes) -> str:
    if base[:2] != present[:2]:
        return f"base {base.dtype} {list(base.shape)}, present {present.dtype} {list(present.shape)}"
    size = len(base.content) // max(1, math.prod(base.shape))
    elements, others = (_elements(tensor.content, size) for tensor in (base, present))
    differing = [place for place, pair in enumerate(zip(elements, others, strict=True)) if pair[0] != pair[1]]
    first = differing[0]
    shown = f"base 0x{elements[first].hex()}, present 0x{others[first].hex()}"
    return f"{len(differing):,} of {len(elements):,} elements differ, the first at {first:,}: {shown}"


def _elements(content: bytes, size: int) -> list[bytes]:
    """Return the elements of a tensor, their highest byte first."""
    return [content[place : place + size][::-1] for place in range(0, len(content), size)]

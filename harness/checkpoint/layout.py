"""Whether the tensors of a checkpoint are what this run can take up: kernels trust sizes and types."""

from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path

from harness.checkpoint.tensors import FLOATING, TYPES, SavedState
from harness.errors import CheckpointError
from harness.optim import moment_shapes
from harness.record.manifest import COMMIT, Manifest
from harness.strategy.base import Strategy

_MAX_TOLD = 5


def check_layout(saved: SavedState, directory: Path, *, manifest: Manifest, strategy: Strategy) -> None:
    """Refuse tensors that the model, the optimizer or the average of the weights cannot take up.

    Whoever made the checkpoint can seal it. Reads no tensor but counts, of one element each.

    Raises:
        CheckpointError: names some that differ.
    """
    unlisted = sorted(saved.keys() ^ manifest.tensors.keys())
    if unlisted:
        raise CheckpointError(
            f"{directory / COMMIT} lists other tensors than the files hold: {len(unlisted)} differ, such as "
            f"{', '.join(unlisted[:_MAX_TOLD])}. This harness has not written it; take another checkpoint"
        )
    found = saved.layout()
    if strategy.average is None:  # the run goes on without one
        found = {key: entry for key, entry in found.items() if not key.startswith("ema/")}
    wanted = dict(_wanted(strategy, found))
    different = [
        f"{key}: saved {found[key][1] if key in found else 'none'}, wanted {wanted.get(key, 'none')}"
        for key in sorted(wanted.keys() | found.keys())
        if key not in found or wanted.get(key) != found[key][1]
    ]
    different = [text for text in different if text.startswith("model/")] or different  # the rest follows the model
    different = different or list(_wrong_types(found)) or list(_wrong_counts(found, saved))
    if different:
        raise CheckpointError(
            f"{directory} was made by another model or optimizer; {len(different)} tensors differ, such as "
            f"{'; '.join(different[:_MAX_TOLD])}. Set model.* and optim.kind as they were then, take another "
            "checkpoint, or give this run another run.name"
        )


def _wanted(strategy: Strategy, found: Mapping[str, object]) -> Iterator[tuple[str, list[int]]]:
    """Yield the key and the shape of all that is to be there: of an optimizer or an average all or nothing is."""
    shapes = {name: list(shape) for name, shape in strategy.model_shapes().items()}
    yield from ((f"model/{name}", shape) for name, shape in shapes.items())
    for group in strategy.optimizer_settings():
        for name in group["parameters"]:  # one that has had no gradient has no moments
            moments = {f"optim/{name}/{moment}": kept for moment, kept in moment_shapes(group, shapes[name]).items()}
            if not found.keys().isdisjoint(moments):
                yield from moments.items()
    averages = {f"ema/weight/{name}": shapes[name] for name in strategy.parameter_names}
    if not found.keys().isdisjoint(averages):
        yield from averages.items()
        yield "ema/count", []


def _wrong_types(found: Mapping[str, tuple[str, list[int]]]) -> Iterator[str]:
    for key, (type_name, _) in found.items():
        allowed = {"F32"} if _is_step(key) else TYPES if key.startswith("model/") else FLOATING
        if type_name not in allowed:
            yield f"{key}: saved as {type_name}, wanted {' or '.join(sorted(allowed))}"


def _wrong_counts(found: Mapping[str, object], saved: SavedState) -> Iterator[str]:
    for key in found:
        if _is_step(key) or key == "ema/count":
            count = saved[key].item()
            if not (isfinite(count) and count >= 0):
                yield f"{key}: saved {count}, wanted a count"


def _is_step(key: str) -> bool:
    return key.startswith("optim/") and key.endswith("/step")

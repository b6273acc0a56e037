"""Whether what is installed is what this version was made for: the ranges of pyproject.toml, which are nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from harness.config.run_config import RunConfig

DISTRIBUTION = "harness-train"


def extras_used(config: RunConfig) -> set[str]:
    """Return the extras whose versions can change what a run computes."""
    parts = (config.model, config.data, config.task)
    return set().union({"zero"} if config.strategy.kind != "ddp" else (), *(part.extras for part in parts))


def version_problems(extras: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return what is too old to train, and what is newer than anything that was tried, a sentence each.

    A build between releases counts as the release that it leads to. Of a checkout that was never installed nothing is
    known; a package without a version, as an installation that was cut off leaves it, or with one that no release has,
    is told. What an extra lacks altogether is said where it is imported, with what to set instead.

    Args:
        extras: of the distribution, beside its base.
    """
    problems, notices = [], []
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return [], ()
    for requirement in map(Requirement, lines):
        is_base = requirement.marker is None
        if not (is_base or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)):  # type: ignore[union-attr]
            continue
        asked = f"{requirement.name}{requirement.specifier}"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if is_base:
                problems.append(f"{requirement.name} is not installed; pip install '{asked}'")
            continue
        try:
            release = Version(found).base_version
        except InvalidVersion:
            text = f"{requirement.name} does not say which version it is ({found})"
            notices.append(f"{text}; this one was tried with {asked}")
            continue
        failed = [part for part in requirement.specifier if not part.contains(release)]
        if any(part.operator != "<" for part in failed):
            problems.append(f"{requirement.name} {found} cannot be used with this version; pip install '{asked}'")
        elif failed:
            notices.append(f"{requirement.name} {found} is newer than what this version was tried with, {asked}")
    return list(dict.fromkeys(problems)), tuple(dict.fromkeys(notices))  # two extras may ask for the same

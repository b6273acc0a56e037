"""Every distribution that the harness or an extra of it brings has a permissive licence, or is excepted with a reason.

The licence is what the installed metadata say: the SPDX expression, else the word of `License`, else the classifiers.
What nobody has listed here fails by name.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.release.locks import REQUIREMENTS, ROOT, normalized, read

PERMISSIVE = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",  # with two clauses or three; older metadata do not say
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "MIT",
    "MIT-CMU",
    "PSF-2.0",
    "Zlib",
}
OLDER_NAMES = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "BSD 3-Clause": "BSD-3-Clause",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_NVIDIA = "LicenseRef-NVIDIA-Proprietary"
OF_CUDA = {
    "cuda-bindings": "Apache-2.0",
    "cuda-pathfinder": "Apache-2.0",
    "cuda-toolkit": "",
    "nvidia-cublas": _NVIDIA,
    "nvidia-cuda-cupti": _NVIDIA,
    "nvidia-cuda-nvrtc": _NVIDIA,
    "nvidia-cuda-runtime": _NVIDIA,
    "nvidia-cudnn-cu13": _NVIDIA,
    "nvidia-cufft": _NVIDIA,
    "nvidia-cufile": _NVIDIA,
    "nvidia-curand": _NVIDIA,
    "nvidia-cusolver": _NVIDIA,
    "nvidia-cusparse": _NVIDIA,
    "nvidia-cusparselt-cu13": "NVIDIA Proprietary Software",
    "nvidia-nccl-cu13": _NVIDIA,
    "nvidia-nvjitlink": _NVIDIA,
    "nvidia-nvshmem-cu13": _NVIDIA,
    "nvidia-nvtx": "Apache-2.0",
    "triton": "MIT",
}
"""What a torch with CUDA brings, and its licence by the metadata on the package index in November 2026."""
UNCHANGED = "copyleft of its own files alone, which are used as they are and are no part of our distributions"
EXCEPTIONS = {
    "certifi": ("MPL-2.0", UNCHANGED),
    "hypothesis": ("MPL-2.0", UNCHANGED),
    "pathspec": ("MPL-2.0", UNCHANGED),
    "tqdm": ("MPL-2.0 AND MIT", UNCHANGED),
    **{
        name: (licence, "NVIDIA's terms let its libraries be used with its GPUs; torch brings them and we do not")
        for name, licence in OF_CUDA.items()
        if licence not in PERMISSIVE
    },
}
"""By name: the licence, to the letter, that is no permissive one, and why it may stay."""

Find = Callable[[str], Distribution]


def licence_of(found: Distribution) -> str:
    """Return the licence of a distribution as an SPDX expression where it is known by one; "" if it says none."""
    said = found.metadata.json  # a list of each field that may come twice
    if expression := said.get("license_expression"):
        return str(expression)
    word = str(said.get("license") or "").strip()
    if word and "\n" not in word:  # more is the text of a licence
        return OLDER_NAMES.get(word, word)
    classifiers = [text for text in said.get("classifier", []) if text.startswith("License ::")]
    names = [re.sub(r"\s*\(.*\)$", "", text.rpartition("::")[2].strip()) for text in classifiers]
    return " AND ".join(OLDER_NAMES.get(name, name) for name in names)


def is_permissive(expression: str) -> bool:
    """Return whether an SPDX expression leaves a choice of nothing but permissive licences."""
    tokens = [token.strip() for token in re.split(r"([()]|(?<![^\s)])(?:AND|OR)(?![^\s(]))", expression)]
    value, rest = _any([token for token in tokens if token])
    return value and not rest


def _any(tokens: list[str]) -> tuple[bool, list[str]]:
    value, rest = _all(tokens)
    while rest[:1] == ["OR"]:
        other, rest = _all(rest[1:])
        value = value or other
    return value, rest


def _all(tokens: list[str]) -> tuple[bool, list[str]]:
    value, rest = _one(tokens)
    while rest[:1] == ["AND"]:
        other, rest = _one(rest[1:])
        value = value and other
    return value, rest


def _one(tokens: list[str]) -> tuple[bool, list[str]]:
    if tokens[:1] == ["("]:
        value, rest = _any(tokens[1:])
        return value and rest[:1] == [")"], rest[1:]
    if not tokens:
        return False, ["something is missing"]
    return tokens[0] in PERMISSIVE, tokens[1:]


def brought_by(requirements: Iterable[str], find: Find = distribution) -> set[str]:
    """Return the normalized names of all distributions that these requirements bring to this environment."""
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        for extra in ("", *requirement.extras):
            if (key := (normalized(requirement.name), extra)) not in seen:
                seen.add(key)
                todo += _wanted_by(key[0], extra, find)
    return {name for name, _ in seen}


def _wanted_by(name: str, extra: str, find: Find) -> Iterator[Requirement]:
    try:
        texts = find(name).requires or []
    except PackageNotFoundError:  # `problems` tells of it
        return
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            requirement.marker = None
            yield requirement


def requirements_of(root: Path, *, extras: bool = True) -> list[str]:
    """Return what pyproject.toml wants, without or with all of its extras."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    if extras:
        wanted += [text for texts in project["optional-dependencies"].values() for text in texts]
    return [text for text in wanted if Requirement(text).name != project["name"]]


def problems(names: Iterable[str], find: Find = distribution) -> list[str]:
    """Return a sentence for each distribution whose licence is not permissive and has no exception."""
    found = []
    for name in sorted(names):
        try:
            installed = find(name)
        except PackageNotFoundError:
            found.append(f"{name} is not installed, so nobody knows its licence; run make setup")
            continue
        licence = licence_of(installed)
        excepted = EXCEPTIONS.get(name)
        if not is_permissive(licence) and (excepted is None or excepted[0] != licence):
            told = f"the licence {licence!r}" if licence else "no licence"
            found.append(f"{name} {installed.version} has {told}, which {__file__} neither lists nor excepts")
    return found


def main() -> None:
    """Check what the harness, its extras and the locks bring; end with 1 and the names of those that do not pass."""
    names = brought_by(requirements_of(ROOT)) | read(REQUIREMENTS).keys()
    found = problems(names)
    if found:
        sys.exit("\n".join(found))
    excepted = sorted(names & EXCEPTIONS.keys())
    print(f"{len(names)} distributions have permissive licences, but for these exceptions: {', '.join(excepted)}")


if __name__ == "__main__":
    main()

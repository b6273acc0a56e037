"""What the harness and its extras bring may be used freely, or somebody has written down why it may stay."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, PathDistribution
from pathlib import Path

import pytest

from tests.release.licences import (
    EXCEPTIONS,
    brought_by,
    is_permissive,
    licence_of,
    problems,
    requirements_of,
)
from tests.release.locks import REQUIREMENTS, ROOT, read

CLASSIFIER = "Classifier: License :: OSI Approved ::"


def described(folder: Path, name: str, *lines: str) -> PathDistribution:
    """Write what an installed distribution says of itself."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    text = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines])
    (information / "METADATA").write_text(f"{text}\n")
    return PathDistribution(information)


def test_everything_that_the_harness_and_its_extras_bring_here_passes() -> None:
    brought = brought_by(requirements_of(ROOT))
    assert problems(brought | read(REQUIREMENTS).keys()) == []
    assert {"torch", "wandb", "tensorboard", "deepspeed", "peft", "pytest", "urllib3"} <= brought
    without_extras = brought_by(requirements_of(ROOT, extras=False))
    assert {"torch", "safetensors", "sympy"} <= without_extras
    assert not {"wandb", "deepspeed", "pytest"} & without_extras


@pytest.mark.parametrize(
    "lines",
    [
        ["License-Expression: GPL-3.0-only"],
        ["License-Expression: MIT AND LGPL-2.1-or-later"],
        ["License: GPL"],
        [f"{CLASSIFIER} GNU Affero General Public License v3 (AGPLv3)"],
        [f"{CLASSIFIER} MIT License", f"{CLASSIFIER} GNU General Public License v3 (GPLv3)"],
        ["License: Our own terms"],
        ["License-Expression: MPL-2.0"],
        [],
    ],
)
def test_a_distribution_with_another_licence_or_none_fails_by_name(tmp_path: Path, lines: list[str]) -> None:
    found = described(tmp_path, "stranger", *lines)
    (told,) = problems(["stranger"], lambda _: found)
    assert told.startswith("stranger 1.0 has ")


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        (["License-Expression: MIT"], "MIT"),
        (["License: Apache 2.0"], "Apache-2.0"),
        (["License: Redistribution and use", "        in source", f"{CLASSIFIER} BSD License"], "BSD"),
        ([f"{CLASSIFIER} ISC License (ISCL)"], "ISC"),
    ],
)
def test_a_permissive_licence_passes_however_it_is_told(tmp_path: Path, lines: list[str], licence: str) -> None:
    found = described(tmp_path, "friend", *lines)
    assert licence_of(found) == licence
    assert problems(["friend"], lambda _: found) == []


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND (GPL-3.0-only OR BSD-2-Clause)", True),
        ("(MIT OR GPL-3.0-only) AND GPL-2.0-only", False),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("MIT OR", False),
        ("MIT)", False),
        ("(MIT", False),
        ("", False),
    ],
)
def test_an_expression_is_permissive_if_a_choice_of_it_is(expression: str, permissive: bool) -> None:
    assert is_permissive(expression) == permissive


def test_an_exception_holds_for_the_licence_that_it_was_made_for(tmp_path: Path) -> None:
    found = described(tmp_path, "certifi", "License-Expression: AGPL-3.0-only")
    (told,) = problems(["certifi"], lambda _: found)
    assert told.startswith("certifi 1.0 has the licence 'AGPL-3.0-only'")
    assert all(reason for _, reason in EXCEPTIONS.values())


def test_extras_and_markers_decide_what_is_brought(tmp_path: Path) -> None:
    there = {
        "a": ["Requires-Dist: b[more]>=1", "Requires-Dist: c; extra == 'x'", "Requires-Dist: d; python_version < '3'"],
        "b": ["Requires-Dist: E_e; extra == 'more'", "Requires-Dist: f; extra == 'most'"],
    }
    found = {name: described(tmp_path, name, *lines) for name, lines in there.items()}

    def find(name: str) -> PathDistribution:
        if name in found:
            return found[name]
        raise PackageNotFoundError(name)

    assert brought_by(["a"], find) == {"a", "b", "e-e"}
    assert brought_by(["a[x]"], find) == {"a", "b", "c", "e-e"}
    assert problems(["c"], find) == ["c is not installed, so nobody knows its licence; run make setup"]


def test_the_command_fails_with_the_name_of_what_does_not_pass(tmp_path: Path) -> None:
    described(tmp_path, "idna", "License-Expression: GPL-3.0-only")
    command = [sys.executable, "-m", "tests.release.licences"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("idna 1.0 has the licence 'GPL-3.0-only'")

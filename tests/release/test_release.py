"""A release is of a commit and a day, is the same bytes whoever builds it, and says what it is made of."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import harness
from tests.helpers import copy_tracked
from tests.release import build
from tests.release.locks import LOCKS, ROOT, read

HEADING = f"## {harness.__version__} (2026-12-01)"


def committed(folder: Path) -> None:
    """Commit everything in the folder."""
    who = ("-c", "user.name=A", "-c", "user.email=a@b")
    for arguments in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "--message", "All"]):
        build.git(folder, *arguments)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout, committed elsewhere with a changelog of the day."""
    folder = copy_tracked(tmp_path_factory.mktemp("release") / "checkout")
    changes = (folder / "CHANGELOG.md").read_text()
    (folder / "CHANGELOG.md").write_text(re.sub(r"^## \S+ \(.*\)$", HEADING, changes, count=1, flags=re.MULTILINE))
    committed(folder)
    return folder


def test_a_commit_of_a_version_with_its_day_may_be_released(checkout: Path) -> None:
    assert build.refusals(checkout) == []


def test_a_tree_that_is_not_as_it_was_committed_is_refused(checkout: Path) -> None:
    stray = checkout / "stray.py"
    stray.write_text("")
    try:
        with pytest.raises(SystemExit, match=r"1 files are not as they were committed: \?\? stray.py"):
            build.main(checkout)
    finally:
        stray.unlink()
    assert not (checkout / "dist").exists()


@pytest.mark.parametrize("heading", ["", "## {} (unreleased)", "## {}0 (2026-12-01)", "### {} (2026-12-01)"])
def test_a_version_without_its_day_in_the_changelog_is_refused(tmp_path: Path, heading: str) -> None:
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness/__init__.py").write_text('__version__ = "7.8"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading.format('7.8')}\n\n## 7.7 (2026-11-01)\n")
    committed(tmp_path)
    assert build.refusals(tmp_path) == [
        "CHANGELOG.md has no line '## 7.8 (YEAR-MONTH-DAY)', with the day of the release"
    ]


def test_the_version_stands_in_one_place() -> None:
    assert build.version_of(ROOT) == harness.__version__
    assert harness.__version__ not in (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]


BUILD = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[1], 8))
from tests.release.build import build
build(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def twice(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds of one commit, by two people in two places."""
    folders = []
    for umask, zone in (("022", "UTC"), ("077", "Asia/Tokyo")):
        folder = tmp_path_factory.mktemp("built") / "dist"
        command = [sys.executable, "-c", BUILD, umask, str(checkout), str(folder)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "TZ": zone}, check=True, timeout=120)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.mark.slow
def test_two_builds_of_a_commit_are_the_same_bytes(twice: tuple[Path, Path]) -> None:
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in twice)
    stem = f"harness_train-{harness.__version__}"
    assert first.keys() == {f"{stem}-py3-none-any.whl", f"{stem}.tar.gz", f"{stem}.cdx.json", "SHA256SUMS"}
    assert [name for name in first if first[name] != second.get(name)] == []
    names = zipfile.ZipFile(io.BytesIO(first[f"{stem}-py3-none-any.whl"])).namelist()
    assert {"harness/launch/cli.py", "harness/launch/example_files/configs/mnist_cnn.yaml"} <= set(names), "by links"


@pytest.mark.slow
def test_the_checksums_are_those_of_everything_that_is_released(twice: tuple[Path, Path]) -> None:
    folder, _ = twice
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.splitlines()) == sorted(
        f"{path.name}: OK" for path in folder.iterdir() if path.name != "SHA256SUMS"
    )


@pytest.mark.slow
def test_the_source_distribution_is_of_nobody_and_of_the_time_of_the_commit(
    checkout: Path, twice: tuple[Path, Path]
) -> None:
    epoch = int(build.git(checkout, "log", "-1", "--format=%ct"))
    (path,) = twice[0].glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {(member.uid, member.gid, member.uname, member.gname, member.mtime) for member in archive}
    assert found == {(0, 0, "", "", epoch)}


@pytest.mark.slow
def test_the_bill_of_materials_has_every_pin_with_licence_and_hashes(twice: tuple[Path, Path]) -> None:
    (path,) = twice[0].glob("*.cdx.json")
    bill: dict[str, Any] = json.loads(path.read_text())
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    pins = [pin for name in LOCKS for pin in read(name).values()]
    told = bill["components"]
    assert [(part["name"], part["version"]) for part in told] == [(pin.name, pin.version) for pin in pins]
    assert [tuple(h["content"] for h in part["hashes"]) for part in told] == [pin.hashes for pin in pins]
    assert [part["name"] for part in told if not part.get("licenses")] == ["cuda-toolkit"], "which says none"
    by_name = {part["name"]: part for part in told}
    assert by_name["numpy"]["licenses"][0]["expression"].startswith("BSD-3-Clause AND ")
    assert by_name["rich"]["licenses"] == [{"license": {"id": "MIT"}}]
    assert by_name["mpmath"]["licenses"] == [{"license": {"name": "BSD"}}]
    assert by_name["safetensors"]["scope"] == "required"
    assert by_name["pytest"]["scope"] == "optional"
    assert len({part["bom-ref"] for part in told}) == len(told)
    assert {"pkg:pypi/torch@2.13.0", "pkg:pypi/torch@2.13.0%2Bcpu"} <= {part["purl"] for part in told}

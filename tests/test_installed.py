"""Packages outside the ranges of pyproject.toml are refused or told before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.io import load_config
from harness.errors import ConfigError
from tests.helpers import write_small_table
from tests.neighbours import REPOSITORY


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose distributions are found before those of this environment."""
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    return tmp_path / "packages"


def install(folder: Path, package: str, version: str) -> None:
    """Write what pip writes of a distribution."""
    information = folder / f"{package}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def loaded(tmp_path: Path, **sections: object) -> tuple[str, ...]:
    """Return the notices of a configuration whose run is to start here."""
    return load_config(write_small_table(tmp_path, name="a", **sections), world_size=1).notices


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.10.0+cu128"), ("numpy", "1.26.4"), ("xxhash", "3.4.1")],
)
def test_a_package_that_is_too_old_is_refused_with_its_version_and_what_to_type(
    tmp_path: Path, installed: Path, package: str, version: str
) -> None:
    install(installed, package, version)
    with pytest.raises(ConfigError) as refusal:
        loaded(tmp_path)
    assert f"{package} {version} cannot be used with this version; pip install '{package}" in str(refusal.value)


def test_what_this_environment_has_is_neither_refused_nor_told(tmp_path: Path) -> None:
    assert loaded(tmp_path, strategy={"kind": "zero1"}) == ()


@pytest.mark.parametrize("version", ["2.15.0", "2.15.0.dev20261101+cpu"])
def test_a_torch_newer_than_any_that_was_tried_is_told_and_trains(
    tmp_path: Path, installed: Path, version: str
) -> None:
    install(installed, "torch", version)
    assert [notice for notice in loaded(tmp_path) if f"torch {version} is newer than what this version" in notice]


def test_a_build_that_a_vendor_makes_before_a_release_counts_as_that_release(tmp_path: Path, installed: Path) -> None:
    install(installed, "torch", "2.11.0a0+a6c236b9fd.nv26.3")
    assert loaded(tmp_path) == ()


@pytest.mark.parametrize("version", ["0.19.7", "0.19.9"])
def test_another_deepspeed_is_refused_under_zero_and_no_matter_under_ddp(
    tmp_path: Path, installed: Path, version: str
) -> None:
    install(installed, "deepspeed", version)
    assert loaded(tmp_path) == ()
    with pytest.raises(ConfigError, match=rf"deepspeed {version} cannot be used .*; pip install 'deepspeed=="):
        loaded(tmp_path, strategy={"kind": "zero2"})


@pytest.mark.parametrize("metadata", [None, "Metadata-Version: 2.1\nName: numpy\nVersion: 2.4-site_build\n"])
def test_a_package_that_does_not_say_its_version_is_told_and_trains(
    tmp_path: Path, installed: Path, metadata: str | None
) -> None:
    information = installed / "numpy-2.4.dist-info"
    information.mkdir(parents=True)  # nothing else is what pip leaves when it is killed
    if metadata:
        (information / "METADATA").write_text(metadata)
    (told,) = loaded(tmp_path)
    assert told.startswith("numpy does not say which version it is")
    assert told.endswith("this one was tried with numpy>=2.2")


def test_a_python_that_is_too_old_is_refused_in_words(tmp_path: Path) -> None:
    old = "import sys; sys.version_info = (3, 10, 12); import harness"
    done = subprocess.run([sys.executable, "-c", old], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        f"harness needs Python 3.11 or newer, and {sys.executable} is older; python3.11 -m venv .venv\n",
    )

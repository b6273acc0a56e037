"""What is installed is what was tested, byte for byte, and no more of it than a machine can use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.release.install import NO_CPU_BUILD, install, install_torch, lock_of_torch, what_is_missing
from tests.release.licences import OF_CUDA, brought_by, requirements_of
from tests.release.locks import CONSTRAINTS, LOCKS, REQUIREMENTS, ROOT, TORCH_CPU, TORCH_CUDA, Pin, parse, read


def test_every_pin_is_locked_with_the_hashes_of_its_files() -> None:
    pinned = read(CONSTRAINTS)
    locked, cpu, cuda = (read(name) for name in LOCKS)
    assert {name: pin.version for name, pin in pinned.items() if name != "torch"} == {
        name: pin.version for name, pin in locked.items()
    }
    assert cuda["torch"].version == pinned["torch"].version
    assert cuda["torch"].operator == "===", "or pip would take a build without CUDA where it finds one"
    assert cpu["torch"].version == f"{pinned['torch'].version}+cpu"
    assert cpu.keys() == {"torch"}
    assert cuda.keys() - {"torch"} == OF_CUDA.keys(), "their licences are written down"
    for pin in [*locked.values(), *cpu.values(), *cuda.values()]:
        assert pin.hashes, pin.name
        assert len(pin.hashes) == len(set(pin.hashes)), pin.name


def test_everything_that_the_harness_and_its_extras_bring_is_locked() -> None:
    assert brought_by(requirements_of(ROOT)) - read(REQUIREMENTS).keys() - read(TORCH_CUDA).keys() == set()


def test_the_locks_name_no_host_no_folder_and_no_option_of_pip() -> None:
    for name in LOCKS:
        text = (ROOT / name).read_text()
        assert "://" not in text
        assert not [line for line in text.splitlines() if line.startswith(("-", "/", "."))]


def test_a_pin_reads_back_as_it_was_written() -> None:
    pin = Pin("tiny", "1.0+cpu", marker="sys_platform == 'linux'", hashes=("0" * 64, "f" * 64), operator="===")
    assert parse(f"# a note\n{pin.text}\nother-one==2\n") == {"tiny": pin, "other-one": Pin("other-one", "2")}


@pytest.mark.parametrize("text", ["tiny", "tiny>=1", "-e .", "tiny==1\nTiny==2", "tiny==1 --hash=sha256:abc"])
def test_what_is_no_pin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no pin, or a second one"):
        parse(text)


def wheel(folder: Path, name: str, version: str) -> Pin:
    """Write a wheel with nothing in it; return the pin of it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return Pin(name, version, hashes=(hashlib.sha256(path.read_bytes()).hexdigest(),))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip finds everything in; what it installs goes to `installed` beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # without nvidia-smi
    return folder


def installed(index: Path) -> list[str]:
    """Return what pip has installed."""
    return sorted(path.name.removesuffix(".dist-info") for path in index.parent.glob("installed/*.dist-info"))


@pytest.mark.slow
def test_pip_refuses_a_file_whose_bytes_are_others(index: Path) -> None:
    pin = wheel(index, "tiny", "1.0")
    other = replace(pin, hashes=("0" * 64,))
    with pytest.raises(subprocess.CalledProcessError) as refused:
        install([other])
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in refused.value.stderr
    with pytest.raises(subprocess.CalledProcessError) as refused:
        install([replace(pin, hashes=())])
    assert "Hashes are required in --require-hashes mode" in refused.value.stderr
    assert installed(index) == []
    install([pin])
    assert installed(index) == ["tiny-1.0"]


def test_only_linux_without_a_gpu_wants_a_build_without_cuda() -> None:
    assert lock_of_torch(system="Linux", gpu=False) == TORCH_CPU
    assert lock_of_torch(system="Linux", gpu=True) == TORCH_CUDA
    assert lock_of_torch(system="Darwin", gpu=False) == TORCH_CUDA


@pytest.fixture
def checkout(tmp_path: Path, index: Path) -> Path:
    """A folder with locks of a torch that is not there yet, both builds of which pip finds."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name, build in {TORCH_CPU: "9.9+cpu", TORCH_CUDA: "9.9"}.items():
        pin = wheel(index, "torch", build)
        (folder / name).write_text(replace(pin, operator="===" if name == TORCH_CUDA else "==").text)
    return folder


@pytest.mark.slow
def test_without_a_gpu_torch_is_the_build_without_cuda(
    checkout: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_torch(checkout, None)
    assert installed(index) == ["torch-9.9+cpu"]
    assert "torch 9.9 without CUDA" in capsys.readouterr().out, "it is told before the silence"


@pytest.mark.slow
def test_with_a_gpu_torch_is_that_of_the_package_index(checkout: Path, index: Path, tmp_path: Path) -> None:
    driver = tmp_path / "bin/nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    driver.chmod(0o755)
    install_torch(checkout, None)
    assert installed(index) == ["torch-9.9"]


@pytest.mark.slow
def test_where_no_index_has_a_build_without_cuda_the_other_is_taken_with_a_word(
    checkout: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (index / "torch-9.9+cpu-py3-none-any.whl").unlink()
    install_torch(checkout, None)
    assert installed(index) == ["torch-9.9"]
    assert NO_CPU_BUILD in capsys.readouterr().out


@pytest.mark.slow
def test_a_build_without_cuda_whose_bytes_are_others_is_refused(checkout: Path, index: Path) -> None:
    path = checkout / TORCH_CPU
    path.write_text(replace(read(TORCH_CPU, checkout)["torch"], hashes=("0" * 64,)).text)
    with pytest.raises(subprocess.CalledProcessError):
        install_torch(checkout, None)
    assert installed(index) == []


def test_a_torch_of_the_pinned_version_stays_whatever_its_build(
    checkout: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = version("torch").partition("+")[0]
    (checkout / TORCH_CUDA).write_text(Pin("torch", public, hashes=("0" * 64,)).text)
    install_torch(checkout, None)
    assert installed(index) == []
    assert "is there and stays" in capsys.readouterr().out


def test_the_lock_of_everything_else_leaves_torch_out() -> None:
    assert "torch" not in read(REQUIREMENTS)


@pytest.mark.slow
def test_a_requirement_that_nothing_meets_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_is_missing() == []
    information = tmp_path / "friend-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: friend\nVersion: 1.0\nRequires-Dist: foe>=2\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert what_is_missing() == ["friend 1.0 requires foe, which is not installed."]

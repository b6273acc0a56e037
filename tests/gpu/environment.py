"""An environment beside the torch of a machine without network: `gather FOLDER` where there is one, `make PATH FOLDER`.

`gather` fills a folder with the wheels of constraints.txt for Python 3.12 on Linux, 60 MB at most. `make` makes an
environment that sees everything of the Python it is called with, and adds of the folder only what that lacks: nothing
that is there is upgraded.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from tests.gpu.packages import BUILT, GATHERED

REPOSITORY = Path(__file__).parents[2]
MOST_BYTES = 60_000_000
PYTHON_VERSION = "3.12"
PLATFORMS = (
    *("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64"),
    *("manylinux2014_x86_64", "manylinux1_x86_64"),
)
_PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def normal(name: str) -> str:
    """Return the name of a distribution as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(constraints: str, names: Iterable[str]) -> list[str]:
    """Return `NAME==VERSION` of each name, by the text of constraints.txt.

    Raises:
        SystemExit: one has no pin.
    """
    lines = [line.strip() for line in constraints.splitlines() if "==" in line]
    pins = {normal(line.partition("==")[0]): line for line in lines}
    if unknown := [name for name in names if normal(name) not in pins]:
        raise SystemExit(f"constraints.txt does not pin {', '.join(unknown)}; add the version that is tested")
    return [pins[normal(name)] for name in names]


def download_command(folder: Path, requirements: Sequence[str]) -> list[str]:
    """Return the command that fetches wheels for the GPU machine, whatever machine this is."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    abis = [word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)]
    return [
        *(*_PIP, "download", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON_VERSION),
        *("--implementation", "cp", *platforms, *abis, "--dest", str(folder), *requirements),
    ]


def refuse_too_large(folder: Path) -> int:
    """Return the bytes of the wheels in a folder.

    Raises:
        SystemExit: they are more than may travel; names the largest.
    """
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.whl")}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise SystemExit(
            f"{folder} holds {total / 1e6:.1f} MB, at most {MOST_BYTES / 1e6:.0f} may travel; the largest are {told}: "
            "leave one out of GATHERED in tests/gpu/packages.py"
        )
    return total


def gather(folder: Path) -> None:
    """Fill a folder with the wheels, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    constraints = (REPOSITORY / "constraints.txt").read_text()
    subprocess.run(download_command(folder, pinned(constraints, GATHERED)), check=True)
    build = (*_PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    environment = os.environ | {"DS_BUILD_OPS": "0"}
    subprocess.run([*build, *pinned(constraints, [BUILT])], check=True, env=environment)
    if other := [path.name for path in folder.glob(f"{BUILT}*.whl") if not path.name.endswith("-none-any.whl")]:
        raise SystemExit(f"{other[0]} is for this machine's Python only; it was to be built without operations")
    total = refuse_too_large(folder)
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {total / 1e6:.1f} MB; copy it beside the checkout")


def lacking(folder: Path, installed: Collection[str]) -> list[Path]:
    """Return the wheels of a folder whose distribution is not there in any version.

    Args:
        installed: names of distributions, as `normal` has them.
    """
    return [path for path in sorted(folder.glob("*.whl")) if normal(path.name.partition("-")[0]) not in installed]


def make(path: Path, folder: Path) -> None:
    """Make an environment that sees what this Python sees, and install what it lacks."""
    installed = {normal(found.name) for found in importlib.metadata.distributions() if found.name}
    venv.create(path, system_site_packages=True, symlinks=True, clear=True)
    # A Python that is itself of an environment hands on what is below it, and not its own packages.
    places = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
    python = path / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    (own / "beside.pth").write_text("".join(f"{place}\n" for place in sorted(set(places.values()))))
    wheels = lacking(folder, installed)
    if wheels:
        target = ("--target", str(own), "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
        subprocess.run([*_PIP, "install", *target, *map(str, wheels)], check=True)
    names = ", ".join(wheel.name.partition("-")[0] for wheel in wheels)
    print(f"{path}: beside {sys.executable}, with {names or 'nothing more'}")


def main(arguments: list[str]) -> int:
    """Do one of the two."""
    match arguments:
        case ["gather", folder]:
            gather(Path(folder))
        case ["make", path, folder]:
            make(Path(path), Path(folder))
        case _:
            raise SystemExit("usage: python -m tests.gpu.environment gather FOLDER | make PATH FOLDER")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

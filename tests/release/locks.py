"""The lock files: every pin of constraints.txt with the SHA-256 of each of its files, so that pip takes no other bytes.

`requirements.lock` has all but torch, `torch-cpu.lock` torch without CUDA for Linux, `torch-cuda.lock` torch as it is
on the package index with the CUDA libraries that it wants on Linux. Run as `make lock`, this writes them anew.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS, REQUIREMENTS = "constraints.txt", "requirements.lock"
TORCH_CPU, TORCH_CUDA = "torch-cpu.lock", "torch-cuda.lock"
LOCKS = (REQUIREMENTS, TORCH_CPU, TORCH_CUDA)
_PIN = re.compile(r"(?P<name>[\w.-]+)(?P<operator>={2,3})(?P<version>[^\s;]+)(?:\s*;\s*(?P<marker>.+?))?\s*\Z")
_HASH = re.compile(r"\s--hash=sha256:([0-9a-f]{64})(?=\s|\Z)")


@dataclass(frozen=True)
class Pin:
    """One version of one distribution, and the files that may be it."""

    name: str
    version: str
    marker: str = ""
    """On which machines it is wanted; empty is everywhere."""
    hashes: tuple[str, ...] = ()
    operator: str = "=="
    """`===` takes no version with a local part, such as 2.13.0+cpu for 2.13.0."""

    @property
    def text(self) -> str:
        """Return the pin as pip reads it."""
        first = f"{self.name}{self.operator}{self.version}" + (f" ; {self.marker}" if self.marker else "")
        return " \\\n    ".join([first, *(f"--hash=sha256:{digest}" for digest in self.hashes)]) + "\n"


def normalized(name: str) -> str:
    """Return the one spelling that two names of the same distribution share."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(text: str) -> dict[str, Pin]:
    """Return the pins of a lock or of constraints by normalized name.

    Raises:
        ValueError: a line is anything else, or a name stands there twice.
    """
    pins: dict[str, Pin] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = _PIN.match(_HASH.sub("", line))
        if found is None or normalized(found["name"]) in pins:
            raise ValueError(f"no pin, or a second one of the same name: {line}")
        pin = Pin(
            name=normalized(found["name"]),
            version=found["version"],
            marker=found["marker"] or "",
            hashes=tuple(_HASH.findall(line)),
            operator=found["operator"],
        )
        pins[pin.name] = pin
    return pins


def read(name: str, root: Path = ROOT) -> dict[str, Pin]:
    """Return the pins of one of the files."""
    return parse((root / name).read_text())


def renewed(uv: str, root: Path, torch_index: str | None) -> dict[str, str]:
    """Return the new text of each lock file; uv asks the package index for the hashes of all files of a pin.

    Args:
        uv: the program.
        torch_index: where builds of torch without CUDA are. Without it, the hashes that are known of this version stay.
    """
    pins = read(CONSTRAINTS, root)
    torch = pins.pop("torch")
    cuda = _compiled(uv, torch.text, "--constraint", str(root / CONSTRAINTS))
    cuda = {name: pin for name, pin in cuda.items() if name not in pins}
    cuda["torch"] = replace(cuda["torch"], operator="===")
    cpu = Pin("torch", f"{torch.version}+cpu")
    if torch_index:
        cpu = _compiled(uv, cpu.text, "--no-deps", "--default-index", torch_index)["torch"]
    else:
        known = read(TORCH_CPU, root)["torch"]
        if known.version != cpu.version:
            sys.exit(f"{TORCH_CPU} is of torch {known.version}; say where {cpu.version} is: make lock TORCH_INDEX=URL")
        cpu = known
    others = _compiled(uv, "".join(pin.text for pin in pins.values()), "--no-deps")
    return {
        REQUIREMENTS: _file("All pins of constraints.txt but torch, which is in a file of its own.", others),
        TORCH_CPU: _file("torch for Linux without CUDA, from an index that has such builds.", {"torch": cpu}),
        TORCH_CUDA: _file("torch as it is on the package index, and what that wants for a GPU on Linux.", cuda),
    }


def _compiled(uv: str, requirements: str, *options: str) -> dict[str, Pin]:
    command = [uv, "--quiet", "pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--no-config", *options, "-"]
    done = subprocess.run(command, input=requirements, stdout=subprocess.PIPE, text=True, check=True)
    return parse(done.stdout)


def _file(title: str, pins: dict[str, Pin]) -> str:
    note = f"# {title} Written by `make lock`.\n"
    return note + "".join(pins[name].text for name in sorted(pins))


def main() -> None:
    """Write the lock files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("uv", help="the program")
    parser.add_argument("--torch-index", help="URL of an index with builds of torch without CUDA")
    arguments = parser.parse_args()
    for name, text in renewed(arguments.uv, ROOT, arguments.torch_index).items():
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    main()

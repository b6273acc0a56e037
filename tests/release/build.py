"""Builds a release of the commit at hand into dist/, the same bytes each time, and publishes nothing: `make release`.

dist/ has the wheel, the source distribution, the bill of materials and SHA256SUMS of the three.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.release.bill import bill_of_materials
from tests.release.locks import ROOT

BUILD = """
import os, sys
from setuptools import build_meta
os.umask(0o022)
folder = sys.argv[1]  # which setuptools takes away
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""


def git(root: Path, *arguments: str) -> bytes:
    """Return what git says."""
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, stdout=subprocess.PIPE).stdout


def version_of(root: Path) -> str:
    """Return the version, which stands in harness/__init__.py and nowhere else."""
    for statement in ast.parse((root / "harness/__init__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__version__":
            return str(ast.literal_eval(statement.value))
    raise LookupError(f"{root}/harness/__init__.py has no __version__")


def refusals(root: Path) -> list[str]:
    """Return a sentence for each reason not to release the commit at hand."""
    found = []
    if changed := git(root, "status", "--porcelain").decode().splitlines():
        found.append(f"{len(changed)} files are not as they were committed: {', '.join(sorted(changed)[:5])}")
    version = version_of(root)
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", (root / "CHANGELOG.md").read_text(), re.M):
        found.append(f"CHANGELOG.md has no line '## {version} (YEAR-MONTH-DAY)', with the day of the release")
    return found


def build(root: Path, to: Path) -> list[Path]:
    """Build the commit at hand into a new folder; return the files.

    Whatever is not committed is no part of it, and no time but that of the commit.
    """
    commit = git(root, "rev-parse", "HEAD").decode().strip()
    epoch = int(git(root, "log", "-1", "--format=%ct"))
    to.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        with tarfile.open(fileobj=io.BytesIO(git(root, "archive", "HEAD"))) as archive:
            archive.extractall(source, filter="data")
        command = [sys.executable, "-c", BUILD, scratch]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"setuptools could not build it:\n{done.stderr}")
        (sdist,) = Path(scratch).glob("*.tar.gz")
        (wheel,) = Path(scratch).glob("*.whl")
        (to / sdist.name).write_bytes(repacked(sdist.read_bytes(), epoch))
        shutil.copyfile(wheel, to / wheel.name)
    version = version_of(root)
    if wheel.name.split("-")[1] != version:
        raise RuntimeError(f"{wheel.name} is not of version {version}, which harness/__init__.py has")
    files = [to / wheel.name, to / sdist.name]
    digests = {path.name: _sha256(path) for path in files}
    bill = bill_of_materials(root, version=version, commit=commit, epoch=epoch, files=digests)
    files.append(to / f"harness_train-{version}.cdx.json")
    files[-1].write_text(json.dumps(bill, indent=1) + "\n")
    sums = to / "SHA256SUMS"
    sums.write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in files))
    return [*files, sums]


def repacked(archive: bytes, epoch: int) -> bytes:
    """Return a .tar.gz with the same files, in the order of their names, of nobody and of one time."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as before,
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=epoch) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member in sorted(before.getmembers(), key=lambda member: member.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = epoch
            member.pax_headers = {}
            after.addfile(member, before.extractfile(member) if member.isreg() else None)
    return packed.getvalue()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(root: Path = ROOT) -> None:
    """Build into dist/, or end with 1 and say why not."""
    if found := refusals(root):
        sys.exit("\n".join(["No release is built:", *found]))
    dist = root / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for path in build(root, dist):
        print(f"dist/{path.name}")


if __name__ == "__main__":
    main()

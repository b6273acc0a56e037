"""Looks at a node before its ranks start: what is wrong with it is told with its name, before hours are lost.

Needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from harness.ranks.visible_gpus import count_visible_gpus

EXIT_BAD_NODE = 76
"""Of a task whose node failed; launch/slurm/job.py then leaves that node out."""
PREFLIGHT_FAILED = "preflight-failed"
"""A file beside an attempt's logs: srun ends with the code of the tasks that it killed for a bad one, not with 76."""
MIN_FREE_BYTES = {"disk": 2**30, "shared memory": 2**26}
USED_FILES = "use.json"
"""Beside the configuration of a job: the files of the user that it brings, with their SHA-256."""
PACKAGES = ("torch", "accelerate", "datasets", "safetensors", "pydantic", "yaml")
NVIDIA_SMI_TIMEOUT_SECONDS = 60
ROLL_CALL_MODULE = "harness.ranks.roll_call"
"""What the nodes of a job run before their ranks."""


def used_file_problems(listed: Path) -> Iterator[str]:
    """Yield a sentence for each file whose code a run brings and that is another on this node, or is not there."""
    if not listed.exists():
        return
    for entry in json.loads(listed.read_bytes()):
        path, wanted = Path(entry["file"]), entry["sha256"]
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            yield f"{path}, which the run uses, cannot be read ({error.strerror or error})"
            continue
        if found != wanted:
            yield f"{path} is not the file that was submitted (sha256 {found[:12]}, not {wanted[:12]}); submit again"


def node_problems(run_directory: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for everything that would keep ranks from training here.

    Args:
        environment: SLURM_GPUS_ON_NODE says how many GPUs there must be.
    """
    scratch = environment.get("TMPDIR") or tempfile.gettempdir()  # which passes over a TMPDIR that cannot be written
    folders = {run_directory: "disk", Path(scratch): "disk", Path("/dev/shm"): "shared memory"}
    for folder, kind in folders.items():
        yield from _folder_problems(folder, kind)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        yield f"python cannot import {', '.join(missing)}"
    wanted = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    program = shutil.which("nvidia-smi")
    if wanted and program:
        yield from _gpu_problems(program, wanted, environment.get("CUDA_VISIBLE_DEVICES"))


def _folder_problems(folder: Path, kind: str) -> Iterator[str]:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror or error})"
        return
    if free < MIN_FREE_BYTES[kind]:
        yield f"{folder} has {free:,} bytes of {kind} free, wanted {MIN_FREE_BYTES[kind]:,}"


def _gpu_problems(program: str, wanted: int, visible_devices: str | None) -> Iterator[str]:
    listing = _ask(program, "-L")
    found = count_visible_gpus(listing, visible_devices)
    if found != wanted:
        said = "" if listing.startswith("GPU ") or not listing.strip() else f" ({listing.split(chr(10))[0].strip()})"
        yield f"nvidia-smi shows {found} GPUs, Slurm gave this node {wanted}{said}"
    query = ("--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")
    for line in _ask(program, *query).splitlines():
        index, _, errors = line.partition(",")
        if errors.strip().isdecimal() and int(errors) > 0:
            yield f"GPU {index} has {int(errors)} uncorrected memory errors (ECC) since it was started"


def _ask(program: str, *options: str) -> str:
    try:
        done = subprocess.run(
            [program, *options], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} failed: {error}"
    return done.stdout + done.stderr


def bad_node_file(logs: Path, node: str) -> Path:
    """Return where the problems of a node are written, for launch/slurm/job.py to read."""
    return logs / f"bad-{node}.txt"


def bad_nodes(logs: Path) -> dict[str, str]:
    """Return the nodes of an attempt that had problems, with these."""
    files = sorted(logs.glob("bad-*.txt"))
    return {file.stem.removeprefix("bad-"): " ".join(file.read_text().split("\n")).strip() for file in files}


def node_name(environment: Mapping[str, str]) -> str:
    """Return what Slurm calls this node."""
    return environment.get("SLURMD_NODENAME") or os.uname().nodename

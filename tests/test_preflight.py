"""A node is looked at before its ranks start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.launch.slurm import preflight
from harness.launch.slurm.preflight import bad_node_file, bad_nodes, node_problems

SMI = """#!/bin/sh
if [ "$1" = -L ]; then
    echo 'GPU 0: NVIDIA H100 (UUID: GPU-aaaa)'
    echo 'GPU 1: NVIDIA H100 (UUID: GPU-bbbb)'
else
    echo '0, 0'
    echo '1, ERRORS'
fi
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(script: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


def test_this_machine_can_train(tmp_path: Path) -> None:
    assert list(node_problems(tmp_path, {})) == []


def test_a_folder_that_is_full_or_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = list(node_problems(tmp_path / "nowhere", {}))
    assert problems == [f"{tmp_path}/nowhere cannot be written (No such file or directory)"]
    monkeypatch.setattr(preflight, "MIN_FREE_BYTES", {"disk": 2**60, "shared memory": 2**60})
    problems = list(node_problems(tmp_path, {}))
    assert problems[0].startswith(f"{tmp_path} has ")
    assert "bytes of shared memory free, wanted 1,152,921,504,606,846,976" in problems[2]


def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PACKAGES", ("torch", "no_such_package"))
    assert list(node_problems(tmp_path, {})) == ["python cannot import no_such_package"]


@pytest.mark.parametrize(
    ("errors", "environment", "problems"),
    [
        ("0", {"SLURM_GPUS_ON_NODE": "2"}, []),
        ("[N/A]", {"SLURM_GPUS_ON_NODE": "2"}, []),  # a GPU without ECC
        ("0", {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "1"}, []),
        ("0", {}, []),  # a job of CPU ranks does not look at them
        ("0", {"SLURM_GPUS_ON_NODE": "8"}, ["nvidia-smi shows 2 GPUs, Slurm gave this node 8"]),
        ("3", {"SLURM_GPUS_ON_NODE": "2"}, ["GPU 1 has 3 uncorrected memory errors (ECC) since it was started"]),
    ],
)
def test_gpus_are_counted_and_their_memory_is_looked_at(
    tmp_path: Path,
    nvidia_smi: Callable[[str], None],
    errors: str,
    environment: dict[str, str],
    problems: list[str],
) -> None:
    nvidia_smi(SMI.replace("ERRORS", errors))
    assert list(node_problems(tmp_path, environment)) == problems


def test_a_driver_that_does_not_answer_is_quoted(tmp_path: Path, nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("#!/bin/sh\necho 'Unable to determine the device handle'; exit 15\n")
    (problem,) = node_problems(tmp_path, {"SLURM_GPUS_ON_NODE": "4"})
    assert problem == "nvidia-smi shows 0 GPUs, Slurm gave this node 4 (Unable to determine the device handle)"


def test_what_a_node_writes_is_what_the_job_reads(tmp_path: Path) -> None:
    bad_node_file(tmp_path, "node-7").write_text("a; b")
    assert bad_nodes(tmp_path) == {"node-7": "a; b"}
    assert bad_nodes(tmp_path / "nowhere") == {}

"""What other launchers have left in the environment changes no bit: RANK and WORLD_SIZE say who the ranks are."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from harness.ranks.env import Placement
from harness.ranks.join import _meet
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main
from tests.helpers import plain_ledger, write_small_table

pytestmark = pytest.mark.slow

STRAY = {
    "mpirun": {
        **{f"OMPI_COMM_WORLD_{name}": "0" for name in ("RANK", "LOCAL_RANK")},
        **{f"OMPI_COMM_WORLD_{name}": "1" for name in ("SIZE", "LOCAL_SIZE")},
    },
    "mpich": {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
    "mvapich": {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "1", "MV2_COMM_WORLD_LOCAL_RANK": "0"},
    "accelerate": {
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    },
    "slurm": {"SLURM_RESTART_COUNT": "", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
}


def test_ranks_of_another_attempt_find_nothing_that_the_first_has_left_in_the_store_of_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent.port, "RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    first, again, second = (_meet(Placement(0, 2, attempt=n), timeout=timedelta(seconds=5)) for n in (0, 0, 1))
    first.set("address of rank 1", "a port that nobody listens on any more")
    assert again.check(["address of rank 1"])
    assert not second.check(["address of rank 1"])


def train_among(variables: dict[str, str], *arguments: str) -> int:
    os.environ.update(variables)
    return train_main(*arguments)


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_variables_of_other_launchers_change_no_bit_of_a_run(strategy: str, tmp_path: Path) -> None:
    config = write_small_table(tmp_path, name="clean", strategy={"kind": strategy})
    common = (str(config), "run.max_epochs=1", f"run.output_root={tmp_path}", f"data.path={tmp_path / 'rows.csv'}")
    assert run_ranks(2, train_among, {}, *common) == [0, 0]
    wanted = plain_ledger(tmp_path / "clean/ledger.jsonl")
    for launcher, variables in STRAY.items():
        assert run_ranks(2, train_among, variables, *common, f"run.name={launcher}") == [0, 0], launcher
        assert plain_ledger(tmp_path / launcher / "ledger.jsonl") == wanted, launcher

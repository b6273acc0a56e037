"""Shared by all tests."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.suite"]
# Other workers compute beside a test, and how long an example takes says nothing.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
torch.set_num_threads(1)  # ranks of distributed tests run beside this process
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of `pytest &` in a script; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of the session have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def prepared_data(shared_folder: Path) -> Path:
    """The folder that the data of the examples are prepared in; HARNESS_DATA_ROOT keeps it between sessions.

    No lock is needed: each name is prepared by one file alone, and a file is one worker's.
    """
    return Path(os.environ.get("HARNESS_DATA_ROOT") or shared_folder / "data")


@pytest.fixture(scope="session")
def real_runs(shared_folder: Path) -> Path:
    """A folder with runs of a small network: `steady`, `other` with another rate, and `restarted`, killed once."""
    folder = shared_folder / "real-runs"
    with FileLock(f"{folder}.lock"):
        if not (folder / "are-made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # where another worker could not make them
            folder.mkdir()
            make_real_runs(folder)
            (folder / "are-made").touch()
    return folder


def make_real_runs(folder: Path) -> None:
    """Train them."""
    numbers = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [f"{a:.4f},{b:.4f},{c:.4f},{3 * a - b + 0.1 * c:.4f}" for a, b, c in numbers]
    (folder / "rows.csv").write_text("\n".join(["a,b,c,y", *rows]))
    config = {
        "run": {"name": "steady", "output_root": str(folder), "max_steps": 120},
        "model": {"kind": "mlp", "hidden": [8, 8]},
        "data": {"source": "csv", "path": str(folder / "rows.csv"), "targets": ["y"], "global_batch": 16},
        "task": {"kind": "regression"},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
        "schedule": {"kind": "cosine", "warmup_steps": 10},
        "clip": {"kind": "norm", "max_norm": 0.5},
        "evaluation": {"every_steps": 20},
        "checkpoint": {"every_steps": 40, "asynchronous": False},
        "tracking": {"log_every_steps": 4},
        "diagnostics": {"every_steps": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(config))
    run_to_the_end(path)
    run_to_the_end(path, "run.name=other", "optim.peak_lr=0.003", "clip.max_norm=0.2")
    kill_after(95, path, "run.name=restarted")
    run_to_the_end(path, "run.name=restarted")


def run_to_the_end(config: Path, *overrides: str) -> None:
    """Train, as `python -m harness.train` does."""
    from tests.distributed.ranks import run_ranks
    from tests.distributed.scenarios import train_main

    assert run_ranks(1, train_main, str(config), *overrides) == [0]


def kill_after(step: int, config: Path, *overrides: str) -> None:
    """Train until the ledger has this step, then die of SIGKILL."""
    from tests.distributed.ranks import free_port, start_rank

    process, connection = start_rank(0, 1, free_port(), train_and_die, (step, str(config), *overrides))
    process.join(60)
    connection.close()
    assert process.exitcode == -signal.SIGKILL


def train_and_die(step: int, *arguments: str) -> int:
    """Train, and kill this process as soon as the ledger has `step`."""
    from harness.observers.ledger import Ledger
    from harness.train import main

    settle = Ledger.on_settled

    def settle_and_die(ledger: Ledger) -> None:
        last = ledger._lines[-1]["step"] if ledger._lines else 0
        settle(ledger)
        if last >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.on_settled = settle_and_die  # type: ignore[method-assign]
    return main(list(arguments))

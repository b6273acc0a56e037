"""Plain torchrun on two machines, no Slurm: two network namespaces with a cable between them, an agent in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.record.json_lines import read_lines
from tests.distributed.ranks import run_ranks
from tests.helpers import plain_ledger, wait_until
from tests.slurm.jobs import train_in

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable"


class Machines:
    """Two network namespaces; the first keeps the rendezvous."""

    def __init__(self, folder: Path) -> None:
        self._names = [f"harness-{os.getpid()}-{index}" for index in (1, 2)]
        self.folder = folder
        self._agents: list[subprocess.Popen[bytes]] = []

    def connect(self) -> None:
        for name in self._names:
            _ip("netns", "add", name)
        first, second = self._names
        _ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-netns", name, "address", "add", f"{address}/24", "dev", CABLE)
            for interface in ("lo", CABLE):
                _ip("-netns", name, "link", "set", interface, "up")

    def unplug(self) -> None:
        _ip("-netns", self._names[1], "link", "set", CABLE, "down")

    def plug_in(self) -> None:
        _ip("-netns", self._names[1], "link", "set", CABLE, "up")

    def end(self) -> None:
        """Kill what still runs."""
        for agent in self._agents:
            agent.kill()  # its ranks die with it
            agent.wait(timeout=20)
        self._agents.clear()

    def remove(self) -> None:
        self.end()
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def torchrun(self, *overrides: str) -> list[subprocess.Popen[bytes]]:
        """Start an agent with one rank on each machine."""
        environment = {
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE, "PYTHONPATH": str(ROOT)},
            "TMPDIR": str(self.folder),  # torchrun leaves a folder there
        }
        agents = []
        for name, address in zip(self._names, ADDRESSES, strict=True):
            command = [
                *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"),
                *("--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--local-addr", address),
                # torchrun finds the host of the rendezvous by its name, and both machines have that of this one.
                *("--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}"),
                *("-m", "harness.train", "run.yaml", *overrides),
            ]
            with (self.folder / f"{name}.log").open("ab") as log:
                agents.append(subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log))
        self._agents += agents
        return agents

    def story(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        if os.environ.get("HARNESS_REQUIRE_SLURM"):
            pytest.fail("network namespaces are required here: root, and apt-get install iproute2")
        pytest.skip("network namespaces want root, and apt-get install iproute2")
    rows = "".join(f"{i % 7 - 3},{i % 11 - 5},{(i % 7 - 3) * 0.5 - (i % 11 - 5) * 0.25}\n" for i in range(256))
    (tmp_path / "rows.csv").write_text("a,b,y\n" + rows)
    config = {
        "run": {"name": "two", "output_root": "runs", "max_steps": 60},
        "model": {"kind": "mlp", "hidden": [16], "dropout": 0.1},
        "data": {"source": "csv", "path": "rows.csv", "targets": ["y"], "global_batch": 16},
        "task": {"kind": "regression"},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
        "evaluation": {"every_steps": 20},
        "checkpoint": {"every_steps": 20},
        "strategy": {"kind": "ddp", "collective_timeout_seconds": 20},
        "tracking": {"report": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    machines = Machines(tmp_path)
    try:
        machines.connect()
        yield machines
    finally:
        machines.remove()


def test_two_machines_train_to_the_ledger_of_one_also_after_the_cable_was_pulled(machines: Machines) -> None:
    agents = machines.torchrun("run.max_steps=1000000")
    run = machines.folder / "runs/two"
    wait_until((run / "checkpoints/step-00000040/COMMIT.json").exists, "two saves", seconds=180)
    machines.unplug()
    assert agents[0].wait(timeout=180) != 0, machines.story()
    assert '"code": 7' in (run / "exit.json").read_text(), machines.story()
    machines.end()  # the other agent waits five minutes for the rendezvous
    machines.plug_in()
    steps = max(line["step"] for line in read_lines(run / "ledger.jsonl")) + 20
    agents = machines.torchrun(f"run.max_steps={steps}")
    assert [agent.wait(timeout=180) for agent in agents] == [0, 0], machines.story()
    started = [line for line in read_lines(run / "events.jsonl") if line["event"] == "started"]
    assert [line["world_size"] for line in started] == [2, 2]
    assert started[1]["step"] >= 40
    overrides = ("run.output_root=one", f"run.max_steps={steps}")
    assert run_ranks(2, train_in, machines.folder, *overrides, deadline_seconds=180) == [0, 0]
    assert plain_ledger(run / "ledger.jsonl") == plain_ledger(machines.folder / "one/two/ledger.jsonl")

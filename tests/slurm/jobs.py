"""Runs as jobs of the live cluster: submitted by `harness submit`, watched through Slurm and the run directory."""

from __future__ import annotations

import getpass
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from harness.launch import cli
from harness.launch.slurm.client import field
from harness.record.json_lines import read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main
from tests.helpers import plain_ledger, wait_until
from tests.slurm.cluster import SlurmCluster

KILL = int(signal.SIGKILL)
LONG = "run.max_steps=10000000"
CLUSTER = {
    "gpus_per_node": 0,
    "ranks_per_node": 1,
    "cpus_per_rank": 1,
    "nodes": 1,
    "time_limit_minutes": 30,
    "style": "srun",
}


class Site:
    """The cluster as a user sees it, from one folder."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "rows.csv").write_text(_rows(1024))
        config = {
            "run": {"name": "tiny", "output_root": "runs", "max_steps": 400},
            "model": {"kind": "mlp", "hidden": [64, 64]},
            "data": {"source": "csv", "path": "rows.csv", "targets": ["y"], "global_batch": 64},
            "task": {"kind": "regression"},
            "optim": {"kind": "sgd", "peak_lr": 0.01, "momentum": 0.9},
            "evaluation": {"every_steps": 200},
            "checkpoint": {"every_steps": 200},
            "tracking": {"report": False},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(config))

    def submit(self, name: str, *overrides: str, options: tuple[str, ...] = (), **cluster: Any) -> Run:
        """Submit the run under a name, with `cluster` in the place of the facts above."""
        self._submit(name, *overrides, options=options, **cluster)
        return Run(self.cluster, self.folder / "runs" / name)

    def submit_sweep(self, name: str, *, options: tuple[str, ...]) -> str:
        """Submit a sweep and return the number of its array."""
        self._submit(name, options=options)
        newest = max(self.folder.glob(f"runs/{name}/*/events.jsonl"), key=lambda path: path.stat().st_mtime)
        submitted = [line for line in read_lines(newest) if line["event"] == "submitted"]
        return str(submitted[-1]["job"]).partition("_")[0]

    def _submit(self, name: str, *overrides: str, options: tuple[str, ...] = (), **cluster: Any) -> None:
        path = self.folder / f"{name}-cluster.yaml"
        path.write_text(yaml.safe_dump(CLUSTER | cluster))
        arguments = ["run.yaml", "--cluster", str(path), *options, f"run.name={name}", *overrides]
        code = cli.main(["submit", *arguments])
        assert code == 0, f"harness submit {arguments} ended with {code}"

    def undisturbed(self, name: str, *overrides: str, ranks: int) -> list[dict[str, Any]]:
        """Train the run on so many ranks of this machine, without Slurm; return its ledger."""
        codes = run_ranks(ranks, train_in, self.folder, f"run.name={name}", *overrides, deadline_seconds=240)
        assert codes == [0] * ranks
        return plain_ledger(self.folder / "runs" / name / "ledger.jsonl")

    def cancel_all(self) -> None:
        """Leave nothing on the cluster."""
        user = getpass.getuser()
        self.cluster.ask("scancel", "--user", user)
        self.cluster.ask("scancel", "--state=PENDING", "--user", user)
        wait_until(lambda: not self.cluster.ask("squeue", "--noheader"), "an empty queue")


class Run:
    """A run that is trained by a job."""

    def __init__(self, cluster: SlurmCluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.job = str(self.events("submitted")[-1]["job"])

    # ------------------------------------------------------------ what Slurm says

    def shown(self, name: str) -> str:
        """Return a value of `scontrol show job`."""
        return field(self.cluster.ask("scontrol", "show", "job", "--oneliner", self.job), name) or ""

    @property
    def restarts(self) -> int:
        return int(self.shown("Restarts"))

    def ends_as(self, state: str, *, seconds: float = 240) -> None:
        """Wait until the job has ended for good, in this state."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.wait_for(lambda: self.shown("JobState") in ended, f"the end of job {self.job}", seconds=seconds)
        found = self.shown("JobState")
        assert found == state, self.story()

    def signal(self, name: str) -> None:
        """Send the ranks a signal, as Slurm does before the time limit."""
        self.cluster.ask("scancel", f"--signal={name}", self.job)

    def kill_rank(self, number: int = KILL) -> None:
        """Kill one rank of the run, as the kernel does when memory runs out, or send it another signal."""
        config = str(self.directory / "slurm" / "config.yaml").encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            starters = {b"srun", b"harness.launch.slurm.node"}
            if b"harness.train" in words and config in words and starters.isdisjoint(words):
                os.kill(int(path.parent.name), number)
                return
        raise AssertionError(f"no rank of {self.directory} runs\n{self.story()}")

    def finish_soon(self) -> None:
        """Have the next attempt end after a few more updates."""
        config = self.directory / "slurm" / "config.yaml"
        config.write_text(re.sub("max_steps: [0-9]+", f"max_steps: {self.step() + 10}", config.read_text()))

    def requeue(self) -> None:
        """Queue the job again by hand."""
        self.cluster.ask("scontrol", "requeue", self.job)

    # ------------------------------------------------------------ what the run directory says

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the events of a kind so far."""
        path = self.directory / "events.jsonl"
        return [line for line in read_lines(path) if line["event"] == event] if path.exists() else []

    def ledger(self) -> list[dict[str, Any]]:
        """Return the lines of the ledger, without what a clock measured."""
        return plain_ledger(self.directory / "ledger.jsonl")

    @property
    def exit_file(self) -> Path:
        return self.directory / "exit.json"

    @property
    def exit_code(self) -> int:
        return int(json.loads(self.exit_file.read_text())["code"])

    def causes(self) -> list[tuple[int, str]]:
        """Return the exit code and what was done about it, of every attempt."""
        return [(line["code"], line["action"]) for line in self.events("job ended")]

    def step(self) -> int:
        """Return the last update in the ledger."""
        path = self.directory / "ledger.jsonl"
        tail = path.read_bytes().splitlines()[-1:] if path.exists() else []
        return int(json.loads(tail[0])["step"]) if tail else 0

    def log(self, restart: int, rank: int) -> str:
        """Return what a rank said in an attempt."""
        return (self.directory / "logs" / self.job / f"r{restart}" / f"rank-{rank}.log").read_text()

    def wait_for(self, is_so: Callable[[], object], what: str, *, seconds: float = 90) -> None:
        """Wait for something of this run; a failure tells all it knows."""
        try:
            wait_until(is_so, what, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def wait_for_step(self, step: int) -> None:
        """Wait until so many updates were made."""
        self.wait_for(lambda: self.step() >= step, f"update {step}")

    def wait_for_attempt(self, restart: int) -> None:
        """Wait until the ranks of an attempt are being started."""
        folder = self.directory / "logs" / self.job / f"r{restart}"
        self.wait_for(lambda: any(folder.glob("*.log")), f"attempt {restart}")

    def story(self) -> str:
        """Return everything that the run directory tells in text."""
        logs = sorted(self.directory.glob("logs/**/*.log"))
        events = (self.directory / "events.jsonl").read_text()
        return "\n".join(
            [self.cluster.ask("squeue"), events, *(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)]
        )


def interrupt(run: Run, numbers: random.Random, *, times: int) -> None:
    """Send the ranks of a run the signal that comes before the time limit, in so many attempts, at any moment.

    Every other time, by chance, that is after training has begun, which may be long after the first process has.
    """
    for restart in range(times):
        run.wait_for_attempt(restart)
        if numbers.random() < 0.5:
            run.wait_for(lambda: len(run.events("started")) > restart, f"attempt {restart} to train")  # noqa: B023
        time.sleep(numbers.uniform(0.5, 5))
        run.signal("USR1")
        run.wait_for(lambda: len(run.events("job ended")) == restart + 1, f"the end of attempt {restart}")  # noqa: B023


def train_in(folder: Path, *overrides: str) -> int:
    """Train the run of a folder, as one rank."""
    os.chdir(folder)
    return train_main("run.yaml", *overrides)


def _rows(count: int) -> str:
    numbers = random.Random(0)
    rows = [[numbers.uniform(-1, 1) for _ in range(4)] for _ in range(count)]
    return "a,b,c,d,y\n" + "".join(f"{','.join(map(str, row))},{sum(row):.6f}\n" for row in rows)

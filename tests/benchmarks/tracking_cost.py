"""What tracking costs a run: wandb, offline and with a server that dies half-way, against none: `make bench`.

All train the same network in one process and in turn, with a ledger; a second round without tracking shows the noise.
What the tracker's own processes use is shown beside it: on a machine with idle cores it costs the training nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch

from harness.assemble import assemble
from harness.config.tracking import Tracking, Wandb
from harness.loop import fit
from harness.observers.base import Line, Observer, Observers
from harness.observers.ledger import Ledger
from harness.record.run_directory import RunDirectory
from harness.rows.splits import DataSplits
from harness.state import TrainState
from harness.stopping import StopSignals
from harness.tracking.build import start_trackers
from harness.tracking.sidecar import Sidecar
from tests.benchmarks.step_cost import LOG_EVERY, WORKLOADS, Clock, columns_of, config_of
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import join
from tests.sections import build_model

STEP_SECONDS = 0.010
"""The update that the promise is made for."""
UPDATES = 100
REPEATS = 2_000


def measure(rounds: int, directory: str) -> dict[str, Any]:
    """Return seconds an update of every contender in every round, and what telling a tracker costs."""
    workload, ranks = {**WORKLOADS["mnist cnn"], "updates": UPDATES}, join()
    columns = columns_of(workload, 32 * 64)
    splits = DataSplits(columns, columns, workload["shape"], 10)
    os.environ |= {"HOME": directory, "WANDB_API_KEY": 40 * "0", "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}

    def train(name: str, wandb: Wandb | None) -> dict[str, Any]:
        with DyingServer() if wandb and wandb.mode == "online" else nullcontext() as server:
            return train_with(server, name, wandb)

    def train_with(server: DyingServer | None, name: str, wandb: Wandb | None) -> dict[str, Any]:
        base = config_of(workload, 1)
        run_section = base.run.model_copy(update={"name": name, "output_root": directory})
        tracking = Tracking(log_every_steps=LOG_EVERY, wandb=wandb)
        config = base.model_copy(update={"run": run_section, "tracking": tracking})
        torch.manual_seed(0)
        model = build_model(config.model, input_shape=splits.input_shape, num_outputs=splits.num_outputs)
        with RunDirectory(config) as directory_of_run:
            directory_of_run.describe()
            before = os.times()
            trackers = start_trackers(tracking, directory_of_run)
            run = assemble(config, ranks, splits, model, directory=directory_of_run.path, signals=StopSignals())
            clock = Clock()
            run.observers = Observers(
                [Ledger(directory_of_run.path, keep_bytes=0), clock, *trackers, *([server] if server else [])]
            )
            run.agenda.updates_until_vote, run.agenda.seconds_per_update = 10**9, 1e-9
            run.checkpoints.begin = lambda *_, **__: None  # type: ignore[method-assign]
            for tracker in trackers:
                wait_until_open(tracker)
                tracker.follow()
                tracker._close_seconds = 2.0  # of a dead server nothing is to be waited for here
            opened = sum(cpu_of_process_and_children(tracker._process.pid) for tracker in trackers if tracker._process)
            fit(run, TrainState())
            told = cost_of_telling(trackers) if trackers else (0.0, 0.0)
            run.observers.close()  # the tracker's processes have ended, so their time is known
        (wall, cpu), (wall_end, cpu_end) = clock.stamps[0], clock.stamps[-1]
        after, updates = os.times(), UPDATES - LOG_EVERY
        ended = after.children_user + after.children_system - before.children_user - before.children_system
        stamps = [wall for wall, _ in clock.stamps]
        return {
            "intervals": [after - before for before, after in pairwise(stamps)],
            "wall": (wall_end - wall) / updates,
            "cpu": (cpu_end - cpu) / updates,
            "tracker start": opened,
            "tracker cpu": (ended - opened) / UPDATES,
            "due": told[0],
            "not due": told[1],
        }

    contenders: dict[str, Callable[[str], dict[str, Any]]] = {
        "none": lambda name: train(f"a-{name}", None),
        "wandb": lambda name: train(f"b-{name}", Wandb()),
        "server dies": lambda name: train(f"c-{name}", Wandb(mode="online")),
        "none again": lambda name: train(f"d-{name}", None),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names[number % 4 :] + names[: number % 4]:
            figures = contenders[name](str(number))
            if number:  # the first round is a warm-up
                found[name].append(figures)
    return found


class DyingServer(Observer):
    """A stand-in for wandb's server, in a process of its own that is killed half-way."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.wandb_server"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        os.environ["WANDB_BASE_URL"] = self._process.stdout.readline().strip()
        return self

    def on_update(self, line: Line) -> None:
        if line["step"] == UPDATES // 2:
            self._process.kill()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def wait_until_open(tracker: Sidecar) -> None:
    """Wait for the tracker's first sentence, so that what is measured is a run under way, not its start."""
    while not tracker.news():
        time.sleep(0.01)


def cpu_of_process_and_children(pid: int) -> float:
    """Return the CPU seconds that a process and its descendants have used, those that have ended among them."""
    seconds, parents = dict[int, float](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(path.parent.name)] = int(fields[1])
        seconds[int(path.parent.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    family = {pid}
    for _ in range(8):
        family |= {child for child, parent in parents.items() if parent in family}
    return sum(seconds.get(member, 0.0) for member in family)


def cost_of_telling(trackers: list[Sidecar]) -> tuple[float, float]:
    """Return the CPU seconds that the training's own thread spends on trackers at a step that is due and at another."""
    observers, line = Observers(trackers), {"event": "update", "step": 1}

    def not_due() -> None:
        observers.updated(line)

    def due() -> None:
        observers.updated(line)
        observers.settled()

    return cpu_seconds(due), cpu_seconds(not_due)


def cpu_seconds(call: Callable[[], None]) -> float:
    """Return the CPU seconds of this thread that a call takes; others on the machine do not count."""
    began = time.thread_time()
    for _ in range(REPEATS):
        call()
    return (time.thread_time() - began) / REPEATS


def main() -> None:
    """Print the figures, and whether the promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        (found,) = run_ranks(1, measure, rounds, directory, deadline_seconds=1500)

    def median(name: str, key: str) -> float:
        return statistics.median(figures[key] for figures in found[name])

    def ratio(name: str, key: str) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(found[name], found["none"], strict=True))

    def slowest(name: str) -> float:
        """The largest ratio of any interval's median to that of the same interval without tracking."""
        medians = [
            [statistics.median(walls) for walls in zip(*(figures["intervals"] for figures in found[one]), strict=True)]
            for one in (name, "none")
        ]
        return max(a / b for a, b in zip(*medians, strict=True))

    print(f"{rounds} rounds of {UPDATES} updates, medians; mnist cnn, 1 rank, {os.cpu_count()} cores; "
          f"wandb, a row every {LOG_EVERY} steps")  # fmt: skip
    print(f"{'':12}{'wall us':>10}{'CPU us':>10}{'wall ratio':>12}{'CPU ratio':>12}{'slowest':>9}  (an update; "
          f"slowest: wall ratio of the slowest {LOG_EVERY})")  # fmt: skip
    for name in found:
        print(f"{name:12}{1e6 * median(name, 'wall'):>10.0f}{1e6 * median(name, 'cpu'):>10.0f}"
              f"{ratio(name, 'wall'):>12.3f}{ratio(name, 'cpu'):>12.3f}{slowest(name):>9.3f}")  # fmt: skip
    print(
        f"beside it, in the tracker's processes: {median('wandb', 'tracker start'):.2f} s of CPU to start, then "
        f"{1e6 * median('wandb', 'tracker cpu'):.0f} us an update"
    )
    for name in ("due", "not due"):
        seconds = median("wandb", name)
        print(f"in the training's thread, a step that is {name}: {1e6 * seconds:.2f} us, "
              f"{100 * seconds / STEP_SECONDS:.4f} % of a {1e3 * STEP_SECONDS:.0f} ms step")  # fmt: skip


if __name__ == "__main__":
    main()

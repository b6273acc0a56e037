"""Kills every rank after every update of a run, starts it again each time, and compares it with one left alone.

A chain of launches: each resumes from where the one before was killed, makes one update more (or some, where not every
cut point is asked for), and is killed as soon as its checkpoint is published. So what is forgotten at any cut point
stays in the ledger and in the weights.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.ranks.group import Ranks
from tests.distributed.ranks import free_port, run_ranks, start_rank
from tests.distributed.scenarios import train_main
from tests.helpers import plain_ledger, write_config

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "hidden": [16, 16], "norm": "batch", "dropout": 0.3},
    "cnn": {"kind": "cnn", "channels": [4, 8], "hidden": [16], "dropout": 0.2},
    "gpt": {"kind": "gpt", "layers": 2, "width": 16, "heads": 2, "dropout": 0.2},
}
WORLD_SIZES = (1, 2, 8)
UPDATES = 10
"""Two and a half epochs of 64 rows in batches of 16."""
EVERY_CUT = range(1, UPDATES)
"""The updates that a run can be killed after."""
BLOCK = 6
"""Bytes of a row of gpt."""


def write_data(folder: Path) -> None:
    """Eighty small images of two classes, and as many blocks of text."""
    chance = np.random.default_rng(0)
    letters = chance.choice(list("abcd "), 80 * BLOCK + 2)  # the target of a last byte is one more, on either side
    (folder / "text.txt").write_text("".join(letters))
    for label in ("dark", "light"):
        (folder / "images" / label).mkdir(parents=True)
        for index in range(40):
            pixels = chance.integers(0, 200, (8, 8), dtype=np.uint8) + (50 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / label / f"{index}.png")


def config_of(folder: Path, *, model: str, strategy: str) -> dict[str, Any]:
    """A run with everything in it that a resume could forget."""
    data: dict[str, Any] = {"source": "imagefolder", "path": str(folder / "images")}
    task: dict[str, Any] = {"kind": "classification", "num_classes": 2}
    if model == "gpt":
        data = {"source": "text", "path": str(folder / "text.txt"), "block": BLOCK, "split": "tail"}
        task = {"kind": "causal_lm"}
    return {
        "run": {"name": "placeholder", "output_root": str(folder), "max_steps": UPDATES, "seed": 5},
        "model": MODELS[model],
        "data": {**data, "global_batch": 16},
        "task": task,
        "optim": {"kind": "adamw", "peak_lr": 0.01},
        "schedule": {"kind": "plateau", "warmup_steps": 3, "patience_evaluations": 0, "factor": 0.7},
        "clip": {"kind": "norm", "max_norm": 0.3},
        "early_stopping": {"patience_evaluations": 1000},
        "evaluation": {"every_steps": 2},
        "checkpoint": {"every_steps": 1, "keep_last": 1},
        "tracking": {"log_every_steps": 3},
        "strategy": {"kind": strategy, "micro_batch": 2},
        "diagnostics": {"every_steps": 2},
    }


def train_quietly(*arguments: str) -> int:
    """Train on this rank, with only the errors on the terminal."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return train_main(*arguments)


def train_and_be_killed(config: str, name: str, step: int) -> int:
    """Train on this rank; all ranks are killed as soon as rank zero has published the checkpoint of `step`."""
    rename, gathered = os.rename, []
    gather = Ranks.gather_objects

    def gather_with_pids(self: Ranks, value: Any) -> list[Any]:
        if not gathered:
            gathered.extend(gather(self, os.getpid()))
        return gather(self, value)

    def rename_and_die(source: Any, target: Any) -> None:
        rename(source, target)
        if str(target).endswith(f"step-{step:08d}"):
            for pid in sorted(gathered, key=lambda pid: pid == os.getpid()):  # oneself last
                os.kill(pid, signal.SIGKILL)

    Ranks.gather_objects = gather_with_pids  # type: ignore[method-assign]
    os.rename = rename_and_die
    return train_quietly(config, f"run.name={name}")


def outcome_of(run: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Everything two equal runs share: the ledger but its times, and the bytes of the last weights and moments."""
    folder = run / f"checkpoints/step-{UPDATES:08d}"
    return plain_ledger(run / "ledger.jsonl"), [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def chain(folder: Path, *, model: str, strategy: str, world_size: int, cuts: Sequence[int] = EVERY_CUT) -> Counter[str]:
    """Run once alone and once killed after each of the updates `cuts`; count the kills and what differs."""
    values = config_of(folder, model=model, strategy=strategy)
    config = str(write_config(folder / f"{model}-{strategy}.yaml", values))
    alone, killed = (f"{kind}-{model}-{strategy}-{world_size}" for kind in ("alone", "killed"))
    counts: Counter[str] = Counter()
    run_ranks(world_size, train_quietly, config, f"run.name={alone}", deadline_seconds=120)
    for step in cuts:
        port = free_port()
        arguments = (config, killed, step)
        started = [start_rank(rank, world_size, port, train_and_be_killed, arguments) for rank in range(world_size)]
        for process, connection in started:
            process.join(120)
            counts["NOT KILLED"] += process.exitcode != -signal.SIGKILL
            process.kill()
            connection.close()
        counts["kills after an update"] += 1
    codes = run_ranks(world_size, train_quietly, config, f"run.name={killed}", deadline_seconds=120)
    counts["runs"] += 1
    counts["EXIT CODE NOT 0"] += codes != [0] * world_size
    (found_lines, found_bits), (lines, bits) = outcome_of(folder / killed), outcome_of(folder / alone)
    counts["LEDGER DIFFERS"] += found_lines != lines
    counts["WEIGHTS, MOMENTS OR RANDOM STATE DIFFER"] += found_bits != bits
    counts["runs equal to the bit"] += found_lines == lines and found_bits == bits
    return +counts


def campaign(strategy: str, models: Iterable[str] = MODELS) -> Counter[str]:
    """Every model at every number of ranks; the outcomes that begin with a capital must not be."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        write_data(Path(temporary))
        for model in models:
            for world_size in WORLD_SIZES:
                found = chain(Path(temporary), model=model, strategy=strategy, world_size=world_size)
                print(f"{strategy} {model} on {world_size}: {dict(found)}", file=sys.stderr, flush=True)
                counts += found
    return counts

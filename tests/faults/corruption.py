"""Damages checkpoints in hundreds of seeded ways, and has three ranks load what is left."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from harness.checkpoint import snapshot
from harness.checkpoint.store import CheckpointStore
from harness.checkpoint.tensors import tensor_digest
from harness.config.run import Checkpoint
from harness.errors import CheckpointError
from harness.run import Run
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import Spec, assemble_spec, save_now, train_updates

STEPS = (10, 20, 30)
WORLD_SIZE = 3
SPEC = Spec(network="norm_mlp", rows=60, global_batch=12, updates=30)
KEEP = Checkpoint(keep_last=len(STEPS))

Digests = dict[str, str]


def digests(run: Run) -> Digests:
    """The state of the run as it is now."""
    return {key: tensor_digest(tensor) for key, tensor in run.strategy.state()}


def save_good_ones(directory: str) -> dict[int, Digests]:
    """Save a few steps of one run, each rank some files; return what was saved."""
    snapshot.STRIPE_BYTES = 256
    run = assemble_spec(SPEC, directory)
    store = CheckpointStore(Path(directory) / "checkpoints", run.strategy, KEEP)
    saved = {}
    for step in STEPS:
        train_updates(run, range(step - 10, step))
        save_now(store, step)
        saved[step] = digests(run)
    return saved


# ---------------------------------------------------------------- ways to break a checkpoint


def flip_a_bit(chance: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut_off(chance: random.Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def append(chance: random.Random, path: Path) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 600)))


def scramble_a_block(chance: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    length = min(len(content) - start, chance.randint(1, 512))
    content[start : start + length] = bytes(byte ^ chance.randint(1, 255) for byte in content[start : start + length])
    path.write_bytes(content)


def delete(chance: random.Random, path: Path) -> None:
    path.unlink()


def take_from_another_step(chance: random.Random, path: Path) -> None:
    """The very file, well-formed, of another save of the same run."""
    others = [folder for folder in path.parent.parent.glob("step-*") if folder != path.parent]
    shutil.copy(chance.choice(others) / path.name, path)


def take_from_another_rank(chance: random.Random, path: Path) -> None:
    """Another file of the same save under this name."""
    others = [other for other in path.parent.iterdir() if other.read_bytes() != path.read_bytes()]
    shutil.copy(chance.choice(others), path)


def make_a_link(chance: random.Random, path: Path) -> None:
    kept = path.with_name(f"kept-{path.name}")
    path.rename(kept)
    path.symlink_to(kept.name)


def empty(chance: random.Random, path: Path) -> None:
    path.write_bytes(b"")


WAYS: list[Callable[[random.Random, Path], None]] = [
    flip_a_bit,
    flip_a_bit,
    flip_a_bit,
    cut_off,
    append,
    scramble_a_block,
    delete,
    take_from_another_step,
    take_from_another_rank,
    make_a_link,
    empty,
]


def damage(directory: Path, seed: int) -> tuple[str, set[int]]:
    """Break one file in each of the newest one, two or all checkpoints; return how, and which steps."""
    chance = random.Random(seed)
    count = chance.choice([1, 1, 1, 2, len(STEPS)])
    broken = set(STEPS[-count:])
    names = []
    for step in broken:
        folder = directory / f"step-{step:08d}"
        before = after = contents(folder)
        while after == before:  # a file may be the same in two steps
            way = chance.choice(WAYS)
            way(chance, chance.choice(sorted(folder.iterdir())))
            after = contents(folder)
        names.append(way.__name__)
    return " + ".join(names), broken


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- what comes of it


def load_all(folders: list[str], wanted: dict[int, Digests]) -> list[str]:
    """Load each folder on this rank; return what was found: `step N`, `none`, or what is wrong."""
    run = assemble_spec(SPEC)
    found = []
    for folder in folders:
        store = CheckpointStore(Path(folder), run.strategy, KEEP)
        try:
            loaded = store.load()
            assert loaded is not None
            store.restore(loaded)
        except CheckpointError:
            found.append("none")
        else:
            is_right = digests(run) == wanted[loaded.step]
            found.append(f"step {loaded.step}" if is_right else f"WRONG STATE of step {loaded.step}")
    return found


def campaign(num_injections: int, *, seed: int) -> Counter[str]:
    """Damage, load on every rank, and count the outcomes; those that begin with a capital must not be."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "good"
        wanted = run_ranks(WORLD_SIZE, save_good_ones, str(base))[0]
        folders, expected = [], []
        for index in range(num_injections):
            folder = Path(temporary) / f"damaged-{index}"
            shutil.copytree(base / "checkpoints", folder)
            way, broken = damage(folder, seed + index)
            whole = [step for step in STEPS if step not in broken]
            folders.append(str(folder))
            expected.append(f"step {whole[-1]}" if whole else "none")
            counts.update(f"way: {name}" for name in way.split(" + "))
        ranks = run_ranks(WORLD_SIZE, load_all, folders, wanted, deadline_seconds=60 + num_injections)
        for index, answers in enumerate(zip(*ranks, strict=True)):
            if len(set(answers)) > 1:
                counts["RANKS DISAGREE"] += 1
            elif answers[0] != expected[index]:
                counts[f"UNEXPECTED: {answers[0]} instead of {expected[index]}"] += 1
            else:
                counts["detected, all fell back alike" if answers[0] != "none" else "detected, all refused"] += 1
    return counts

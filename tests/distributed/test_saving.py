"""Saving beside the training: what is written is what was, nobody waits for the disk, and its failures are counted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from harness import loop
from harness.checkpoint import snapshot, store
from harness.checkpoint.store import CheckpointStore
from harness.config.run import Checkpoint
from harness.config.run_config import RunConfig
from harness.errors import CheckpointError, HarnessError, StorageError
from harness.loop import fit
from harness.observers.base import Line, Observer, Observers
from harness.observers.ledger import Ledger, read_lines
from harness.record.manifest import checkpoint_problems
from harness.run import Run
from harness.saving import changed_settings, finish_saving, resume, save
from harness.state import TrainState
from tests.distributed.ranks import collect, free_port, run_ranks, run_standing_ranks, start_rank
from tests.distributed.scenarios import Spec, assemble_spec, save_now, train_main, train_updates
from tests.distributed.starts import train_on_standing_ranks
from tests.helpers import wait_until

# ---------------------------------------------------------------- runs that something happens to


@dataclass(frozen=True)
class SavingSpec(Spec):
    """Forty updates, saved every twenty, read every two."""

    rows: int = 64
    updates: int = 40
    every_steps: int = 20
    asynchronous: bool = True
    max_failed_saves: int = 3
    keep_last: int = 100

    @property
    def config(self) -> RunConfig:
        checkpoint = {
            "every_steps": self.every_steps,
            "keep_last": self.keep_last,
            "asynchronous": self.asynchronous,
            "max_failed_saves": self.max_failed_saves,
        }
        values = {**super().config.model_dump(), "checkpoint": checkpoint, "tracking": {"log_every_steps": 2}}
        return RunConfig.model_validate({**values, "evaluation": {"every_steps": 1000}})


@dataclass
class Witness(Observer):
    """Sees everything in order, and does something at one event."""

    at: tuple[str, int] = ("never", 0)
    act: Callable[[], object] = lambda: None
    seen: list[tuple[str, int]] = field(default_factory=list)

    def on_update(self, line: Line) -> None:
        self._see("update", line["step"])

    def on_event(self, line: Line) -> None:
        self._see(line["event"], line.get("step", 0))

    def _see(self, event: str, step: int) -> None:
        self.seen.append((event, step))
        if (event, step) == self.at:
            self.act()


Outcome = tuple[str, list[tuple[str, int]]]
PATCHES = pytest.MonkeyPatch()
"""Of what this rank calls, until its run has ended."""


def fit_under(spec: SavingSpec, directory: str, disturb: Callable[..., Witness], *args: Any) -> Outcome:
    """Fit on this rank; return how it ended and what was seen, in order."""
    run = assemble_spec(spec, directory)
    witness = disturb(run, *args)
    ledger = [Ledger(Path(directory), keep_bytes=0)] if run.strategy.rank == 0 else []
    run.observers = Observers([*ledger, witness])
    try:
        how = fit(run, TrainState()).reason
    except HarnessError as error:
        how = f"{error.exit_code} {error}"
    run.checkpoints.close()
    run.observers.close()
    PATCHES.undo()
    return how, witness.seen


def undisturbed(run: Run) -> Witness:
    return Witness()


def patch_fsync(before: Callable[[], object]) -> None:
    """Have `before` called at each fsync of a file of a checkpoint."""
    fsync = os.fsync

    def patched(descriptor: int) -> None:
        if ".tmp-step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            before()
        fsync(descriptor)

    PATCHES.setattr(os, "fsync", patched)


def disk_is_held_until(run: Run, step: int) -> Witness:
    """No rank's disk answers until the run has come to `step`."""
    released = threading.Event()
    patch_fsync(lambda: released.wait(20))
    return Witness(("update", step), released.set)


def disk_is_slow(run: Run, seconds: float) -> Witness:
    patch_fsync(lambda: time.sleep(seconds))
    return Witness()


def happens_at(run: Run, at: tuple[str, int], act: Callable[[Run], object]) -> Witness:
    return Witness(at, lambda: act(run))


def disk_is_full(run: Run, rank: int, num_saves: int) -> Witness:
    """On one rank, the first few saves find no room."""
    left = [num_saves]

    def refuse() -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")

    if run.strategy.rank == rank:
        patch_fsync(refuse)
    return Witness()


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("checkpoints/step-*"))


def hidden_in(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("checkpoints/.*")]


# ---------------------------------------------------------------- beside the training


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_training_goes_on_while_the_disk_does_not_answer_and_reaches_no_file(
    world_size: int, strategy: str, tmp_path: Path
) -> None:
    spec = SavingSpec(strategy=strategy, updates=12, every_steps=6)
    for name, disturb, its_spec in (
        ("alone", [undisturbed], replace(spec, asynchronous=False)),
        ("held", [disk_is_held_until, 10], spec),
    ):
        (tmp_path / name).mkdir()
        ends = run_standing_ranks(world_size, fit_under, its_spec, str(tmp_path / name), *disturb)
        assert [how for how, _ in ends] == ["budget"] * world_size
    for _, seen in ends:
        assert ("update", 10) in seen[: seen.index(("saved", 6))], "the loop waited for the disk"
    # Four updates in place were made between the save and the writing; none of them is in the files.
    for kind in ("model", "optim"):
        alone, held = (
            load_file(tmp_path / name / f"checkpoints/step-00000006/{kind}-00000.safetensors")
            for name in ("alone", "held")
        )
        assert alone.keys() == held.keys()
        assert all(torch.equal(alone[key], held[key]) for key in alone)
    assert steps_in(tmp_path / "held") == [6, 12]


def only_the_last_rank_writes_slowly(run: Run) -> Witness:
    """Its disk does not answer until the run has come to update 12; the others have written before update 9."""
    if run.strategy.rank < run.strategy.world_size - 1:
        return Witness(("update", 8), lambda: wait_until(run.checkpoints.vote, "this rank has written"))
    released = threading.Event()
    witness = Witness(("update", 12), released.set)

    def hold() -> None:
        if not released.wait(20):
            witness.seen.append(("waited in vain", 0))

    patch_fsync(hold)
    return witness


def test_training_goes_on_while_the_disk_of_one_rank_does_not_answer(tmp_path: Path) -> None:
    spec = SavingSpec(updates=14, every_steps=6)
    for how, seen in run_ranks(2, fit_under, spec, str(tmp_path), only_the_last_rank_writes_slowly):
        assert how == "budget"
        assert ("waited in vain", 0) not in seen, "the loop waited for the disk"


def slow_disk_and_the_time_that_is_asked_for(run: Run) -> Witness:
    """A save takes 0.4 s at least; how long before the end of its job a rank wants to stop is seen, in milliseconds."""
    patch_fsync(lambda: time.sleep(0.1))  # of four files or more
    witness, vote = Witness(), run.signals.vote

    def listen(*, seconds_needed: float) -> int:
        witness.seen.append(("milliseconds", int(1000 * seconds_needed)))
        return vote(seconds_needed=seconds_needed)

    run.signals.vote = listen  # type: ignore[method-assign]
    return witness


def test_the_time_of_a_save_is_left_before_the_end_of_a_job(tmp_path: Path) -> None:
    spec = SavingSpec(updates=8, every_steps=2, asynchronous=False)
    ((_, seen),) = run_ranks(1, fit_under, spec, str(tmp_path), slow_disk_and_the_time_that_is_asked_for)
    asked = [milliseconds for what, milliseconds in seen[seen.index(("saved", 2)) :] if what == "milliseconds"]
    assert asked
    assert min(asked) > 400


def saved_and_resumed(directory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save a run at a state of which nothing is at its default, and return that state and the one that is resumed."""
    run = assemble_spec(Spec(), directory)
    state = TrainState(position=9, step=6, nonfinite_in_a_row=2, evaluated_step=5, metrics={"val/loss": 0.5})
    save(run, state)
    finish_saving(run, state)
    state.save_seconds = 0.0  # of this launch
    loaded = run.checkpoints.load()
    assert loaded is not None
    return vars(state), vars(resume(run, loaded))


def test_a_resumed_run_counts_on_from_what_was_saved(tmp_path: Path) -> None:
    ((saved, resumed),) = run_ranks(1, saved_and_resumed, str(tmp_path))
    assert resumed == saved


def test_a_save_that_comes_due_while_one_is_in_flight_waits_for_it_and_none_is_left_out(tmp_path: Path) -> None:
    spec = SavingSpec(updates=6, every_steps=1)
    ((how, seen),) = run_standing_ranks(1, fit_under, spec, str(tmp_path), disk_is_slow, 0.03)
    assert how == "budget"
    assert [step for event, step in seen if event == "saved"] == [1, 2, 3, 4, 5, 6]
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def stopped_on_a_slow_disk(run: Run) -> Witness:
    patch_fsync(lambda: time.sleep(0.05))
    return Witness(("update", 22), lambda: setattr(run.signals, "received", signal.SIGTERM))


def test_a_stop_signal_waits_for_the_save_in_flight_and_for_its_own(tmp_path: Path) -> None:
    ends = run_standing_ranks(2, fit_under, SavingSpec(), str(tmp_path), stopped_on_a_slow_disk)
    assert [how for how, _ in ends] == ["interrupted"] * 2
    (first, last) = steps_in(tmp_path)
    assert first == 20
    assert 22 <= last < 40
    assert hidden_in(tmp_path) == []


def write_config(folder: Path, **sections: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 3, generator=generator).tolist()
    (folder / "rows.csv").write_text("a,b,y\n" + "\n".join(",".join(map(str, row)) for row in rows))
    values: dict[str, Any] = {
        "run": {"name": "run", "output_root": str(folder), "max_steps": 40},
        "model": {"kind": "mlp", "hidden": [16]},
        "data": {"source": "csv", "path": str(folder / "rows.csv"), "targets": ["y"], "global_batch": 16},
        "task": {"kind": "regression"},
        "optim": {"kind": "sgd", "peak_lr": 0.01},
        "evaluation": {"every_steps": 1000},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**values, **sections}))
    return path


def diverge_on_a_slow_disk(config: str) -> int:
    patch_fsync(lambda: time.sleep(0.05))
    return train_main(config)


def test_a_run_that_gives_up_on_nan_publishes_the_save_in_flight(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, optim={"kind": "sgd", "peak_lr": 1e30}, checkpoint={"every_steps": 1}, tracking={"log_every_steps": 1}
    )
    assert run_ranks(2, diverge_on_a_slow_disk, str(config)) == [6, 6]
    newest = steps_in(tmp_path / "run")[-1]
    assert newest == read_lines(tmp_path / "run/ledger.jsonl")[-1]["step"] - 1, "the last update was not applied"


def train_while_the_disk_pauses(config: str, seconds: float) -> int:
    """Train; on rank zero the disk takes so long for the first file of the save."""
    pauses = [seconds]
    if os.environ["RANK"] == "0":
        patch_fsync(lambda: time.sleep(pauses.pop() if pauses else 0))
    return train_main(config)


@pytest.mark.slow
def test_ranks_wait_for_a_slow_disk_longer_than_for_a_peer_that_does_not_answer(tmp_path: Path) -> None:
    started = {}
    for asynchronous in (True, False):  # both at once, since they only wait
        folder = tmp_path / f"asynchronous-{asynchronous}"
        folder.mkdir()
        config = write_config(
            folder,
            strategy={"kind": "ddp", "collective_timeout_seconds": 3},
            checkpoint={"asynchronous": asynchronous},
        )
        port, arguments = free_port(), (str(config), 5.0)
        started[folder] = [start_rank(rank, 2, port, train_while_the_disk_pauses, arguments) for rank in range(2)]
    for folder, ranks in started.items():
        assert collect(ranks, deadline_seconds=60) == [0, 0], folder.name
        assert checkpoint_problems(folder / "run/checkpoints/step-00000040") == []


# ---------------------------------------------------------------- what a checkpoint refers to


def syncs_are_seen(run: Run) -> Witness:
    """Ledgers and commits are seen with their length when the disk has them."""
    witness, fsync = Witness(), os.fsync

    def seen(descriptor: int) -> None:
        fsync(descriptor)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if name in ("ledger.jsonl", "COMMIT.json"):
            witness.seen.append((name, os.fstat(descriptor).st_size))

    PATCHES.setattr(os, "fsync", seen)
    return witness


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_disk_has_the_ledger_that_a_checkpoint_refers_to_before_its_commit(
    asynchronous: bool, tmp_path: Path
) -> None:
    spec = SavingSpec(updates=8, every_steps=2, asynchronous=asynchronous)
    ((how, seen), _) = run_standing_ranks(2, fit_under, spec, str(tmp_path), syncs_are_seen)
    assert how == "budget"
    commits = [index for index, (name, _) in enumerate(seen) if name == "COMMIT.json"]
    assert steps_in(tmp_path) == [2, 4, 6, 8]
    for step, commit in zip(steps_in(tmp_path), commits, strict=True):
        trainer = json.loads((tmp_path / f"checkpoints/step-{step:08d}/trainer.json").read_bytes())
        lengths = [length for name, length in seen[:commit] if name == "ledger.jsonl"]
        assert max(lengths) >= trainer["ledger_bytes"] > 0, f"the checkpoint of step {step}"


def delete_the_ledger(run: Run) -> None:
    if run.strategy.rank == 0:
        (run.checkpoints.directory.path.parent / "ledger.jsonl").unlink()


def test_without_the_ledger_that_it_refers_to_no_checkpoint_is_made(tmp_path: Path) -> None:
    spec = SavingSpec(every_steps=5)
    for how, _ in run_standing_ranks(2, fit_under, spec, str(tmp_path), happens_at, ("saved", 5), delete_the_ledger):
        assert how.startswith("5 StorageError: 3 saves in a row failed")
        assert "it was deleted while the run wrote to it" in how
    assert steps_in(tmp_path) == [5]
    assert hidden_in(tmp_path) == []


def its_files_are_elsewhere(run: Run, name: str) -> Witness:
    """What a rank writes under this name is not where rank zero looks, as on a disk that machines do not share."""
    write = store.write_tensors

    def elsewhere(path: Path, tensors: Any) -> Any:
        entry = write(path, tensors)
        if path.name == name:
            path.unlink()
        return entry

    PATCHES.setattr(store, "write_tensors", elsewhere)
    return Witness()


def test_what_a_rank_wrote_where_rank_zero_does_not_see_it_is_no_checkpoint(tmp_path: Path) -> None:
    spec, name = SavingSpec(every_steps=5), "rng-00001.safetensors"
    for how, _ in run_standing_ranks(2, fit_under, spec, str(tmp_path), its_files_are_elsewhere, name):
        assert how.startswith("5 StorageError: 3 saves in a row failed")
        assert f"{name} has None bytes here, the rank that wrote it wrote" in how
    assert steps_in(tmp_path) == []
    assert hidden_in(tmp_path) == []


# ---------------------------------------------------------------- disks that fail


@pytest.mark.parametrize("full_on", [0, 1])
def test_two_failed_saves_do_not_stop_a_run_and_all_ranks_hear_of_them(full_on: int, tmp_path: Path) -> None:
    spec = SavingSpec(every_steps=10)
    ends = run_standing_ranks(2, fit_under, spec, str(tmp_path), disk_is_full, full_on, 2)
    assert [how for how, _ in ends] == ["budget"] * 2
    for _, seen in ends:
        told = [(event, step) for event, step in seen if event.startswith("save")]
        assert told == [("save failed", 10), ("save failed", 20), ("saved", 30), ("saved", 40)]
    assert steps_in(tmp_path) == [30, 40]
    assert hidden_in(tmp_path) == []
    failed = [line for line in read_lines(tmp_path / "events.jsonl") if line["event"] == "save failed"]
    assert all(
        "No space left on device" in line["reason"] and f"rank {full_on} of 2" in line["reason"] for line in failed
    )
    assert not any("start the same command again" in line["reason"] for line in failed)  # training goes on


@pytest.mark.parametrize("full_on", [0, 1])
def test_the_third_failed_save_in_a_row_ends_the_run_with_5_on_all_ranks(full_on: int, tmp_path: Path) -> None:
    ends = run_standing_ranks(2, fit_under, SavingSpec(every_steps=5), str(tmp_path), disk_is_full, full_on, 100)
    for how, seen in ends:
        assert how.startswith("5 StorageError: 3 saves in a row failed, the last at update 15")
        assert how.endswith("Mend that, then start the same command again")
        assert 15 <= seen[-2][1] < 25
    assert steps_in(tmp_path) == []
    assert hidden_in(tmp_path) == []


def old_ones_stay(run: Run) -> Witness:
    """No checkpoint can be deleted, as on NFS where another client reads a file of it."""
    rmdir = os.rmdir

    def not_empty(path: Any, **options: Any) -> None:
        if ".trash-" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmdir(path, **options)

    PATCHES.setattr(os, "rmdir", not_empty)
    return Witness()


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_fails_no_save(tmp_path: Path) -> None:
    spec = SavingSpec(every_steps=10, keep_last=1, max_failed_saves=1)
    for how, seen in run_standing_ranks(2, fit_under, spec, str(tmp_path), old_ones_stay):
        assert how == "budget"
        assert [step for event, step in seen if event == "saved"] == [10, 20, 30, 40]
    texts = [line["text"] for line in read_lines(tmp_path / "events.jsonl") if line["event"] == "notice"]
    assert len(texts) == 3
    assert texts[0].startswith("step-00000020 is saved, but old checkpoints cannot be deleted: [Errno 39]")
    assert steps_in(tmp_path) == [40]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_whose_last_save_fails_is_not_called_done(asynchronous: bool, tmp_path: Path) -> None:
    spec = SavingSpec(every_steps=1000, asynchronous=asynchronous)
    ((how, _),) = run_standing_ranks(1, fit_under, spec, str(tmp_path), disk_is_full, 0, 1)
    assert how.startswith("5 StorageError: cannot write")
    assert how.endswith("Mend that, then start the same command again")


@dataclass(frozen=True)
class JudgedSpec(SavingSpec):
    """Four evaluations, each of them worse than the one before, and no saves but of the best and at the end."""

    every_steps: int = 1000
    asynchronous: bool = False  # or the failure may be heard of after the next evaluation

    @property
    def config(self) -> RunConfig:
        return RunConfig.model_validate({**super().config.model_dump(), "evaluation": {"every_steps": 10}})


def judge_on_a_full_disk(spec: JudgedSpec, directory: str, num_failures: int) -> tuple[int | None, str]:
    """Return which evaluation is the best in the end, and what there is to say of a better one."""
    run = assemble_spec(spec, directory)
    PATCHES.setattr("harness.loop.evaluate", lambda run, *, step: {"val/loss": float(step)})
    disk_is_full(run, 0, num_failures)
    try:
        fit(run, TrainState())
        return run.judge.standings.best.best_step, run.judge.standings.missed
    finally:
        run.checkpoints.close()
        PATCHES.undo()


@pytest.mark.parametrize("num_failures", [0, 1, 2])
def test_an_evaluation_whose_save_failed_is_not_the_best_and_the_next_one_is_saved_instead(
    num_failures: int, tmp_path: Path
) -> None:
    ends = run_standing_ranks(2, judge_on_a_full_disk, JudgedSpec(), str(tmp_path), num_failures)
    best = 10 * (1 + num_failures)
    missed = "val/loss 10.0000 at 10 is better, but its checkpoint is not there" if num_failures else ""
    assert ends == [(best, missed)] * 2
    assert json.loads((tmp_path / "checkpoints/BEST").read_bytes())["step"] == best
    assert steps_in(tmp_path) == [best, 40]


def save_again_after_a_failure(spec: SavingSpec, directory: str) -> list[str]:
    """Have a save find no room, and then room, at the same update; return what is wrong with the checkpoint."""
    run = assemble_spec(spec, directory)
    train_updates(run, range(3))
    disk_is_full(run, 0, 1)
    try:
        with pytest.raises(StorageError, match="No space left on device"):
            save_now(run.checkpoints, 3)
        return checkpoint_problems(save_now(run.checkpoints, 3))
    finally:
        PATCHES.undo()
        run.checkpoints.close()


def test_an_update_whose_save_failed_is_saved_when_that_is_asked_for_again(tmp_path: Path) -> None:
    assert run_standing_ranks(2, save_again_after_a_failure, SavingSpec(), str(tmp_path)) == [[], []]
    assert steps_in(tmp_path) == [3]


@dataclass(frozen=True)
class EvaluatedSpec(SavingSpec):
    """Evaluated every four updates, each of which is saved."""

    @property
    def config(self) -> RunConfig:
        values = super().config.model_dump()
        return RunConfig.model_validate({**values, "evaluation": {"every_steps": self.every_steps}})


def the_best_finds_no_room_late(run: Run, scores: dict[int, float], step: int) -> Witness:
    """The save of one step fails, and only after the next evaluation; that of the others goes well."""
    released = threading.Event()
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if f".tmp-step-{step:08d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            released.wait(20)
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    def scored(run: Run, *, step: int) -> dict[str, float]:
        if step > 8:
            released.set()
        return {"val/loss": scores[step]}

    PATCHES.setattr(os, "fsync", refuse)
    PATCHES.setattr(loop, "evaluate", scored)
    return Witness()


def test_an_evaluation_that_was_compared_with_one_whose_save_then_failed_is_compared_again(tmp_path: Path) -> None:
    spec = EvaluatedSpec(updates=16, every_steps=4)
    scores = {4: 0.9, 8: 0.5, 12: 0.7, 16: 0.8}
    for how, _ in run_standing_ranks(2, fit_under, spec, str(tmp_path), the_best_finds_no_room_late, scores, 8):
        assert how == "budget"
    assert steps_in(tmp_path) == [4, 12, 16]
    assert json.loads((tmp_path / "checkpoints/BEST").read_bytes())["step"] == 12


def vanish(run: Run) -> None:
    if run.strategy.rank == 0:
        shutil.rmtree(run.checkpoints.directory.path)


def test_a_checkpoint_directory_that_vanishes_is_not_made_again_somewhere_else(tmp_path: Path) -> None:
    spec = SavingSpec(every_steps=5)
    for how, seen in run_standing_ranks(2, fit_under, spec, str(tmp_path), happens_at, ("saved", 5), vanish):
        assert how.startswith("5 StorageError: 3 saves in a row failed")
        assert "No such file or directory" in how
        assert 20 <= seen[-2][1] < 30
    assert not (tmp_path / "checkpoints").exists()


def remount_read_only(run: Run) -> None:
    if run.strategy.rank == 0:
        path = str(run.checkpoints.directory.path)
        subprocess.run(["mount", "--bind", path, path], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)


@contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[Path]:
    """Mount something; skip where this user may not."""
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def test_a_directory_that_becomes_read_only_costs_saves_and_not_the_older_checkpoint(tmp_path: Path) -> None:
    with mounted("-t", "tmpfs", "tmpfs", at=tmp_path / "may"):
        pass
    ends = run_standing_ranks(
        2, fit_under, SavingSpec(every_steps=5), str(tmp_path), happens_at, ("saved", 5), remount_read_only
    )
    subprocess.run(["umount", "--lazy", str(tmp_path / "checkpoints")], check=True)
    for how, _ in ends:
        assert how.startswith("5 StorageError: 3 saves in a row failed")
        assert "Read-only file system" in how
    assert steps_in(tmp_path) == [5]
    assert checkpoint_problems(tmp_path / "checkpoints/step-00000005") == []


def test_a_disk_with_room_for_one_checkpoint_only_keeps_that_one(tmp_path: Path) -> None:
    # 64 inputs... 3 * 4 bytes for each of about 20,000 parameters: 240 kB a checkpoint on 400 kB.
    config = write_config(
        tmp_path,
        model={"kind": "mlp", "hidden": [128, 128]},
        optim={"kind": "adam", "peak_lr": 1e-3},
        checkpoint={"every_steps": 5},
    )
    with mounted("-t", "tmpfs", "-o", "size=400k", "tmpfs", at=tmp_path / "small") as disk:
        said = train_on_standing_ranks(2, str(config), f"run.output_root={disk}")
        assert [code for code, _ in said] == [5, 5]
        assert "No space left on device" in said[0][1]
        assert steps_in(disk / "run") == [5]
        assert checkpoint_problems(disk / "run/checkpoints/step-00000005") == []
        assert hidden_in(disk / "run") == []


def test_a_run_does_not_start_where_not_one_checkpoint_fits(tmp_path: Path) -> None:
    config = write_config(tmp_path, model={"kind": "mlp", "hidden": [256, 256]})
    with mounted("-t", "tmpfs", "-o", "size=100k", "tmpfs", at=tmp_path / "tiny") as disk:
        said = train_on_standing_ranks(2, str(config), f"run.output_root={disk}")
        assert [code for code, _ in said] == [5, 5]
        # (2 * 256 + 256) + (256 * 256 + 256) + (256 + 1) numbers, no moments, and the random state of two ranks
        assert "one checkpoint of this run takes 300,036" in said[0][1]
        assert not (disk / "run/ledger.jsonl").exists()


def cut_off_the_last_byte(run: Path, step: int) -> None:
    path = run / f"checkpoints/step-{step:08d}/model-00000.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def told_of_broken_ones(run: Path) -> list[str]:
    texts = [line.get("text", "") for line in read_lines(run / "events.jsonl")]
    return [text for text in texts if "checkpoint not used" in text]


def save_twice(folder: Path) -> tuple[str, Path]:
    """Return the config and the directory of a run that was saved at updates 10 and 20 and is to go on to 40."""
    config = write_config(folder, checkpoint={"every_steps": 10})
    assert [code for code, _ in train_on_standing_ranks(1, str(config), "run.max_steps=20")] == [0]
    assert steps_in(folder / "run") == [10, 20]
    return str(config), folder / "run"


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Such a run; not to be written to."""
    return save_twice(tmp_path_factory.mktemp("saved-twice"))


Copy = tuple[tuple[str, ...], Path]


@pytest.fixture
def copied(saved_twice: tuple[str, Path], tmp_path: Path) -> Copy:
    """The command that goes on with a copy of that run, and its directory."""
    config, run = saved_twice
    return (config, f"run.output_root={tmp_path}"), shutil.copytree(run, tmp_path / run.name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_why_every_checkpoint_is_broken_is_in_events_jsonl_when_the_run_ends_with_4(
    world_size: int, copied: Copy
) -> None:
    command, run = copied
    for step in (10, 20):
        cut_off_the_last_byte(run, step)
    assert [code for code, _ in train_on_standing_ranks(world_size, *command)] == [4] * world_size
    newest, older = told_of_broken_ones(run)
    assert "step-00000020: model-00000.safetensors has" in newest
    assert "step-00000010: model-00000.safetensors has" in older


def test_why_a_checkpoint_was_passed_over_is_in_events_jsonl_once_and_said(copied: Copy) -> None:
    command, run = copied
    cut_off_the_last_byte(run, 20)
    ((code, said),) = train_on_standing_ranks(1, *command, "run.max_steps=30")
    assert code == 0
    (text,) = told_of_broken_ones(run)
    assert "goes to quarantine/: step-00000020: model-00000.safetensors has" in text
    assert text in said


def test_why_a_checkpoint_was_passed_over_is_told_where_the_start_comes_to_nothing(tmp_path: Path) -> None:
    config, run = save_twice(tmp_path)
    cut_off_the_last_byte(run, 20)
    rows = Path(config).with_name("rows.csv")
    rows.write_text(rows.read_text() + "\n1,1,1\n2,2,2")
    assert [code for code, _ in train_on_standing_ranks(1, config)] == [3]
    assert len(told_of_broken_ones(run)) == 1


def test_a_broken_checkpoint_that_cannot_be_set_aside_stays_and_is_told_and_the_run_ends_with_5(copied: Copy) -> None:
    command, run = copied
    cut_off_the_last_byte(run, 20)
    with mounted("--bind", str(run / "checkpoints"), at=run / "checkpoints") as checkpoints:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(checkpoints)], check=True)
        (code, said), (other_code, _) = train_on_standing_ranks(2, *command)
        assert code == other_code == 5
        assert "cannot set aside the checkpoint" in said
        assert "Read-only file system" in said
        assert steps_in(run) == [10, 20]
        (text,) = told_of_broken_ones(run)
        assert "step-00000020: model-00000.safetensors has" in text
    assert [code for code, _ in train_on_standing_ranks(2, *command)] == [0, 0]
    assert len(read_lines(run / "ledger.jsonl")) == 41, "40 updates and the evaluation at the end"


# ---------------------------------------------------------------- what is kept


def test_every_mth_checkpoint_and_the_one_resumed_from_are_kept(tmp_path: Path) -> None:
    strategy = assemble_spec(Spec()).strategy
    keep = Checkpoint(keep_last=1, keep_every_steps=4)
    first = CheckpointStore(tmp_path / "checkpoints", strategy, keep)
    for step in range(1, 7):
        save_now(first, step)
    assert steps_in(tmp_path) == [4, 6]
    second = CheckpointStore(tmp_path / "checkpoints", strategy, keep)
    assert second.load().step == 6  # type: ignore[union-attr]
    for step in range(7, 10):
        save_now(second, step)
    assert steps_in(tmp_path) == [4, 6, 8, 9], "6 is where this launch came from"


# ---------------------------------------------------------------- many writers


def save_in_stripes(spec: Spec, directory: str, stripe_bytes: int) -> dict[str, Tensor]:
    run = assemble_spec(spec, directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "STRIPE_BYTES", stripe_bytes)
        save_now(run.checkpoints, 1)
    return {key: tensor.detach().clone() for key, tensor in run.strategy.state()}


def load_in_stripes(spec: Spec, directory: str) -> dict[str, Tensor]:
    run = assemble_spec(spec, directory)
    with torch.no_grad():
        for parameter in run.strategy.module.parameters():
            parameter.fill_(7.0)
    loaded = run.checkpoints.load()
    assert loaded is not None
    run.checkpoints.restore(loaded)
    return {key: tensor.detach().clone() for key, tensor in run.strategy.state()}


def test_a_large_state_is_written_by_all_ranks_and_read_by_any_number_of_them(tmp_path: Path) -> None:
    spec = Spec(network="transformer")
    saved = run_standing_ranks(3, save_in_stripes, spec, str(tmp_path), 2048)[0]
    files = sorted(path.name for path in (tmp_path / "checkpoints/step-00000001").glob("model-*"))
    assert files == [f"model-0000{rank}.safetensors" for rank in range(3)]
    sizes = [(tmp_path / "checkpoints/step-00000001" / name).stat().st_size for name in files]
    assert max(sizes) < 0.6 * sum(sizes), "tensors are not cut, so the shares are not equal"
    for world_size in (1, 2):
        for found in run_standing_ranks(world_size, load_in_stripes, spec, str(tmp_path)):
            assert found.keys() == saved.keys()
            assert all(torch.equal(found[key], saved[key]) for key in saved)


# ---------------------------------------------------------------- after the load


def load_with_a_bug(spec: Spec, directory: str, key: str, only_on: int | None = None, drops: bool = False) -> str:
    """Load where one tensor becomes zeros, or is dropped, on every rank or on one; return what is said of it."""
    run = assemble_spec(spec, directory)
    restore = run.strategy.restore

    def broken(state: Any) -> None:
        others = {name: tensor for name, tensor in state.items() if name != key}
        restore(others if drops else {**others, key: torch.zeros_like(state[key])})

    if only_on in (None, run.strategy.rank):
        run.strategy.restore = broken  # type: ignore[method-assign]
    loaded = run.checkpoints.load()
    assert loaded is not None
    with pytest.raises(CheckpointError) as caught:
        run.checkpoints.restore(loaded)
    return str(caught.value)


def train_and_save(spec: Spec, directory: str) -> None:
    run = assemble_spec(spec, directory)
    train_updates(run, range(2))
    save_now(run.checkpoints, 2)


@pytest.fixture(scope="module")
def saved_under(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Spec], Path]:
    """The directory of a run of such a spec that two ranks have saved once; not to be written to."""

    @cache
    def save(spec: Spec) -> Path:
        directory = tmp_path_factory.mktemp(f"saved-under-{spec.strategy}")
        run_standing_ranks(2, train_and_save, spec, str(directory))
        return directory

    return save


SavedUnder = Callable[[Spec], Path]


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero1", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("key", ["model/2.weight", "optim/0.weight/exp_avg"])
def test_a_state_that_is_not_the_saved_one_after_loading_is_noticed_by_all_ranks(
    strategy: str, key: str, saved_under: SavedUnder
) -> None:
    spec = Spec(strategy=strategy)
    directory = saved_under(spec)
    first, second = run_standing_ranks(2, load_with_a_bug, spec, str(directory), key)
    assert first == second
    newest = directory / "checkpoints/step-00000002"
    assert f"1 tensors are not what {newest} holds after loading it, such as {key}" in first


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_saved_tensor_that_a_rank_did_not_take_up_is_noticed_by_all_ranks(
    rank: int | None, saved_under: SavedUnder
) -> None:
    directory, key = saved_under(Spec()), "optim/0.weight/exp_avg"
    first, second = run_standing_ranks(2, load_with_a_bug, Spec(), str(directory), key, rank, True)
    assert first == second
    newest = directory / "checkpoints/step-00000002"
    assert f"1 tensors are not what {newest} holds after loading it, such as {key}" in first


@pytest.mark.parametrize("key", ["model/0.bias", "model/2.weight", "optim/0.weight/exp_avg", "optim/2.bias/exp_avg"])
@pytest.mark.parametrize("rank", [0, 1])
def test_under_ddp_every_rank_compares_its_own_copy(rank: int, key: str, saved_under: SavedUnder) -> None:
    first, second = run_standing_ranks(2, load_with_a_bug, Spec(), str(saved_under(Spec())), key, rank)
    assert first == second
    assert f"after loading it, such as {key}" in first
    assert f"(on rank {rank} of 2" in first


# ---------------------------------------------------------------- settings of the optimizer


def settings_of(spec: Spec, directory: str) -> list[dict[str, Any]]:
    return assemble_spec(spec, directory).strategy.optimizer_settings()


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(f"zero{stage}", marks=pytest.mark.slow) for stage in (1, 2, 3))]
)
def test_parameter_groups_are_known_by_the_names_of_their_parameters(strategy: str, tmp_path: Path) -> None:
    adam = {"betas": [0.9, 0.999], "eps": 1e-8}
    for groups in run_standing_ranks(2, settings_of, Spec(strategy=strategy), str(tmp_path)):
        assert groups == [
            {"weight_decay": 0.1, **adam, "parameters": ["0.weight", "2.weight"]},
            {"weight_decay": 0.0, **adam, "parameters": ["0.bias", "2.bias"]},
        ]


def test_a_setting_that_changed_since_the_save_is_told_by_parameter(tmp_path: Path) -> None:
    run = assemble_spec(Spec(), str(tmp_path))
    save_now(run.checkpoints, 1)
    loaded = run.checkpoints.load()
    assert loaded is not None
    assert changed_settings(run, loaded) == []
    run.strategy.optimizer.param_groups[0]["weight_decay"] = 0.2
    assert changed_settings(run, loaded) == [
        "the optimizer's weight_decay is 0.2, was 0.1, for 2 parameters such as 0.weight"
    ]

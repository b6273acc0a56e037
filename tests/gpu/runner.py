"""Runs checks one after another, each in a process of its own, and tells of each when it ends.

A check that crashes or hangs touches no other: at its deadline it is killed with its whole process group. What is known
is printed and written whole after every check, so that a run that is cut off has told something.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from harness.ranks.process import pin_packages

REPOSITORY = Path(__file__).parents[2]
LINES_KEPT = 40
"""Of what a failed check has printed."""
SECONDS_TO_LOOK = 60.0
"""How long torch may take to say whether there is a GPU."""
NO_GPU = "no CUDA device"
_LOOK = "import torch; print(torch.cuda.is_available())"


@dataclass(frozen=True)
class Check:
    """One question to this machine."""

    name: str
    deadline_seconds: float
    function: str
    """`module:function`, which returns figures and raises where something does not work."""
    claim: str
    """What has been shown when it is well."""
    needs_gpu: bool = False


@dataclass
class Outcome:
    """What came of a check."""

    name: str
    state: Literal["ok", "FAILED", "skipped", "not run"]
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    output: list[str] = field(default_factory=list)
    """The last lines of a check that failed."""

    def line(self) -> str:
        """Return it as a line for people."""
        figures = ", ".join(f"{name} {shown(value)}" for name, value in self.figures.items())
        told = "; ".join(filter(None, [self.reason, figures]))
        return f"{self.state:8} {self.name:22} {self.seconds:6.1f} s  {told}".rstrip()


def shown(value: Any) -> str:
    """Return a figure in few characters."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Stopped(Exception):
    """Somebody wants the end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise `Stopped` inside."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Report:
    """The outcomes so far, in a file that is whole at any time.

    Args:
        path: of the file; None writes none.
        checks: all that are to be run; those without an outcome are "not run".
    """

    def __init__(self, path: Path | None, checks: Sequence[Check]) -> None:
        self._path, self._checks = path, checks
        self.outcomes: list[Outcome] = []
        self._began = time.time()
        self._write()

    def add(self, outcome: Outcome) -> None:
        """Tell of a check that has ended."""
        self.outcomes.append(outcome)
        print(outcome.line(), flush=True)
        self._write()

    @property
    def is_well(self) -> bool:
        """Whether every check was made or skipped, and none has failed."""
        ended = [outcome for outcome in self.outcomes if outcome.state in ("ok", "skipped")]
        return len(ended) == len(self._checks)

    def _write(self) -> None:
        if self._path is None:
            return
        known = {outcome.name for outcome in self.outcomes}
        left = [Outcome(check.name, "not run") for check in self._checks if check.name not in known]
        content = {
            "began": self._began,
            "seconds": time.time() - self._began,
            "is_well": self.is_well,
            "checks": [asdict(outcome) for outcome in [*self.outcomes, *left]],
        }
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self._path)

    def table(self) -> str:
        """Return all outcomes as a table in Markdown."""
        claims = {check.name: check.claim for check in self._checks}
        rows = [
            f"| {outcome.state} | {outcome.name} | {claims[outcome.name]} | {outcome.seconds:.1f} | "
            + "; ".join(filter(None, [outcome.reason, *(f"{n} {shown(v)}" for n, v in outcome.figures.items())]))
            + " |"
            for outcome in self.outcomes
        ]
        return "\n".join(["| | check | says that | seconds | figures |", "|---|---|---|---:|---|", *rows])


def run_checks(checks: Sequence[Check], report: Report, *, seconds_in_all: float, fault: str | None = None) -> None:
    """Run checks in order and tell of each; those that there is no time for are told as well.

    Args:
        fault: breaks the harness first, by name (see faults.py).
    Raises:
        Stopped: by a signal; the check that was running has ended with its processes, and is told.
    """
    end = time.monotonic() + seconds_in_all
    with tempfile.TemporaryDirectory(prefix="gpu check ") as name:  # with a space, as folders of people have
        folder = Path(name)
        environment = environment_of_checks(folder, fault=fault)
        problem = without_gpu(environment) if any(check.needs_gpu for check in checks) else ""
        for check in checks:
            seconds = min(check.deadline_seconds, end - time.monotonic())
            if check.needs_gpu and problem:
                report.add(Outcome(check.name, "skipped", problem))
            elif seconds <= 1:
                report.add(Outcome(check.name, "not run", f"the {seconds_in_all:g} s in all were over"))
            else:
                report.add(_run(check, folder, environment, report, seconds=seconds))


def environment_of_checks(folder: Path, *, fault: str | None = None) -> dict[str, str]:
    """Return the environment of a check: this very checkout, no network, and nothing written at home."""
    environment = dict(os.environ)
    pin_packages(environment)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    caches = ("HF_HOME", "HF_DATASETS_CACHE", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in (*caches, "TRITON_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "HARNESS_CACHE"):
        environment[name] = str(folder / name.lower())
    environment |= {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}
    environment |= {"ACCELERATE_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    return environment | ({"GPU_CHECK_FAULT": fault} if fault else {})


def without_gpu(environment: Mapping[str, str]) -> str:
    """Return why torch can use no GPU here, as it says itself in another process; empty if it can."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _LOOK],
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_LOOK,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"torch did not say in {SECONDS_TO_LOOK:g} s whether there is a CUDA device"
    said = answer.stdout.split()
    if said[-1:] == ["True"]:
        return ""
    words = answer.stderr.strip().splitlines()[-1:]
    return NO_GPU if said[-1:] == ["False"] else f"torch cannot be asked for CUDA devices: {''.join(words)}"


def _run(check: Check, folder: Path, environment: Mapping[str, str], report: Report, *, seconds: float) -> Outcome:
    result, log = folder / f"{check.name}.json", folder / f"{check.name}.log"
    began = time.monotonic()
    process: subprocess.Popen[bytes] | None = None
    ended = "crashed"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.worker", check.function, str(result), str(seconds)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        ended = _wait(process, seconds=seconds)
    except Stopped as stopped:
        if process is not None:
            _kill_group(process)
        report.add(Outcome(check.name, "not run", str(stopped), time.monotonic() - began))
        raise
    finally:
        if process is not None:
            _kill_group(process)  # also what a check has left behind that ended by itself
    lines = log.read_text(errors="replace").splitlines()[-LINES_KEPT:]
    outcome = _outcome(check, result, ended, lines)
    outcome.seconds = round(time.monotonic() - began, 2)
    outcome.output = lines if outcome.state == "FAILED" else []
    return outcome


def _wait(process: subprocess.Popen[bytes], *, seconds: float) -> str:
    """Return how a process has ended; empty if well. It is not reaped, so that its group keeps its name."""
    give_up = time.monotonic() + seconds
    while (ended := os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
        if time.monotonic() > give_up:
            return f"did not end in {seconds:.0f} s"
        time.sleep(0.02)
    if ended.si_code != os.CLD_EXITED:
        return f"was ended by {signal.Signals(ended.si_status).name}"
    return f"ended with {ended.si_status}" if ended.si_status else ""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # there is none left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(check: Check, result: Path, ended: str, lines: Sequence[str]) -> Outcome:
    if not result.exists():
        said = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        return Outcome(check.name, "FAILED", f"{ended or 'said nothing of its end'} ({said.strip()[:200]})")
    found = json.loads(result.read_bytes())
    outcome = Outcome(check.name, found["state"], found["reason"], figures=found["figures"])
    if ended and outcome.state != "FAILED":  # what it checked was well, and then it did not end well
        outcome.state, outcome.reason = "FAILED", f"all was well, but the process {ended}"
    return outcome

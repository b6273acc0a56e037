"""What comes after an attempt at a Slurm job: the whole contract of exit codes, as one pure function."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.errors import EXIT_DONE, EXIT_INTERRUPTED
from harness.launch.slurm.preflight import EXIT_BAD_NODE
from harness.launch.torchrun import FINAL_CODES

Action = Literal["end", "requeue", "exclude", "leave"]
MAX_EXCLUSIONS = 2
MAX_LOSSES = 3
"""How often in a row a job that loses nodes comes back without a new step: perhaps it is what kills them."""
CRASHED, LOST = "crashed", "lost"
INTERRUPTED_CODES = (EXIT_INTERRUPTED, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2)
"""The signal may come before the first task is Python, and then kills it."""


@dataclass(frozen=True)
class Attempt:
    """How the ranks ended, and what Slurm says then."""

    code: int
    state: str
    is_preempted: bool
    step_before: int
    """The newest checkpoint when the attempt began, 0 without one."""
    step_after: int
    crash_requeues: int
    """How often this submission was queued again after a crash."""
    was_fruitless_before: bool
    """The attempt before was interrupted too, and had saved no new step."""
    lost_nodes: tuple[str, ...] = ()
    bad_nodes: tuple[str, ...] = ()
    """Those that failed launch/slurm/preflight.py."""
    exclusions: int = 0
    """How often this submission was started without bad nodes."""
    losses: int = 0
    """How many attempts before this one lost a node in a row, without a new step."""

    @property
    def has_saved_a_new_step(self) -> bool:
        """Whether another attempt would begin further on than this one."""
        return self.step_after > self.step_before


def decide(attempt: Attempt, *, max_crash_requeues: int) -> tuple[Action, str]:
    """Return what to do after an attempt, with the reason.

    `end` ends the job with the run's code, `requeue` queues it again, `exclude` does so without the bad nodes, `leave`
    waits for Slurm, which is about to do either by itself: a requeue now would be a second one, and would bring a
    cancelled job back to life.
    """
    code = attempt.code
    if attempt.state not in ("RUNNING", "UNKNOWN"):
        return "leave", f"Slurm ends the job ({attempt.state.lower()})"
    if code in FINAL_CODES and code != EXIT_INTERRUPTED:
        return "end", "done" if code == EXIT_DONE else f"exit code {code}, which another start would end with too"
    if attempt.is_preempted:
        return "leave", "preempted"
    if code in INTERRUPTED_CODES:
        if attempt.has_saved_a_new_step or not attempt.was_fruitless_before:
            return "requeue", "interrupted and saved" if attempt.has_saved_a_new_step else "interrupted"
        return "end", "interrupted twice in a row before a new step was saved: is the lead too long for the time limit?"
    return _after_a_crash(attempt, max_requeues=max_crash_requeues)


def _after_a_crash(attempt: Attempt, *, max_requeues: int) -> tuple[Action, str]:
    code = attempt.code
    if attempt.bad_nodes or code == EXIT_BAD_NODE:
        return _before_the_ranks(attempt)
    if attempt.lost_nodes and (attempt.has_saved_a_new_step or attempt.losses < MAX_LOSSES):
        return "requeue", f"{LOST} {', '.join(attempt.lost_nodes)}"
    if not attempt.has_saved_a_new_step:
        return "end", f"crashed with exit code {code}, and no new step was saved that another start could begin from"
    if attempt.crash_requeues >= max_requeues:
        return "end", f"crashed with exit code {code} after {attempt.crash_requeues} requeues for crashes"
    return "requeue", CRASHED


def _before_the_ranks(attempt: Attempt) -> tuple[Action, str]:
    names = ", ".join(attempt.bad_nodes)
    if not names:
        return "end", "the nodes answer, but cannot add up numbers: see task-*.log, and is network_interface right?"
    if attempt.exclusions >= MAX_EXCLUSIONS:
        return "end", f"bad nodes {names}, after others were left out {MAX_EXCLUSIONS} times: is it the image?"
    return "exclude", f"bad nodes {names}"


@dataclass(frozen=True)
class Earlier:
    """The attempts since a person submitted the run."""

    crash_requeues: int
    was_fruitless: bool
    exclusions: int
    losses: int


def earlier_attempts(events: Sequence[Mapping[str, Any]]) -> Earlier:
    """Return what the events of a run tell of the attempts since it was last submitted by a person."""
    submissions = [index for index, line in enumerate(events) if line["event"] == "submitted" and "after" not in line]
    ends = [line for line in events[max(submissions, default=0) :] if line["event"] == "job ended"]
    crashes = sum(line["action"] == "requeue" and line["cause"] == CRASHED for line in ends)
    last = ends[-1] if ends else None
    fruitful = [line["has_saved_a_new_step"] or not line["cause"].startswith(LOST) for line in reversed(ends)]
    return Earlier(
        crash_requeues=crashes,
        was_fruitless=bool(last and last["code"] in INTERRUPTED_CODES and not last["has_saved_a_new_step"]),
        exclusions=sum(line["action"] == "exclude" for line in ends),
        losses=fruitful.index(True) if True in fruitful else len(fruitful),
    )

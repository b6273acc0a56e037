"""Run a plan under torchrun on this machine, with its signals, its restarts and the exit code of the run.

torchrun is started as `harness.ranks.agent`, in a session of its own: Ctrl-C in the terminal reaches only this process,
which passes it on once. The agent gets SIGTERM if this process dies and then stops its ranks as if it had been asked
to; ranks get SIGKILL if the agent dies (`die_with_parent` in harness.train), and whatever is left is killed here.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from harness.errors import EXIT_DONE, EXIT_INTERRUPTED, HarnessError, PeerError, RunInUseError
from harness.launch.plan import LaunchPlan, child_environment
from harness.ranks.process import adopt_orphans, die_with_parent
from harness.record.exit_file import ExitFile
from harness.record.files import storage_errors

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SHUTDOWN_TIMEOUT_SECONDS = 300
"""How long ranks may take to save after they were asked to stop."""
GRACE_SECONDS = 1.0
"""How long helpers of the ranks may outlive the agent."""
LINES_OF_PROGRESS = 3
"""At most, of harness/observers/console.py."""
EXIT_KILLED = 128 + signal.SIGINT

FINAL_CODES = {
    EXIT_DONE,
    EXIT_INTERRUPTED,
    *(kind.exit_code for kind in HarnessError.__subclasses__() if kind is not PeerError),
}
"""Starting again would end the same way, or is somebody else's decision."""


def torchrun_command(plan: LaunchPlan) -> list[str]:
    """Return the command line that starts the ranks of `plan` on this machine, which may be one of several nodes.

    No argument of a rank may begin with a dash: torchrun looks for its own options among them.
    """
    for argument in plan.command:
        assert not argument.startswith("-"), f"torchrun would take {argument} for one of its options"
    rendezvous = plan.rendezvous
    return [
        *(sys.executable, "-m", plan.agent),
        *("--nnodes", str(plan.nodes), "--nproc-per-node", str(plan.ranks_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{rendezvous.host}:{rendezvous.port}"),
        *(("--rdzv-id", rendezvous.id) if rendezvous.id else ()),
        *(("--local-addr", plan.local_address) if plan.local_address else ()),
        # Restarts are made in `run`, which knows the exit codes: torchrun would try a wrong path again.
        *("--max-restarts", "0"),
        *("--signals-to-handle", ",".join(number.name for number in STOP_SIGNALS)),
        *("--shutdown-timeout", str(SHUTDOWN_TIMEOUT_SECONDS)),
        *("--log-dir", os.devnull),  # otherwise an empty folder in /tmp stays behind from every launch
        *("-m", *plan.command),
    ]


def exit_code_of(*, recorded: int | None, agent: int, stop_signal: int | None) -> int:
    """Return the exit code of a run.

    Args:
        recorded: the code in an exit.json that was written during this launch, if one was.
        agent: how the agent ended; a signal is negative.
        stop_signal: the first signal that asked the run to stop, if one did.
    """
    if agent == RunInUseError.exit_code:
        return agent  # exit.json belongs to the run that holds the directory
    if recorded is not None:
        return recorded
    if stop_signal is not None and agent != 0:
        return 128 + stop_signal  # there was nothing to save yet, or no time to: not 75
    return agent if agent >= 0 else 128 - agent


def run(plan: LaunchPlan) -> int:
    """Run the plan to its end and return the exit code of the run; started again while that can help.

    The first SIGINT, SIGTERM or SIGUSR1 asks the ranks to save and stop; a later SIGINT kills them at once.
    """
    with storage_errors("write to", plan.run_directory):
        (plan.run_directory / "logs").mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    strangers = frozenset(_descendants(os.getpid()))
    # A signal that whoever started us ignores stays ignored. Blocked signals wait for `sigwait`, so none is lost.
    stop_signals = {number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals | {signal.SIGCHLD})
    try:
        restarts_left = plan.max_restarts
        while True:
            code, is_stopped = _run_once(plan, strangers=strangers, stop_signals=stop_signals, mask=mask)
            if is_stopped or code in FINAL_CODES or not restarts_left:
                return code
            print(f"Exit code {code}: starting again; restarts left: {restarts_left - 1}.", file=sys.stderr)
            restarts_left -= 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run_once(
    plan: LaunchPlan,
    *,
    strangers: frozenset[int],
    stop_signals: set[signal.Signals],
    mask: Iterable[int],
) -> tuple[int, bool]:
    exit_file = ExitFile(plan.run_directory)
    agent = subprocess.Popen(
        torchrun_command(plan),
        env=child_environment(plan),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(_before_exec, mask),  # noqa: PLW1509 - there is one thread here
    )
    is_killed = False
    try:
        stop_signal, is_killed = _wait(agent, stop_signals)
    finally:
        _kill_leftovers(strangers, grace_seconds=0 if is_killed else GRACE_SECONDS)
    if is_killed:
        agent.wait()
        if sys.stderr.isatty():
            print("\x1b[?25h", end="", file=sys.stderr)  # the cursor, hidden by a progress bar that could not end
        return EXIT_KILLED, True
    if agent.returncode < 0 and stop_signal is None:
        name = signal.Signals(-agent.returncode).name
        print(f"torchrun (process {agent.pid}) was killed by {name}; its ranks were killed too", file=sys.stderr)
    code = exit_code_of(recorded=exit_file.new_code(), agent=agent.returncode, stop_signal=stop_signal)
    return code, stop_signal is not None


def _wait(agent: subprocess.Popen[bytes], stop_signals: set[signal.Signals]) -> tuple[signal.Signals | None, bool]:
    """Wait for the agent; return the signal that asked it to stop, and whether a later SIGINT gave up on that."""
    stop_signal = None
    while agent.poll() is None:
        received = signal.sigwait(stop_signals | {signal.SIGCHLD})
        if received == signal.SIGCHLD:
            continue
        if stop_signal is None:
            stop_signal = signal.Signals(received)
            print(stop_notice(is_terminal=sys.stderr.isatty()), end="", file=sys.stderr, flush=True)
            agent.terminate()
        elif received == signal.SIGINT:
            return stop_signal, True
    return stop_signal, False


def stop_notice(*, is_terminal: bool) -> str:
    """Return what a person reads who has asked the ranks to stop; on a terminal below the progress that is there.

    Rank zero draws that anew from the end of the terminal upwards, so what is below the notice is left to it.
    """
    text = "Stopping: the ranks save and end. Ctrl-C again kills them at once."
    return f"\n{text}" + "\n" * LINES_OF_PROGRESS if is_terminal else f"{text}\n"


def _before_exec(mask: Iterable[int]) -> None:
    die_with_parent(signal_number=signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill_leftovers(strangers: frozenset[int], *, grace_seconds: float) -> None:
    """Kill every process that descends from this one and was not there before, after `grace_seconds`."""
    kill_at = time.monotonic() + grace_seconds
    while leftovers := _descendants(os.getpid()) - strangers:
        for pid in leftovers if time.monotonic() >= kill_at else ():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has just ended by itself
        if time.monotonic() > kill_at + 10:
            print(f"processes {sorted(leftovers)} do not die; is a device hung?", file=sys.stderr)
            return
        time.sleep(0.02)


def _descendants(ancestor: int) -> set[int]:
    """Return the living processes below `ancestor`; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if state != "Z":
            children.setdefault(int(parent), []).append(int(status.parent.name))
    found: set[int] = set()
    queue = [ancestor]
    while queue:
        below = children.get(queue.pop(), [])
        found.update(below)
        queue.extend(below)
    return found

"""Run a function on several gloo ranks, forked from one parent that has imported what is slow to import.

The parent is the standard library's fork server: it has imported torch, but started no thread and no process group. A
test with eight ranks then takes well under a second, not the half minute that eight cold starts take.

`run_ranks` forks ranks for one call, which may do to its process what it likes. `run_standing_ranks` keeps them, with
their process group, for the next call: for functions that leave nothing behind.
"""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

PRELOAD = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torchmetrics.classification",
    "torchmetrics.regression",
    "accelerate",
    "datasets",
    "harness.train",
    "harness.loop",
    "harness.observers.console",
    "harness.observers.ledger",
    "harness.catalogue.table.open",
    "harness.catalogue.images.open",
    "harness.catalogue.text.open",
    "harness.catalogue.cnn.network",
    "harness.catalogue.gpt.network",
    "harness.strategy.ddp",
    "tests.distributed.warm_deepspeed",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "peft",
    "tests.distributed.scenarios",
    "tests.distributed.warm_last",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOAD))
_REPOSITORY = Path(__file__).parents[2]
_ENVIRONMENT = dict(os.environ)


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, deadline_seconds: float = 60.0) -> list[Any]:
    """Return `function(*args)` of every rank, in order of rank, each run with torchrun's environment.

    Args:
        function: importable by name; `args` and what it returns go through pickle.
        deadline_seconds: all ranks are killed when it is over.
    Raises:
        RankFailed: with the tracebacks of the ranks.
    """
    port = free_port()
    started = [start_rank(rank, world_size, port, function, args) for rank in range(world_size)]
    return collect(started, deadline_seconds=deadline_seconds)


_standing: dict[int, list["Started"]] = {}
"""By number of ranks: those that wait for a call."""


def run_standing_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, deadline_seconds: float = 60.0
) -> list[Any]:
    """Do as `run_ranks`, on ranks that stay in one process group for all such calls of a test file.

    Args:
        function: joins by `scenarios.join`, and leaves its process as it found it.
    Raises:
        RankFailed: with the tracebacks of the ranks; the next call has new ones.
    """
    if world_size not in _standing:
        port = free_port()
        _standing[world_size] = [start_rank(rank, world_size, port, None, ()) for rank in range(world_size)]
    started = _standing.pop(world_size)
    for _, connection in started:
        connection.send_bytes(pickle.dumps((function, args)))
    results = collect(started, deadline_seconds=deadline_seconds, stay=True)
    _standing[world_size] = started
    return results


def dismiss_standing_ranks() -> None:
    """End the ranks that wait for a call."""
    dismissed = [rank for started in _standing.values() for rank in started]
    _standing.clear()
    for _, connection in dismissed:
        connection.close()
    for process, _ in dismissed:
        process.join(10)
        if process.is_alive():
            process.kill()
    codes = [process.exitcode for process, _ in dismissed]
    assert not any(codes), f"standing ranks ended with {codes}"


def free_port() -> int:
    """Return a port that nobody listens on, and that neither another worker nor the kernel gives to somebody else."""
    first = 20_000 + 1_500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.Random().sample(range(first, first + 1_500), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError(f"100 ports from {first} on are taken")


Started = tuple[Any, multiprocessing.connection.Connection]


def start_rank(
    rank: int, world_size: int, port: int, function: Callable[..., Any] | None, args: tuple[Any, ...]
) -> Started:
    """Fork one rank from the warm parent; without a function it waits for calls on its connection."""
    ours, theirs = _context.Pipe()
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_LOG_LEVEL": "ERROR",
    }
    process = _context.Process(target=_child, args=(theirs, environment, function, args), daemon=True)
    _start_warm_parent()
    process.start()
    theirs.close()
    return process, ours


def _start_warm_parent() -> None:
    """Start it, if it does not run, as if no test had moved or set anything yet: all ranks that follow come from it.

    It says nothing of a module that it cannot import, and it looks for those of the tests in the working directory.
    """
    with contextlib.chdir(_REPOSITORY), mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
        multiprocessing.forkserver.ensure_running()


def collect(started: list[Started], *, deadline_seconds: float, stay: bool = False) -> list[Any]:
    """Wait for ranks and return what they returned; without `stay` they have ended then."""
    end = time.monotonic() + deadline_seconds
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {connection: rank for rank, (_, connection) in enumerate(started)}
    while waiting and not failures:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            failures.append(
                f"ranks {sorted(waiting.values())} did not end in {deadline_seconds:.0f} s; stderr has their stacks"
            )
            for rank in waiting.values():
                os.kill(started[rank][0].pid, signal.SIGABRT)
                started[rank][0].join(5)
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[call-overload]
            try:
                is_good, payload = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]  # noqa: S301
            except EOFError:
                started[rank][0].join(5)
                is_good, payload = False, f"died with exit code {started[rank][0].exitcode}"
            if is_good:
                results[rank] = payload
            else:
                failures.append(f"rank {rank}: {payload}")
    # The others of a failed rank wait in a collective for ever; give the talkative ones a moment.
    for process, connection in started:
        if failures and process.is_alive():
            process.kill()
        if failures or not stay:
            process.join(10)
            connection.close()
    if failures:
        raise RankFailed("\n".join(failures))
    return [results[rank] for rank in range(len(started))]


def _child(
    connection: multiprocessing.connection.Connection,
    environment: dict[str, str],
    function: Callable[..., Any] | None,
    args: tuple[Any, ...],
) -> None:
    multiprocessing.current_process().daemon = False  # no rank of a run is one, and one may have no workers
    import torch
    import torch.distributed as dist

    from harness.ranks.process import die_with_parent

    die_with_parent()
    os.environ.update(environment)
    torch.set_num_threads(1)
    faulthandler.enable()  # `collect` aborts a rank that does not end
    is_good = _answer_calls(connection) if function is None else _answer(connection, function, args)
    connection.close()
    if dist.is_initialized() and is_good:
        dist.destroy_process_group()
    os._exit(0)  # no atexit hook of a library is part of a test


def _answer(
    connection: multiprocessing.connection.Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> bool:
    try:
        if PRELOAD[-1] not in sys.modules:
            raise ImportError(f"the parent of this rank is cold: it has not imported {PRELOAD[-1]}")
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    return answer[0]


def _answer_calls(connection: multiprocessing.connection.Connection) -> bool:
    """Answer until the test file is over, which closes the connection, or a call fails."""
    from accelerate.state import AcceleratorState, GradientState

    environment = dict(os.environ)
    while True:
        # What building an engine leaves behind, so that the next call may build one of another kind.
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            function, args = pickle.loads(connection.recv_bytes())  # noqa: S301
        except EOFError:
            return True
        if not _answer(connection, function, args):
            return False

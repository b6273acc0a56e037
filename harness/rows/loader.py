"""Processes that read the rows of a Dataset ahead: a DataLoader over the requests of a plan.

Neither a worker nor the loader has a state that a checkpoint would need: which rows are read follows from the plan,
what is drawn for them from their numbers.
"""

from __future__ import annotations

import atexit
import errno
import gc
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import stat
import tempfile
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from harness.errors import DataError, RowError
from harness.own_code import told
from harness.ranks.process import die_with_parent
from harness.rows.collate import SENT_BYTES
from harness.rows.dataset import DatasetRows, first_of
from harness.rows.tree import map_tree, paths
from harness.stopping import StopSignals

AHEAD = 2
"""Micro-batches that each worker reads ahead."""
LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Of a path of a socket 107 characters are allowed."""
NOTHING_LOST = "Nothing that was saved is lost: start the same command again"
_ROOM = (
    "Rows go through /dev/shm, which may be full: give it more room (docker: --shm-size), or lower data.workers or "
    "strategy.micro_batch"
)
_IN_SHARED_MEMORY = "</torch_"
"""Stands in what torch says of it."""
_ADVICE = {
    -signal.SIGKILL: f"The system does so when memory runs out: fewer data.workers need less. {NOTHING_LOST}",
    -signal.SIGBUS: f"{_ROOM}. {NOTHING_LOST}",
}


FIRST = np.zeros(1, np.int64)


class Request(NamedTuple):
    """A micro-batch that a worker is to read."""

    ids: NDArray[np.int64]
    """(n,) of the split; without any it is the first row, to keep other ranks company."""
    epoch: int
    is_last: bool = True
    """Of its update."""


class Loader:
    """Worker processes of this rank, which read micro-batches of one split in the order of requests.

    Args:
        finish: is applied to each leaf in the worker.
        pins: whether tensors come in pinned memory, from which a GPU copies them while it computes.
        rank: of this process, for messages.
    """

    def __init__(self, rows: DatasetRows, *, finish: Callable[[Any], Any], pins: bool, rank: int) -> None:
        self._rows, self._rank = rows, rank
        self._requests: Iterable[Request] = ()
        self._asked: deque[Request] = deque()  # and not answered yet
        self._num_answered = 0
        self._desk = torch.full((rows.workers, 2), -1).share_memory_().numpy()  # type: ignore[no-untyped-call]
        """Of each worker, its process and the number of the request that it is at."""
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._answers: Iterator[_Answer] = iter(())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as below
            self._loader: DataLoader[Any] | None = DataLoader(
                _Readable(rows, finish=finish, desk=self._desk),
                sampler=_Numbered(self),
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=rows.workers,
                prefetch_factor=AHEAD,
                persistent_workers=True,
                pin_memory=pins,
                multiprocessing_context="fork",
                worker_init_fn=_Settle(os.getpid()),
                generator=torch.Generator(),  # or it would draw from the process's own
            )

    def read(self, requests: Iterable[Request]) -> None:
        """Have these requests read from now on, and forget what was asked for before.

        Raises:
            RowError: a worker has ended since.
        """
        assert self._loader is not None, "the workers have ended"
        self._requests = requests
        self._asked.clear()
        self._num_answered = 0
        if self._processes:
            with self._deaths_told():
                self._answers = iter(self._loader)
            return
        before = set(multiprocessing.active_children())
        with _signals_blocked(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python 3.12: forked beside threads; of torch: more workers than cores
            on_death = signal.getsignal(signal.SIGCHLD)
            self._answers = iter(self._loader)
            signal.signal(signal.SIGCHLD, on_death)  # torch's raises wherever this process is; see `answer`
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        atexit.register(self.close)  # before multiprocessing asks them to end, and waits

    def requested(self) -> Iterator[tuple[int, Request]]:
        """Yield what the workers are asked for."""
        for number, request in enumerate(self._requests):
            self._asked.append(request)
            yield number, request

    def answer(self) -> tuple[Request, Any]:
        """Return the oldest request that was not answered yet, and its tree.

        Raises:
            DataError: rows cannot be had.
            RowError: a worker has ended.
            StopIteration: all requests were answered.
        """
        with self._deaths_told():
            answer = next(self._answers)
        self._num_answered += 1
        request = self._asked.popleft()
        if answer.problem:
            raise DataError(answer.problem)
        return request, answer.tree

    @contextmanager
    def _deaths_told(self) -> Iterator[None]:
        """Say of an error of the DataLoader which worker has ended, if one has."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:  # also where tensors were to be fetched from it
            ended = multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout=1.0)
            for process in self._processes:
                if process.sentinel in ended:
                    process.join()
                    raise RowError(self._told_of_death(process)) from error
            raise

    def _told_of_death(self, process: multiprocessing.process.BaseProcess) -> str:
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended by itself with exit code {code}"
        at = [number - self._num_answered for pid, number in self._desk.tolist() if pid == process.pid]
        ids = [self._rows.numbers(self._asked[place].ids.tolist()) for place in at if 0 <= place < len(self._asked)]
        where = f", while it read rows {first_of(ids[0])} ({len(ids[0])} rows)" if ids else ""
        who = f"a worker that reads rows ahead for rank {self._rank} (process {process.pid})"
        return f"{who} {how}{where}. {_ADVICE.get(code, NOTHING_LOST)}"

    def close(self) -> None:
        """End the workers, at once where they do not end by themselves."""
        atexit.unregister(self.close)
        self._answers, self._loader = iter(()), None  # which has them end
        for process in self._processes:
            process.kill()
            process.join()


class _Numbered:
    """Iterates over the requests of a loader from their beginning, as often as it is asked to."""

    def __init__(self, loader: Loader) -> None:
        self._loader = weakref.proxy(loader)

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        found: Iterator[tuple[int, Request]] = self._loader.requested()
        return found


class _Answer:
    """What a worker sends: a tree, or why there is none.

    A small tensor goes as its numbers, which takes 5 us; a large one as a descriptor of shared memory, 150 us.
    """

    def __init__(self, tree: Any, problem: str = "") -> None:
        self.tree, self.problem = tree, problem

    def __getstate__(self) -> tuple[Any, str]:
        return map_tree(_packed, self.tree), self.problem

    def __setstate__(self, state: tuple[Any, str]) -> None:
        packed, self.problem = state
        self.tree = map_tree(lambda leaf: torch.from_numpy(leaf.array) if isinstance(leaf, _Numbers) else leaf, packed)

    def pin_memory(self) -> _Answer:
        """Return it in pinned memory; the DataLoader calls it."""
        tree = map_tree(lambda leaf: leaf.pin_memory() if isinstance(leaf, Tensor) else leaf, self.tree)
        return _Answer(tree, self.problem)


class _Numbers:
    """A small tensor on its way."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array


def _packed(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
        return leaf
    if leaf.nbytes <= SENT_BYTES:
        with suppress(TypeError):  # numpy has no such type
            return _Numbers(leaf.numpy(force=True))
    return leaf.detach().resolve_conj()  # a graph stays in its process, and shared memory holds plain numbers


class _Sealed:
    """An answer that is pickled already: the thread that sends it would drop what it cannot pickle, or finds no shared
    memory for, without a word to the rank, which would wait for ever."""

    def __init__(self, answer: _Answer) -> None:
        self._content = bytes(ForkingPickler.dumps(answer))

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return ForkingPickler.loads, (self._content,)


class _Readable(Dataset[Any]):
    """What the DataLoader takes for the Dataset: it answers a request."""

    def __init__(self, rows: DatasetRows, *, finish: Callable[[Any], Any], desk: NDArray[np.int64]) -> None:
        self._rows, self._finish, self._desk = rows, finish, desk
        self._makes_again = bool(rows.opened.names())

    def __getitem__(self, numbered: tuple[int, Request]) -> _Sealed:
        number, request = numbered
        info = get_worker_info()
        assert info is not None, "this is for workers"
        self._desk[info.id] = os.getpid(), number
        try:
            if self._makes_again:
                self._rows.make_again()
                self._makes_again = False
            ids = request.ids if len(request.ids) else FIRST
            tree = map_tree(self._finish, self._rows.take(ids, epoch=request.epoch))
            answer = _sealed(tree)
        except DataError as error:
            problem = error.args[0]
            answer = _Sealed(_Answer(None, f"{problem}. {_ROOM}" if _IN_SHARED_MEMORY in problem else problem))
        self._desk[info.id, 1] = -1  # not where this process ends, which is then told with its rows
        return answer


def _sealed(tree: Any) -> _Sealed:
    """Return a tree as it is sent.

    Raises:
        DataError: it cannot be sent; names the place in the row.
    """
    try:
        return _Sealed(_Answer(tree))
    except Exception as error:
        if _IN_SHARED_MEMORY in str(error):
            raise DataError(f"rows of a micro-batch cannot be sent to the rank: {told(error)}") from error
        if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error):
            raise DataError(
                f"rows of a micro-batch cannot be sent to the rank: {told(error)}. Each tensor above "
                f"{SENT_BYTES // 1024} KB takes a descriptor: raise ulimit -n, or lower data.workers"
            ) from error
        culprits = (
            f"a {type(leaf).__name__} at {path or 'the row'}" for path, leaf in paths(tree) if not _is_sent(leaf)
        )
        what = next(culprits, "a container of its own class")
        raise DataError(
            f"rows have {what}, which a worker cannot send to its rank ({told(error)}); leave it out of the row, or "
            "set data.workers=0"
        ) from error


def _is_sent(leaf: Any) -> bool:
    try:
        ForkingPickler.dumps(_packed(leaf))
    except Exception:  # whatever its own way to be pickled raises
        return False
    return True


class _Settle:
    """Makes a process that was just forked a worker: it dies with its rank and leaves the rank's signals and
    connections alone."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, worker: int) -> None:
        die_with_parent(parent=self._rank)
        for number in StopSignals.NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignals.NUMBERS)
        gc.freeze()  # what it has inherited is the rank's to close, and memory that is not looked at stays shared
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        _leave_connections()
        _find_short_folder()


def _find_short_folder() -> None:
    """Have sockets, through which tensors are handed over, in a folder whose path is short enough for one.

    With a longer TMPDIR no large tensor could be handed over.
    """
    before = tempfile.tempdir
    if len(tempfile.gettempdir()) > LONGEST_FOLDER:
        tempfile.tempdir = "/tmp"
    multiprocessing.util.get_temp_dir()
    tempfile.tempdir = before


def _leave_connections() -> None:
    """Put /dev/null in the place of inherited sockets: peers of a rank that has died are to see that at once.

    What it says, which goes to a socket under systemd, is still heard.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of this very listing
            if int(name) > 2 and stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.dup2(nothing, int(name), inheritable=False)
    os.close(nothing)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Have no stop signal find a worker before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(answer: Any) -> Any:
    return answer

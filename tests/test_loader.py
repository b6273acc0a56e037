"""Rows that worker processes read ahead: the same bits as without, and nothing that a worker can break."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, get_worker_info

from harness.config.data import Pad
from harness.errors import DataError, RowError
from harness.rows import draws
from harness.rows.batches import Batch, TrainingBatches, ValidationBatches
from harness.rows.dataset import DatasetRows
from harness.rows.loader import _Answer
from harness.rows.open_files import OpenFiles
from harness.rows.order import BatchPlan
from harness.rows.own import own_splits
from tests.children import start_python
from tests.test_order import plans

CPU = torch.device("cpu")
NUM_ROWS = 50


def draw() -> list[float]:
    return [random.random(), float(np.random.randn()), float(torch.rand(()))]


class Rows(Dataset[Any]):
    """Row i tells its number, and what `tell(i)` says."""

    def __init__(self, tell: Callable[[int], Any] = lambda i: 0.0, num_rows: int = NUM_ROWS) -> None:
        self.tell, self.num_rows = tell, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"number": i, "told": self.tell(i), "text": f"row {i}"}


def drawn(i: int) -> Any:
    return torch.tensor(draw())


def seldom_drawn(i: int) -> Any:
    return torch.tensor(draw() if i % 17 == 3 else [0.0, 0.0, 0.0])


def a_plan(world_size: int = 1, micro_batch: int | None = 4) -> BatchPlan:
    return BatchPlan(num_rows=NUM_ROWS, global_batch=12, world_size=world_size, micro_batch=micro_batch, seed=1)


@contextmanager
def started(
    rows: DatasetRows, *, position: int = 0, rank: int = 0, plan: BatchPlan | None = None
) -> Iterator[TrainingBatches]:
    batches = TrainingBatches(rows, plan or a_plan(), rank=rank, device=CPU, dtype=torch.float32)
    try:
        batches.start(position)
        yield batches
    finally:
        batches.close()


def rows_of(dataset: Dataset[Any], *, workers: int = 0) -> DatasetRows:
    return DatasetRows(dataset, seed=7, workers=workers)


def content(batches: list[Batch]) -> list[Any]:
    return [
        (b.ids.tolist(), b.is_padding, b.data["number"].tolist(), b.data["told"].tolist(), b.data["text"])
        for b in batches
    ]


def all_content(
    dataset: Dataset[Any],
    *,
    workers: int,
    positions: range = range(12),
    world_size: int = 1,
    micro_batch: int | None = 4,
) -> list[Any]:
    found = []
    for rank in range(world_size):
        plan = a_plan(world_size, micro_batch)
        rows = rows_of(dataset, workers=workers)
        with started(rows, position=positions.start, rank=rank, plan=plan) as batches:
            found += [content(batches.at(position)) for position in positions]
    return found


def pids_of_workers() -> list[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "pt_data_worker\n"]


@pytest.mark.parametrize("tell", [drawn, seldom_drawn, float])
@pytest.mark.parametrize(("workers", "world_size"), [(1, 1), (3, 1), (2, 3)])
def test_workers_give_the_bits_that_the_rank_itself_would(
    tell: Callable[[int], Any], workers: int, world_size: int
) -> None:
    alone = all_content(Rows(tell), workers=0, world_size=world_size)
    assert all_content(Rows(tell), workers=workers, world_size=world_size) == alone


def test_a_start_in_the_middle_goes_on_as_if_nothing_had_happened() -> None:
    whole = all_content(Rows(drawn), workers=0, positions=range(20))
    assert all_content(Rows(drawn), workers=2, positions=range(7, 20)) == whole[7:]


@pytest.mark.parametrize("micro_batch", [1, 5, None])
def test_what_only_some_rows_draw_does_not_depend_on_who_reads_them_with_which(micro_batch: int | None) -> None:
    def by_row(workers: int, micro_batch: int | None) -> dict[Any, Any]:
        batches = all_content(Rows(seldom_drawn), workers=workers, positions=range(5), micro_batch=micro_batch)
        return {
            number: told
            for update in batches
            for _, _, numbers, many, _ in update
            for number, told in zip(numbers, many, strict=True)
        }

    wanted = by_row(0, 4)
    assert sorted(wanted) == list(range(NUM_ROWS))
    assert len({tuple(told) for number, told in wanted.items() if number % 17 == 3}) == 3
    assert by_row(0, micro_batch) == by_row(2, micro_batch) == wanted


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tell", [drawn, float])
def test_the_random_numbers_of_the_process_are_left_alone(workers: int, tell: Callable[[int], Any]) -> None:
    draws.seed(5)
    draw()  # leaves a second number of numpy's randn over
    before = draws.state()
    wanted = draw()
    draws.restore(before)
    all_content(Rows(tell), workers=workers)
    assert draw() == wanted


def test_any_other_position_is_read_by_the_rank_and_the_workers_go_on() -> None:
    wanted = all_content(Rows(drawn), workers=0)
    with started(rows_of(Rows(drawn), workers=2)) as batches:
        assert content(batches.at(0)) == wanted[0]
        assert content(batches.at(5)) == wanted[5]
        assert content(batches.at(0)) == wanted[0]
        assert batches.some([3]).data["number"].tolist() == [3]
        assert [content(batches.at(position)) for position in range(1, 12)] == wanted[1:]


def test_each_evaluation_has_every_row_once_as_in_the_first_epoch_also_beside_training() -> None:
    def evaluations(workers: int) -> list[Any]:
        rows = rows_of(Rows(drawn), workers=workers)
        validation = ValidationBatches(rows, rank=0, world_size=1, batch_rows=7, device=CPU, dtype=torch.float32)
        with started(rows) as batches:
            validation.start()
            found = []
            for position in range(3):
                batches.at(position)
                found.append(content(list(validation)))
            validation.close()
        return found

    first, *others = evaluations(2)
    assert [row for _, _, numbers, _, _ in first for row in numbers] == list(range(NUM_ROWS))
    assert others == [first, first] == evaluations(0)[1:]


def test_rows_that_draw_nothing_are_asked_for_at_once_where_the_dataset_can_do_that() -> None:
    class Together(Rows):
        asked: ClassVar[list[Any]] = []

        def __getitems__(self, ids: list[int]) -> list[Any]:
            self.asked.append(ids)
            return [Rows.__getitem__(self, i) for i in ids]

    class Lying(Together):
        def __getitems__(self, ids: list[int]) -> list[Any]:
            return super().__getitems__(ids[::-1])

    for dataset, is_asked_together in ((Together(float), True), (Together(drawn), False), (Lying(float), False)):
        rows = rows_of(dataset)
        assert not rows.look()
        dataset.asked.clear()
        tree = rows.take(np.array([4, 9]), epoch=0)
        assert tree["number"].tolist() == [4, 9]
        assert dataset.asked == ([[4, 9]] if is_asked_together else [])


def test_a_generator_that_is_seeded_from_torchs_seed_follows_the_row_as_the_global_ones_do() -> None:
    def seeded(i: int) -> float:
        return float(np.random.default_rng(torch.initial_seed()).random())  # draws from no global generator

    def by_row(micro_batch: int) -> list[Any]:
        rows = rows_of(Rows(seeded))
        assert not rows.look()
        assert rows.draws
        with started(rows, plan=a_plan(1, micro_batch)) as batches:
            found = [batch for position in range(4) for batch in batches.at(position)]
        return sorted(
            pair for b in found for pair in zip(b.data["number"].tolist(), b.data["told"].tolist(), strict=True)
        )

    assert by_row(1) == by_row(6)


@st.composite
def readings(draw: st.DrawFn) -> tuple[BatchPlan, int, Pad | None]:
    """A plan, a number of workers and a way to make batches; one in five is read by processes."""
    plan: BatchPlan = draw(plans().filter(lambda plan: plan.num_rows <= 100 and plan.world_size <= 4))
    workers = draw(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 0, 1, 2]))
    return plan, workers, draw(st.sampled_from([None, Pad(pad=0), Pad(pad={"number": -1}, multiple_of=4)]))


Reading = tuple[BatchPlan, int, Pad | None]


def rows_of_two_epochs(reading: Reading) -> list[tuple[list[int], list[int]]]:
    """Of each epoch the numbers that the rows of all ranks tell, and those that they were asked for by."""
    plan, workers, pad = reading
    epochs = []
    for rank in range(plan.world_size):
        dataset = Rows(lambda i: torch.rand(1), plan.num_rows) if plan.seed % 2 else Ragged(plan.num_rows, pad)
        with started(DatasetRows(dataset, seed=0, workers=workers, pad=pad), rank=rank, plan=plan) as batches:
            steps = plan.steps_per_epoch
            epochs.append([[batches.at(step + epoch * steps) for step in range(steps)] for epoch in range(2)])
    found = []
    for of_ranks in zip(*epochs, strict=True):
        real = [batch for steps in of_ranks for step in steps for batch in step if not batch.is_padding]
        told = [int(batch.data["number"][place].max()) for batch in real for place in range(batch.num_rows)]
        found.append((told, [row for batch in real for row in batch.ids.tolist()]))
    return found


class Ragged(Dataset[Any]):
    """Row i is i, some times over where it can be padded."""

    def __init__(self, num_rows: int, pad: Pad | None) -> None:
        self.num_rows, self.may_differ = num_rows, pad is not None

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> Any:
        return {"number": torch.full((1 + self.may_differ * (i % 5),), i)}


@settings(max_examples=100)
@given(readings())
def test_every_row_comes_once_an_epoch_whatever_ranks_workers_micro_batch_and_collate(reading: Reading) -> None:
    for told, asked in rows_of_two_epochs(reading):
        assert told == asked
        assert sorted(told) == list(range(reading[0].num_rows))


@pytest.mark.long
@settings(max_examples=5000)
@given(readings())
def test_every_row_comes_once_an_epoch_in_five_thousand_plans(reading: Reading) -> None:
    for told, asked in rows_of_two_epochs(reading):
        assert told == asked
        assert sorted(told) == list(range(reading[0].num_rows))


# ---------------------------------------------------------------- what breaks


def fails_at(number: int, fault: Callable[[], Any]) -> Rows:
    return Rows(lambda i: fault() if i == number else 0.0)


def read_all(dataset: Dataset[Any], *, workers: int = 2) -> None:
    with started(rows_of(dataset, workers=workers)) as batches:
        for position in range(5):
            batches.at(position)


def test_a_row_that_raises_in_a_worker_is_told_as_in_the_rank() -> None:
    messages = []
    for workers in (0, 2):
        with pytest.raises(RowError) as caught:
            read_all(fails_at(31, lambda: {}["pixels"]), workers=workers)
        messages.append(caught.value.args[0])
    assert messages[0] == messages[1]
    assert messages[0].startswith("row 31 of Rows raised KeyError: 'pixels' (")
    assert messages[0].endswith("(on rank 0)")


def test_what_is_wrong_with_a_row_is_told_also_where_batches_are_pinned_for_a_gpu() -> None:
    assert _Answer(None, "row 31 raised").pin_memory().problem == "row 31 raised"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was ended by SIGKILL, while it read row.* memory runs out"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "was ended by SIGBUS, while it read row.* /dev/shm"),
        (lambda: os._exit(4), "ended by itself with exit code 4, while it read row"),
    ],
)
def test_a_worker_that_ends_is_told_with_the_rows_it_was_at(end: Callable[[], None], said: str) -> None:
    with pytest.raises(RowError, match=said) as caught:
        read_all(fails_at(31, end))
    ids = next(ids for position in range(5) for ids in np.split(a_plan().sample_ids(position, 0), 3) if 31 in ids)
    assert f"rows {', '.join(map(str, ids))} (4 rows)" in caught.value.args[0]
    assert "start the same command again" in caught.value.args[0]
    assert caught.value.exit_code == 3
    assert not pids_of_workers()


def test_a_worker_that_ends_between_two_evaluations_is_told_at_the_next() -> None:
    rows = rows_of(Rows(drawn), workers=2)
    validation = ValidationBatches(rows, rank=1, world_size=2, batch_rows=7, device=CPU, dtype=torch.float32)
    list(validation)
    pid = pids_of_workers()[0]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RowError, match=rf"for rank 1 \(process {pid}\) was ended by SIGKILL\. The system does so"):
        list(validation)
    validation.close()
    assert not pids_of_workers()


def test_what_cannot_be_sent_is_told_instead_of_waited_for_for_ever() -> None:
    @dataclass
    class Local:
        x: int

    with pytest.raises(RowError, match=r"rows have a function at told\.0.*, which a worker cannot send"):
        read_all(Rows(lambda i: [lambda: i, 1]))
    with pytest.raises(RowError, match=r"rows have a container of its own class, which a worker cannot send"):
        read_all(Rows(Local))


class Stacked(Rows):
    def collate(self, rows: list[Any]) -> Any:
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("number", "told")}


def large_without_shared_memory(i: int) -> Any:
    if get_worker_info() is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return torch.zeros(20_000)


@pytest.mark.parametrize("kind", [Rows, Stacked])
def test_rows_that_find_no_shared_memory_are_told_instead_of_waited_for_for_ever(kind: type[Rows]) -> None:
    said = r"unable to (allocate|resize) .*Rows go through /dev/shm, which may be full.*--shm-size.*\(on rank 0\)"
    with pytest.raises(RowError, match=said):
        read_all(kind(large_without_shared_memory))


def test_rows_that_a_network_has_made_leave_its_gradients_in_the_worker() -> None:
    weight = torch.ones(20_000, requires_grad=True)
    with started(rows_of(Stacked(lambda i: weight * i), workers=2)) as batches:
        (first, *_) = batches.at(0)
    assert not first.data["told"].requires_grad
    assert first.data["told"][:, 0].tolist() == first.data["number"].tolist()


class Collating(Rows):
    """Row i tells its number; a batch has beside it what `collated(number of rows)` makes."""

    def __init__(self, collated: Callable[[int], Any]) -> None:
        super().__init__()
        self.collated = collated

    def collate(self, rows: list[Any]) -> Any:
        found = {name: torch.tensor([row[name] for row in rows]) for name in ("number", "told")}
        return {**found, "text": self.collated(len(rows))}


LARGE = 20_000  # which goes through shared memory


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "collated",
    [
        lambda count: torch.zeros(count, LARGE, requires_grad=True) + 1,
        lambda count: torch.zeros(count, 2, requires_grad=True) + 1,
        lambda count: torch.full((count, LARGE), 1j).conj(),
        lambda count: torch.eye(count).to_sparse(),
    ],
    ids=["large with a graph", "with a graph", "conjugate", "sparse"],
)
def test_whatever_kind_of_tensor_collate_makes_arrives_as_it_is_without_workers(collated: Callable[[int], Any]) -> None:
    found = []
    for workers in (0, 1):
        with started(rows_of(Collating(collated), workers=workers)) as batches:
            found.append([batch.data["text"].detach().to_dense() for batch in batches.at(0)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_with_a_graph_are_stacked_by_workers_too() -> None:
    with started(rows_of(Rows(lambda i: i * torch.ones(LARGE, requires_grad=True)), workers=2)) as batches:
        batch = batches.at(0)[0]
    assert not batch.data["told"].requires_grad
    assert batch.data["told"].mean(1).tolist() == batch.ids.tolist()


@pytest.mark.parametrize("error", [SystemExit("bye"), KeyboardInterrupt()])
def test_a_worker_that_a_row_ends_by_an_exception_is_told_with_its_rows_too(error: BaseException) -> None:
    def end() -> None:
        if get_worker_info() is not None:
            raise error

    with pytest.raises(RowError, match=r"ended by itself with exit code \d, while it read rows .*31"):
        read_all(fails_at(31, end))


def test_a_number_that_no_tensor_holds_is_told_by_row() -> None:
    with pytest.raises(DataError, match=r"row 31 has 18446744073709551617 at told, which is too large for a tensor"):
        rows_of(Rows(lambda i: 2**64 + 1 if i == 31 else i)).take(np.array([30, 31]), epoch=0)


def test_a_dataclass_may_have_fields_that_its_constructor_does_not_take() -> None:
    @dataclass(frozen=True)
    class Pair:
        one: Any
        other: int = field(init=False, default=3)

    told = rows_of(Rows(Pair)).take(np.array([4, 5]), epoch=0)["told"]
    assert (told.one.tolist(), told.other.tolist()) == ([4, 5], [3, 3])


def test_a_function_that_has_no_name_may_make_the_rows() -> None:
    with started(rows_of(Rows(lambda i: torch.tensor(2 * i)), workers=2)) as batches:
        batch = batches.at(0)[0]
    assert batch.data["told"].tolist() == [2 * row for row in batch.ids.tolist()]


@pytest.mark.parametrize("row", [{"x": torch.zeros(2, device="meta")}, torch.zeros(2, device="meta")])
def test_a_row_that_is_not_on_the_cpu_is_refused(row: Any) -> None:
    with pytest.raises(DataError, match=r"row 0 has a tensor on meta( at told.x| at told); leave rows on the CPU"):
        rows_of(Rows(lambda i: row)).look()


def test_a_dataset_that_has_another_length_now_says_so_where_a_row_is_missing() -> None:
    class Shrinks(Rows):
        def __getitem__(self, i: int) -> Any:
            if i >= self.num_rows:
                raise IndexError(i)
            return super().__getitem__(i)

    dataset = Shrinks()
    rows = rows_of(dataset)
    rows.take(np.array([3, 45]), epoch=0)
    dataset.num_rows = 40
    with pytest.raises(DataError, match=r"row 45 .*its length was 50 and is 40 now"):
        rows.take(np.array([3, 45]), epoch=0)


@pytest.mark.parametrize("length", [40, 60])
def test_a_dataset_that_has_another_length_is_told_in_the_next_epoch_though_no_row_is_missing(length: int) -> None:
    dataset = Rows(float)
    rows = rows_of(dataset)
    rows.take(np.array([3]), epoch=0)
    dataset.num_rows = length
    with pytest.raises(DataError, match=f"Rows had 50 rows when the run began and has {length} now, so rows may have"):
        rows.take(np.array([3]), epoch=1)


def test_a_worker_that_makes_a_dataset_of_another_length_says_so() -> None:
    rows = DatasetRows(Rows(float), seed=0, make=lambda: Rows(float, 60))
    rows.take(np.array([3]), epoch=0)
    rows.make_again()
    with pytest.raises(DataError, match="Rows had 50 rows when the run began and has 60 now"):
        rows.take(np.array([3]), epoch=0)


# ---------------------------------------------------------------- processes


def test_workers_ignore_the_signals_of_their_rank() -> None:
    with started(rows_of(Rows(drawn), workers=2)) as batches:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            for pid in pids_of_workers():
                os.kill(pid, number)
        found = [content(batches.at(position)) for position in range(12)]
    assert found == all_content(Rows(drawn), workers=0)


def test_what_the_rank_does_with_signals_stays_as_it_was() -> None:
    numbers = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    read_all(Rows())
    assert ([signal.getsignal(number) for number in numbers], signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


RANK = """
import torch
from tests.test_loader import *
asked = itertools.count()
def tell(i):
    if next(asked) >= {rows}:
        time.sleep(600)
    return torch.zeros(20_000)  # goes through shared memory
batches = TrainingBatches(rows_of(Rows(tell), workers=2), a_plan(), rank=0, device=CPU, dtype=torch.float32)
batches.start(0)
batches.at(0)
print(*pids_of_workers(), flush=True)
{then}
"""


def are_gone(pids: list[int], *, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(map(is_alive, pids)):
            return True
        time.sleep(0.02)
    return False


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def leftovers() -> Iterator[None]:
    """What the workers of a killed rank leave of multiprocessing's: a folder each."""
    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("pymp-*"))
    yield
    for path in set(folder.glob("pymp-*")) - before:
        shutil.rmtree(path)


@pytest.mark.usefixtures("leftovers")
def test_workers_die_with_their_rank() -> None:
    process = start_python(RANK.format(rows=8, then="input()"))
    pids = [int(pid) for pid in process.stdout.readline().split()]  # type: ignore[union-attr]
    assert len(pids) == 2
    process.kill()
    process.wait()
    try:
        assert are_gone(pids), "though each is in the midst of a row"
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_a_rank_that_fails_without_ending_its_workers_does_not_wait_for_them() -> None:
    process = start_python(RANK.format(rows=10**9, then="raise SystemExit(9)"))
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 9
    assert are_gone([int(pid) for pid in stdout.split()])


def test_a_worker_that_is_stuck_is_ended_with_the_others() -> None:
    began = time.monotonic()
    with started(rows_of(Rows(lambda i: time.sleep(600)), workers=1)):
        pids = pids_of_workers()
    assert are_gone(pids, within=1)
    assert time.monotonic() - began < 30


def test_workers_hand_tensors_over_where_the_path_of_tmpdir_is_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    process = start_python(
        f"import tempfile; tempfile.tempdir = {str(folder)!r}"
        + RANK.format(rows=10**9, then="batches.at(1); batches.close()")
    )
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not list(folder.iterdir())


def test_a_worker_computes_with_one_thread() -> None:
    tell = lambda i: [torch.get_num_threads(), int(os.environ["OMP_NUM_THREADS"])]  # noqa: E731
    with started(rows_of(Rows(tell), workers=1)) as batches:
        one, other = batches.at(0)[0].data["told"]
    assert set(one.tolist()) == set(other.tolist()) == {1}


def test_what_a_worker_says_is_heard_where_it_goes_to_a_socket() -> None:
    mine, its = socket.socketpair()
    said = RANK.replace("    return", "    os.write(1, b'from a worker ')\n    return")
    with start_python(said.format(rows=10**9, then="batches.close()"), stdout=its):
        its.close()
        heard = b"".join(iter(lambda: mine.recv(4096), b""))
    mine.close()
    assert b"from a worker" in heard


def test_the_peers_of_a_rank_see_that_it_has_gone_while_its_workers_are_still_there() -> None:
    mine, peer = socket.socketpair()
    tell = lambda i: float(stat.S_ISSOCK(os.fstat(mine.fileno()).st_mode))  # noqa: E731
    with started(rows_of(Rows(tell), workers=2)) as batches:
        assert not batches.at(0)[0].data["told"].any()
        mine.close()
        peer.settimeout(5)
        assert peer.recv(1) == b"", "the end of the connection"
    peer.close()


# ---------------------------------------------------------------- what a Dataset holds open


class Holding(Rows):
    """Reads its rows from something that it opens when it is made, or with its first row."""

    opened: ClassVar[list[Any]] = []

    def __init__(self, open_it: Callable[[], Any], read: Callable[[Any, int], float], *, lazily: bool = False) -> None:
        super().__init__()
        self.made_by, self.read, self.open_it = os.getpid(), read, open_it
        self.held = None if lazily else self.open()

    def open(self) -> Any:
        self.opened.append(self.open_it())
        return self.opened[-1]

    def __getitem__(self, i: int) -> Any:
        self.held = self.held if self.held is not None else self.open()
        in_a_worker = get_worker_info() is not None
        own = self.made_by == os.getpid()
        return {"number": i, "told": self.read(self.held, i), "text": "own" if own and in_a_worker else "shared"}


def numbers_file(folder: Path) -> Path:
    path = folder / "numbers.bin"
    np.arange(NUM_ROWS, dtype=np.float64).tofile(path)
    return path


def read_number(file: Any, i: int) -> float:
    file.seek(8 * i)
    return float(np.frombuffer(file.read(8))[0])


def a_file(folder: Path) -> tuple[Callable[[], Any], Callable[[Any, int], float]]:
    return partial(open, numbers_file(folder), "rb", buffering=0), read_number


def a_database(folder: Path) -> tuple[Callable[[], Any], Callable[[Any, int], float]]:
    path = folder / "numbers.db"
    with sqlite3.connect(path) as written:
        written.execute("create table numbers (i integer primary key, x real)")
        written.executemany("insert into numbers values (?, ?)", [(i, float(i)) for i in range(NUM_ROWS)])
    query = "select x from numbers where i = ?"
    return partial(sqlite3.connect, path), lambda held, i: float(held.execute(query, (i,)).fetchone()[0])


def an_hdf5_file(folder: Path) -> tuple[Callable[[], Any], Callable[[Any, int], float]]:
    with h5py.File(folder / "numbers.h5", "w") as file:
        file["x"] = np.arange(NUM_ROWS, dtype=np.float64)
    return partial(h5py.File, folder / "numbers.h5", "r"), lambda held, i: float(held["x"][i])


def a_connection(folder: Path) -> tuple[Callable[[], Any], Callable[[Any, int], float]]:
    return socket.socketpair, lambda held, i: float(i)


class Echo:
    """A process that says again whatever it is told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def close(self) -> None:
        self.process.communicate()

    def ask(self, i: int) -> float:
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None
        assert answers is not None
        asked.write(f"{i:9}".encode())
        time.sleep(0.001)  # in which another could take the answer
        return float(answers.read(9))


def a_process(folder: Path) -> tuple[Callable[[], Any], Callable[[Any, int], float]]:
    return Echo, Echo.ask


def mapped(folder: Path) -> tuple[Callable[[], Any], Callable[[Any, int], float]]:
    return partial(np.memmap, numbers_file(folder), np.float64), lambda held, i: float(held[i])


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize(
    ("kind", "who"),
    [
        (a_file, "own"),
        (a_database, "own"),
        (an_hdf5_file, "own"),
        (a_connection, "own"),
        (a_process, "own"),
        (mapped, "shared"),
    ],
)
def test_a_worker_makes_its_own_dataset_where_one_holds_something_open(
    kind: Callable[[Path], Any], who: str, lazily: bool, tmp_path: Path
) -> None:
    open_it, read = kind(tmp_path)
    splits = own_splits(
        partial(Holding, open_it, read, lazily=lazily), has_split=False, validation_fraction=0.2, seed=0, workers=3
    )
    assert isinstance(splits.train, DatasetRows)
    plan = BatchPlan(num_rows=len(splits.train), global_batch=8, world_size=1, micro_batch=2, seed=0)
    with started(splits.train, plan=plan) as batches:
        found = [batch for position in range(50) for batch in batches.at(position)]
    for held in Holding.opened:
        for each in held if isinstance(held, tuple) else [held]:
            getattr(each, "close", int)()
    Holding.opened.clear()
    assert all(batch.data["told"].tolist() == batch.data["number"].tolist() for batch in found)
    assert {text for batch in found for text in batch.data["text"]} == {who}


@pytest.mark.parametrize("lazily", [False, True])
def test_a_worker_makes_its_own_dataset_where_one_has_threads_which_a_fork_does_not_copy(lazily: bool) -> None:
    pools: list[Any] = []

    def a_pool() -> ThreadPoolExecutor:
        pools.append(ThreadPoolExecutor(1, thread_name_prefix="mine"))
        return pools[-1]

    read = lambda pool, i: pool.submit(float, i).result(timeout=20)  # noqa: E731
    splits = own_splits(
        partial(Holding, a_pool, read, lazily=lazily), has_split=False, validation_fraction=0.2, seed=0, workers=1
    )
    assert isinstance(splits.train, DatasetRows)
    splits.train.look()
    assert splits.train.opened.names() == ["thread mine_0"]
    plan = BatchPlan(num_rows=len(splits.train), global_batch=8, world_size=1, micro_batch=2, seed=0)
    with started(splits.train, plan=plan) as batches:
        found = batches.at(0)
    pools[0].shutdown()
    assert splits.train.opened.names() == []
    assert all(batch.data["told"].tolist() == batch.data["number"].tolist() for batch in found)
    assert {text for batch in found for text in batch.data["text"]} == {"own"}


def test_the_pipe_to_the_tracker_of_shared_memory_is_nothing_that_a_dataset_holds_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracker, opened = resource_tracker.ResourceTracker(), OpenFiles()
    monkeypatch.setattr(resource_tracker, "_resource_tracker", tracker)
    with opened.noted():
        tracker.ensure_running()
    assert not [name for name in opened.names() if "pipe" in name]
    tracker._stop()  # type: ignore[attr-defined]


def test_a_thread_that_shows_how_far_a_bar_is_is_none_that_rows_wait_for() -> None:
    monitor = type("TMonitor", (threading.Thread,), {"__module__": "tqdm._monitor"})
    end, opened = threading.Event(), OpenFiles()
    with opened.noted():
        monitor(target=end.wait).start()
    assert opened.names() == []
    end.set()


def test_a_dataset_that_cannot_be_made_once_more_says_so(tmp_path: Path) -> None:
    open_it, read = a_file(tmp_path)

    def make() -> Any:
        if get_worker_info() is not None:
            raise OSError("only one connection is allowed")
        return Holding(open_it, read)

    splits = own_splits(make, has_split=False, validation_fraction=0.2, seed=0, workers=1)
    plan = BatchPlan(num_rows=len(splits.train), global_batch=8, world_size=1, micro_batch=2, seed=0)
    assert isinstance(splits.train, DatasetRows)
    said = r"Holding holds .*numbers.bin, so a worker has to make its own, which raised OSError: only one.*workers=0"
    with pytest.raises(RowError, match=said), started(splits.train, plan=plan) as batches:
        batches.at(0)
    Holding.opened[-1].close()


def test_open_files_are_those_that_were_opened_meanwhile_and_are_open_still(tmp_path: Path) -> None:
    before = (tmp_path / "before").open("w")
    opened = OpenFiles()
    with opened.noted():
        closed = (tmp_path / "closed").open("w")
        kept = (tmp_path / "kept").open("w")
        later = (tmp_path / "later").open("w")
    closed.close()
    assert opened.names() == [str(tmp_path / "kept"), str(tmp_path / "later")]
    later.close()
    assert opened.names() == [str(tmp_path / "kept")]
    before.close(), kept.close()


# ---------------------------------------------------------------- what a resumed run compares


def compared(tell: Callable[[int], Any], num_rows: int = 300) -> DatasetRows:
    return rows_of(Rows(tell, num_rows))


def difference(before: DatasetRows, now: DatasetRows) -> str:
    return now.difference(before.compared, there="then", here="now")


def test_what_has_changed_is_told_by_row() -> None:
    rows = compared(float)
    numbers = list(map(int, rows.compared["rows"]))
    assert (len(numbers), numbers[0], {after - before for before, after in itertools.pairwise(numbers)}) == (
        64,
        0,
        {4, 5},
    )
    assert difference(rows, compared(float)) == ""
    assert (
        difference(rows, compared(drawn))
        == "row 0, 4, 9, 14, ... is another now than then (64 of 64 that were compared)"
    )
    changed = compared(lambda i: float(i) + (i == 28))
    assert difference(rows, changed) == "row 28 is another now than then (1 of 64 that were compared)"
    assert difference(rows, compared(float, 299)) == "300 rows then, 299 now"
    assert difference(compared(drawn), compared(drawn)) == ""
    other_type = compared(lambda i: i)
    assert difference(rows, other_type).startswith("row 0, 4, 9")
    parts = [compared(float).only(np.arange(first, 300, 2)) for first in (0, 1)]
    assert difference(*parts) == "row 0, 4, 8, 14, ... then, row 1, 5, 9, 15, ... now"


def test_rows_that_are_never_the_same_say_nothing_of_the_data() -> None:
    own = itertools.count()
    strange = compared(lambda i: float(next(own)) if i == 28 else float(i))
    assert difference(strange, strange) == ""
    assert difference(compared(float), strange) == ""
    assert compared(lambda i: float(next(own))).look()[:2] == [0, 37]


def test_rows_that_keep_what_was_drawn_for_them_are_seen_though_they_are_the_same_twice() -> None:
    kept: dict[int, Any] = {}

    def keeps(i: int) -> Any:
        return kept.setdefault(i, drawn(i)) if i not in kept else kept[i]

    for tell, found in ((keeps, [0, 37]), (drawn, []), (float, [])):
        kept.clear()
        assert compared(tell).look()[:2] == found
    kept.clear()
    rows = compared(keeps)
    assert rows.compared
    assert rows.look(), "also where they were asked for before"


def test_a_dataset_that_says_what_it_is_is_believed_and_no_row_is_read_for_it() -> None:
    class Says(Rows):
        said = "a"

        def digest(self) -> str:
            return self.said

        def __getitem__(self, i: int) -> Any:
            raise AssertionError("nobody is to ask")

    class Other(Says):
        said = "b"

    assert difference(rows_of(Says()), rows_of(Says())) == ""
    assert difference(rows_of(Says()), rows_of(Other())) == "their digest() is a then, b now"


def test_what_collate_draws_is_noted() -> None:
    class Drawing(Rows):
        def collate(self, rows: list[Any]) -> Any:
            return {"number": torch.tensor([row["number"] for row in rows]), "drawn": torch.rand(len(rows))}

    for dataset, is_drawn in ((Drawing(), True), (Rows(drawn), False)):
        rows = rows_of(dataset)
        rows.look()
        assert rows.collate_draws is is_drawn
    rows = rows_of(Drawing())
    one, other = (rows.take(np.arange(4), epoch=0)["drawn"].tolist() for _ in range(2))
    assert one == other


def test_data_are_made_with_random_numbers_that_follow_from_the_seed() -> None:
    def made(seed: int) -> list[Any]:
        permuted: list[Any] = []

        def make(split: str) -> Rows:
            permuted.append((draw(), torch.randperm(20).tolist()))
            return Rows()

        before = draws.state()
        own_splits(make, has_split=True, validation_fraction=0.2, seed=seed)
        assert not draws.drew(before, draws.state()), "the process's own are as they were"
        return permuted

    train, validation = made(1)
    assert train == validation, "so that two splits of one permutation are apart"
    assert made(1) == [train, validation]
    assert made(2)[0] != train

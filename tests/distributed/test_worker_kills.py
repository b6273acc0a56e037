"""Runs whose rows are read by workers and drawn at random, killed by SIGKILL and started again with other workers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.worker_runs import (
    RAGGED,
    SEGMENTATION,
    Example,
    assert_close,
    copied,
    files,
    lines,
    starts,
    sums,
    tensors,
    without_leftovers,
)
from tests.helpers import plain_ledger

WORKERS = (0, 1, 3)
"""With which a run goes on that had two."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with without_leftovers():
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    return Alone(tmp_path_factory.mktemp("kills"))


class Alone:
    """Runs that nothing happens to, each made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.of = cache(self._of)
        self.expected = cache(Example.expected)

    def _of(self, example: Example, world_size: int) -> Path:
        name = f"{example.name}-alone-{world_size}"
        example.train(world_size, self.folder, name)
        return self.folder / name


def assert_a_kill_changes_nothing(
    alone: Alone, example: Example, world_size: int, after: int, workers: tuple[int, ...]
) -> None:
    wanted, folder = alone.of(example, world_size), alone.folder
    killed = f"{example.name}-on-{world_size}-killed-after-{after}"
    victims = range(world_size) if after % 2 else [world_size - 1]
    example.kill(world_size, folder, killed, after=after, victims=victims)
    for number in workers:
        name = f"{killed}-workers-{number}"
        copied(folder / killed, name)
        example.train(world_size, folder, name, f"data.workers={number}")
        assert starts(folder / name) == [0, after]
        assert plain_ledger(folder / name / "ledger.jsonl") == plain_ledger(wanted / "ledger.jsonl")
        assert files(folder / name, example.updates) == files(wanted, example.updates)


@pytest.mark.parametrize(
    ("example", "world_size"),
    [(RAGGED, 1), (RAGGED, 2), (SEGMENTATION, 1)],
    ids=["ragged-1", "ragged-2", "segmentation-1"],
)
def test_every_row_draws_from_all_three_generators_what_its_seed_epoch_and_number_say(
    example: Example, world_size: int, alone: Alone
) -> None:
    expected, targets = alone.expected(example)
    assert sums(alone.of(example, world_size), targets) == expected
    sizes = (12, 12, 8) if example is RAGGED else (6, 6, 2)
    assert [wanted["drew"] for wanted in expected] == [3 * size for size in sizes * (example.updates // 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "world_size", "after", "workers"),
    [(RAGGED, 2, 2, (0, 3)), (RAGGED, 2, 5, (1,)), (SEGMENTATION, 1, 2, (3,))],
    ids=["ragged-2-2", "ragged-2-5", "segmentation-1-2"],
)
def test_a_killed_run_goes_on_with_other_workers_to_the_same_bits(
    example: Example, world_size: int, after: int, workers: tuple[int, ...], alone: Alone
) -> None:
    assert_a_kill_changes_nothing(alone, example, world_size, after, workers)


@pytest.mark.long
@pytest.mark.parametrize("example", [RAGGED, SEGMENTATION], ids=["ragged", "segmentation"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_after_any_update_goes_on_with_other_workers_to_the_same_bits(
    example: Example, world_size: int, alone: Alone
) -> None:
    for after in range(1, example.updates):
        assert_a_kill_changes_nothing(alone, example, world_size, after, WORKERS)


def assert_other_ranks_read_the_same_rows(alone: Alone, example: Example, cuts: tuple[int, int]) -> None:
    """Go from one rank to two after the first cut, to three after the second: once by kills, once by ordinary stops."""
    wanted, folder, (first, second) = alone.of(example, 1), alone.folder, cuts
    killed, stopped = (f"{example.name}-{how}-after-{first}-and-{second}" for how in ("killed", "stopped"))
    example.kill(1, folder, killed, after=first, victims=[0])
    example.kill(2, folder, killed, "data.workers=1", after=second, victims=[0, 1])
    example.train(3, folder, killed, "data.workers=3")
    example.train(1, folder, stopped, f"run.max_steps={first}")
    example.train(2, folder, stopped, f"run.max_steps={second}", "data.workers=0")
    example.train(3, folder, stopped)
    assert starts(folder / killed) == starts(folder / stopped) == [0, first, second]
    expected, targets = alone.expected(example)
    assert sums(folder / killed, targets) == expected
    for key in ("loss", "grad_norm"):
        found, before = ([line[key] for line in lines(run)] for run in (folder / killed, wanted))
        assert found == pytest.approx(before, rel=1e-12)
    ends = [tensors(run, example.updates) for run in (folder / killed, wanted)]
    assert_close(*ends, rel=1e-9)
    assert lines(folder / killed) == lines(folder / stopped)
    assert files(folder / killed, example.updates) == files(folder / stopped, example.updates)
    assert lines(folder / killed, "evaluation")[-1] == lines(folder / stopped, "evaluation")[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "cuts"), [(RAGGED, (2, 4)), (SEGMENTATION, (1, 4))], ids=["ragged", "segmentation"]
)
def test_a_killed_run_goes_on_with_the_same_rows_on_other_ranks(
    example: Example, cuts: tuple[int, int], alone: Alone
) -> None:
    assert_other_ranks_read_the_same_rows(alone, example, cuts)


@pytest.mark.long
@pytest.mark.parametrize("example", [RAGGED, SEGMENTATION], ids=["ragged", "segmentation"])
def test_a_run_killed_after_any_update_goes_on_with_the_same_rows_on_other_ranks(
    example: Example, alone: Alone
) -> None:
    for first in range(1, example.updates - 1):
        second = min(first + 1 + first % 3, example.updates - 1)
        assert_other_ranks_read_the_same_rows(alone, example, (first, second))

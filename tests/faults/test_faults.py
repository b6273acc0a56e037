"""A smoke of the campaigns that `make faults` runs in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.ranks import RankFailed
from tests.faults import corruption, exact_resume, kills
from tests.faults.__main__ import main

pytestmark = pytest.mark.slow


def test_whatever_is_damaged_all_ranks_fall_back_to_the_same_whole_checkpoint_or_all_refuse() -> None:
    counts = corruption.campaign(30, seed=10_000)
    outcomes = {name: count for name, count in counts.items() if not name.startswith("way: ")}
    assert set(outcomes) == {"detected, all fell back alike", "detected, all refused"}
    assert sum(outcomes.values()) == 30
    assert counts.keys() - outcomes.keys() == {f"way: {way.__name__}" for way in corruption.WAYS}


def test_a_part_that_breaks_off_is_counted_as_wrong_and_the_others_are_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_off(strategy: str, *_: object) -> Counter[str]:
        raise RankFailed(f"a rank of {strategy} died")

    monkeypatch.setattr(kills, "campaign", break_off)
    monkeypatch.setattr(
        exact_resume,
        "campaign",
        lambda *_: Counter({"runs": 1, "runs equal to the bit": 1, "kills after an update": 9}),
    )
    assert main(["ddp", "zero1", "--parts", "kills", "resume"]) == 1
    said = capsys.readouterr()
    assert said.err.count("RankFailed: a rank of ") == 2
    last = said.out.splitlines()[-1]
    assert "18 kills after an update, 2 of 2 runs equal to the bit; 2 wrong" in last
    assert main(["ddp", "--parts", "resume"]) == 0


@pytest.mark.parametrize(("strategy", "every"), [("ddp", 9), ("zero1", 40), ("zero3", 40)])
def test_wherever_a_save_is_killed_the_run_goes_on_from_a_whole_checkpoint_to_the_same_bits(
    strategy: str, every: int
) -> None:
    counts = kills.campaign(strategy, every=every)
    num_kills = counts.pop("kills in a save")
    assert num_kills >= 3
    assert set(counts) <= {f"resumed from step {step}" for step in (kills.OLDER, kills.NEWEST)}
    assert sum(counts.values()) == num_kills


def assert_that_it_is_the_run_that_was_left_alone(
    folder: Path, *, model: str, strategy: str, world_size: int, cuts: Sequence[int]
) -> None:
    exact_resume.write_data(folder)
    counts = exact_resume.chain(folder, model=model, strategy=strategy, world_size=world_size, cuts=cuts)
    assert counts == {"kills after an update": len(cuts), "runs": 1, "runs equal to the bit": 1}


@pytest.mark.parametrize(
    ("model", "strategy", "world_size", "first"),
    [("mlp", "ddp", 2, 1), ("cnn", "ddp", 4, 2), ("mlp", "zero2", 2, 2), ("gpt", "ddp", 2, 1), ("gpt", "zero3", 2, 2)],
)
def test_a_run_killed_after_every_second_update_is_the_run_that_was_left_alone(
    model: str, strategy: str, world_size: int, first: int, tmp_path: Path
) -> None:
    cuts = exact_resume.EVERY_CUT[first - 1 :: 2]
    assert_that_it_is_the_run_that_was_left_alone(
        tmp_path, model=model, strategy=strategy, world_size=world_size, cuts=cuts
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "strategy", "world_size"),
    [("mlp", "ddp", 2), ("cnn", "ddp", 8), ("mlp", "zero2", 2), ("gpt", "ddp", 2), ("gpt", "zero3", 2)],
)
def test_a_run_killed_after_every_update_is_the_run_that_was_left_alone(
    model: str, strategy: str, world_size: int, tmp_path: Path
) -> None:
    assert_that_it_is_the_run_that_was_left_alone(
        tmp_path, model=model, strategy=strategy, world_size=world_size, cuts=exact_resume.EVERY_CUT
    )

"""The examples of parts of one's own: one short file each, that learns what there is to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.own import EXAMPLES
from tests.distributed.starts import train_on_standing_ranks


def ledger_of(example: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train an example on two ranks, and return the lines of its ledger."""
    given = (f"run.output_root={folder}", "run.name=a", *overrides)
    answers = train_on_standing_ranks(2, str(EXAMPLES / example / "run.yaml"), *given)
    assert [code for code, _ in answers] == [0, 0], answers
    return [json.loads(line) for line in (folder / "a/ledger.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "overrides", "least"),
    [
        ("two_towers", ("run.max_epochs=3",), 0.88),
        ("ragged", ("run.max_epochs=2",), 0.92),
        ("segmentation", ("run.max_epochs=4",), 0.8),
        ("two_heads", ("run.max_epochs=6", "optim.peak_lr=1e-2"), 0.9),
        ("two_heads", ("run.max_epochs=6", "optim.peak_lr=1e-2", "data.source=curves_by_row"), 0.9),
    ],
)
def test_an_example_learns(example: str, overrides: tuple[str, ...], least: float, tmp_path: Path) -> None:
    lines = ledger_of(example, tmp_path, *overrides)
    metric = "val/iou" if example == "segmentation" else "val/accuracy"
    scores = [line["metrics"][metric] for line in lines if line["event"] == "evaluation"]
    assert scores[-1] > least
    promises = json.loads((tmp_path / "a/run.json").read_bytes())["promises"]
    assert {promise["verdict"] for promise in promises} == {"held"}


def test_rows_in_memory_and_rows_one_by_one_train_to_the_same_bits(tmp_path: Path) -> None:
    few = ("run.max_steps=4", "run.max_epochs=null", "schedule={kind: constant}", "data.num_rows=300")
    columns, by_row = (
        ledger_of("two_heads", tmp_path / source, *few, f"data.source={source}")
        for source in ("curves", "curves_by_row")
    )
    for one, other in zip(columns, by_row, strict=True):
        assert (one.get("loss"), one.get("grad_norm")) == (other.get("loss"), other.get("grad_norm"))
        assert one.get("metrics") == other.get("metrics")


def test_terms_of_a_loss_are_columns_of_the_ledger(tmp_path: Path) -> None:
    lines = ledger_of("two_heads", tmp_path, "run.max_steps=2", "run.max_epochs=null", "schedule={kind: constant}")
    first = lines[0]
    assert first["loss"] == pytest.approx(first["kind"] + 2.0 * first["height"], rel=1e-6)
    scores = lines[-1]["metrics"]
    assert list(scores) == ["val/loss", "val/kind", "val/height", "val/accuracy"]
    assert scores["val/loss"] == pytest.approx(scores["val/kind"] + 2.0 * scores["val/height"], rel=1e-6)


def test_how_often_reports_are_read_changes_no_term_of_any_update(tmp_path: Path) -> None:
    few = ("run.max_steps=4", "run.max_epochs=null", "schedule={kind: constant}", "data.num_rows=300")
    each, together = (
        [
            (line["loss"], line["kind"], line["height"])
            for line in ledger_of("two_heads", tmp_path / str(every), *few, f"tracking.log_every_steps={every}")
            if line["event"] == "update"
        ]
        for every in (1, 4)
    )
    assert together == each
    assert len(set(each)) == 4


@pytest.mark.parametrize(
    ("example", "most"), [("two_towers", 80), ("ragged", 80), ("two_heads", 80), ("segmentation", 112)]
)
def test_an_example_is_one_short_file_and_one_configuration(example: str, most: int) -> None:
    assert {path.name for path in (EXAMPLES / example).iterdir() if path.is_file()} == {f"{example}.py", "run.yaml"}
    assert len((EXAMPLES / example / f"{example}.py").read_text().splitlines()) < most

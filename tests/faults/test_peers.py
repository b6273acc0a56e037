"""A few cells of the table that `python -m tests.faults.peers` prints in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.jobs import STEPS
from tests.faults.peers import Cells

pytestmark = pytest.mark.slow

FLIPPED, KILLED = "one bit flipped in the largest file", "rank 1 killed within a file of the second save"


def test_ours_comes_back_whole_where_a_bit_is_flipped_or_a_rank_killed(tmp_path: Path) -> None:
    cells = Cells("harness", tmp_path).faults()
    assert cells["nothing"]() == "resumes from 20"
    assert cells["2 ranks saved, 3 load"]() == "resumes from 20"
    assert cells[FLIPPED]() == "resumes from 10"
    assert cells[KILLED + ", one checkpoint kept"]() == "resumes from 10"


def test_the_table_can_tell_wrong_numbers(tmp_path: Path) -> None:
    torch_save = Cells("torch.save", tmp_path / "torch").faults()
    assert torch_save["nothing"]() == f"resumes from {STEPS[-1]}"
    assert "silently" in torch_save[FLIPPED]()
    assert (
        "nothing to fall back to" in torch_save["rank 0 killed within a file of the second save, one checkpoint kept"]()
    )

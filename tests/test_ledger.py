"""The ledger: floats come back to the bit, every line is strict JSON, and a resumed run goes on where it was saved."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import StorageError
from harness.observers.ledger import Ledger, ledger_problem, read_lines
from harness.record.json_lines import append_event, json_line, last_line, whole_lines
from harness.stopping import Patience
from tests.test_order import unhurried

BEST = Patience("val/loss", "min", 0.0)
finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


Open = Callable[..., Ledger]


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Open]:
    """Opens the ledger of `tmp_path` as often as wanted; its files are closed in the end."""
    opened: list[Ledger] = []

    def open_one(*, keep_bytes: int = 0) -> Ledger:
        opened.append(Ledger(tmp_path, keep_bytes=keep_bytes))
        return opened[-1]

    yield open_one
    for file in [value for ledger in opened for value in vars(ledger).values() if hasattr(value, "close")]:
        file.close()


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def read_strictly(line: bytes) -> Any:
    """Read JSON as the standard has it: without Python's NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def without_nonfinite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [without_nonfinite(item) for item in value]
        case dict():
            return {key: without_nonfinite(item) for key, item in value.items()}
    return value


# ---------------------------------------------------------------- lines


@unhurried
@given(finite)
def test_a_float_reads_back_to_the_same_bits(value: float) -> None:
    line = read_strictly(json_line({"loss": value, "metrics": {"val/loss": value}}))
    assert bits(line["loss"]) == bits(line["metrics"]["val/loss"]) == bits(value)


@unhurried
@given(st.dictionaries(st.text(), values))
def test_every_line_is_one_line_of_strict_json_in_which_what_is_not_finite_is_null(line: dict[str, Any]) -> None:
    text = json_line(line)
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    assert read_strictly(text) == without_nonfinite(line)


def test_lines_read_back_in_the_order_they_were_told(open_ledger: Open, tmp_path: Path) -> None:
    ledger = open_ledger()
    update = {"event": "update", "step": 1, "loss": 0.1 + 0.2, "grad_norm": math.inf}
    evaluation = {"event": "evaluation", "step": 1, "metrics": {"val/loss": math.nan}}
    ledger.on_update(update)
    ledger.on_evaluation(evaluation, BEST)
    assert read_lines(tmp_path / "ledger.jsonl") == [without_nonfinite(update), without_nonfinite(evaluation)]


def test_an_event_has_the_time_in_utc_and_is_written_at_once(open_ledger: Open, tmp_path: Path) -> None:
    open_ledger().on_event({"event": "saved", "step": 3})
    (line,) = read_lines(tmp_path / "events.jsonl")
    offset = datetime.fromisoformat(line.pop("time")).utcoffset()
    assert offset is not None
    assert offset.total_seconds() == 0
    assert line == {"event": "saved", "step": 3}


def test_an_intervals_updates_are_in_the_file_when_it_is_settled(open_ledger: Open, tmp_path: Path) -> None:
    ledger = open_ledger()
    for step in (1, 2, 3):
        ledger.on_update({"step": step})
    ledger.on_settled()
    assert read_lines(tmp_path / "ledger.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_sync_waits_until_the_disk_has_what_was_sealed(
    open_ledger: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk, ledger = [], open_ledger()
    monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.append(os.fstat(descriptor).st_size))
    ledger.on_update({"step": 1})
    assert on_disk == []
    sealed = ledger.seal()
    assert on_disk == []
    ledger.sync()
    assert on_disk == [sealed]


# ---------------------------------------------------------------- picked up again


def write_seven(ledger: Ledger) -> tuple[int, int]:
    """Write seven lines; return the sealed length after three and after all of them."""
    lengths = {}
    for step in range(1, 8):
        ledger.on_update({"step": step})
        lengths[step] = ledger.seal()
    return lengths[3], lengths[7]


def test_what_was_written_after_the_checkpoint_is_cut_off_and_written_anew(open_ledger: Open, tmp_path: Path) -> None:
    sealed, _ = write_seven(open_ledger())
    again = open_ledger(keep_bytes=sealed)
    assert [line["step"] for line in read_lines(tmp_path / "ledger.jsonl")] == [1, 2, 3]
    again.on_update({"step": 4, "segment": 2})
    assert again.seal() == (tmp_path / "ledger.jsonl").stat().st_size
    assert read_lines(tmp_path / "ledger.jsonl")[3:] == [{"step": 4, "segment": 2}]


def test_updates_that_were_cut_off_and_the_time_they_took_are_an_event(open_ledger: Open, tmp_path: Path) -> None:
    ledger = open_ledger()
    ledger.on_update({"event": "update", "step": 1, "seconds": 0.25})
    sealed = ledger.seal()
    open_ledger(keep_bytes=sealed)
    for step in (2, 3):
        ledger.on_update({"event": "update", "step": step, "seconds": 0.5})
    ledger.on_evaluation({"event": "evaluation", "step": 3, "metrics": {}}, BEST)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"event": "update", "step": 4, "sec')  # killed while it wrote
    open_ledger(keep_bytes=sealed)
    (told,) = read_lines(tmp_path / "events.jsonl")
    assert told | {"time": ""} == {"time": "", "event": "cut back", "updates": 2, "seconds": 1.0}


def test_a_ledger_that_was_cut_back_seals_at_its_new_length(open_ledger: Open) -> None:
    sealed, whole = write_seven(open_ledger())
    assert sealed < whole
    assert open_ledger(keep_bytes=sealed).seal() == sealed


def test_events_are_never_cut(open_ledger: Open, tmp_path: Path) -> None:
    for segment in (1, 2):
        open_ledger().on_event({"event": "started", "segment": segment})
    assert [line["segment"] for line in read_lines(tmp_path / "events.jsonl")] == [1, 2]


def test_an_event_after_a_half_written_one_is_a_line_of_its_own(open_ledger: Open, tmp_path: Path) -> None:
    for content in (b"", b"{", b'{"event": "notice"}\n{"event": "save'):
        (tmp_path / "events.jsonl").write_bytes(content)
        whole = content.count(b"\n")
        append_event(tmp_path, "notice", text="first")
        open_ledger().on_event({"event": "notice", "text": "second"})
        with (tmp_path / "events.jsonl").open("rb") as file:
            lines = list(whole_lines(file))
        assert [line["text"] for line in lines[whole:]] == ["first", "second"]


def test_an_event_of_a_run_without_observers_is_on_the_disk_before_anything_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: dict[str, int] = {}
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        on_disk[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", synced)
    append_event(tmp_path, "notice", text="first")
    assert str(tmp_path) in on_disk
    assert on_disk[str(tmp_path / "events.jsonl")] == (tmp_path / "events.jsonl").stat().st_size > 0
    room = (tmp_path / "events.jsonl").stat().st_size + 10
    with room_for(room), pytest.raises(StorageError, match="No space left"):
        append_event(tmp_path, "notice", text="second")


def test_a_ledger_shorter_than_the_checkpoint_says_is_refused_and_left_alone(open_ledger: Open, tmp_path: Path) -> None:
    _, whole = write_seven(open_ledger())
    content = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(StorageError, match=f"has {whole:,} bytes, the checkpoint was made when it had {whole + 1:,}"):
        open_ledger(keep_bytes=whole + 1)
    assert (tmp_path / "ledger.jsonl").read_bytes() == content


def test_a_ledger_that_is_gone_is_refused(open_ledger: Open, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="has 0 bytes"):
        open_ledger(keep_bytes=1)
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize("width", [1, 4_000, 5_000, 100_000])
def test_the_last_line_of_the_beginning_of_a_file_is_found_however_long_it_is(tmp_path: Path, width: int) -> None:
    lines = [{"step": step, "table": "x" * width} for step in range(3)]
    texts = list(map(json_line, lines))
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(texts))
    for count in (1, 2, 3):
        num_bytes = sum(map(len, texts[:count]))
        assert last_line(path, num_bytes=num_bytes) == lines[count - 1]
        assert last_line(path, num_bytes=num_bytes - 1) is None
    assert last_line(path, num_bytes=0) is None


UPDATES = [{"event": "update", "step": step, "applied": True} for step in range(1, 6)]
SKIPPED = {"event": "update", "step": 6, "applied": False}
EVALUATION = {"event": "evaluation", "step": 5, "metrics": {}}


@pytest.mark.parametrize(
    ("lines", "fits"),
    [
        (UPDATES, True),
        ([*UPDATES, EVALUATION], True),
        ([*UPDATES, SKIPPED, SKIPPED], True),  # saved after updates that were not applied
        ([*UPDATES, SKIPPED, EVALUATION], True),
        (UPDATES[:4], False),
        ([*UPDATES, {**SKIPPED, "applied": True}], False),
        ([], False),
    ],
)
def test_a_checkpoint_goes_with_a_ledger_that_stands_at_its_step(
    tmp_path: Path, lines: list[dict[str, Any]], fits: bool
) -> None:
    content = b"".join(map(json_line, lines))
    (tmp_path / "ledger.jsonl").write_bytes(content + json_line({"event": "update", "step": 7}))
    trainer = {"step": 5, "ledger_bytes": len(content), "run_id": "a"}
    assert (ledger_problem(tmp_path, trainer, run_id="a") is None) == fits


@pytest.mark.parametrize(
    ("content", "fits"),
    [
        (None, True),
        (b"", True),
        (json_line(SKIPPED), True),
        (json_line(UPDATES[0]), False),
        (b"{\n" + json_line(SKIPPED), False),
        (b'{"event": "update", "st', False),
    ],
)
def test_a_checkpoint_of_another_run_goes_with_a_ledger_that_begins_after_it_and_no_line_of_any_other_is_cut(
    tmp_path: Path, content: bytes | None, fits: bool
) -> None:
    if content is not None:
        (tmp_path / "ledger.jsonl").write_bytes(content)
    trainer = {"step": 5, "ledger_bytes": 10_000, "run_id": "a"}
    assert (ledger_problem(tmp_path, trainer, run_id="b") is None) == fits


# ---------------------------------------------------------------- a disk that does not take it


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Have the kernel refuse to make any file longer than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(open_ledger: Open, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [{"step": step, "text": "x" * 60} for step in range(6)]
    ledger = open_ledger()
    for line in told[:2]:
        ledger.on_update(line)
    ledger.seal()
    with room_for(200):  # in the middle of the third line
        for line in told[2:4]:
            ledger.on_update(line)
            ledger.on_event({"event": "notice", "text": "x" * 300})
            ledger.on_settled()
    assert (tmp_path / "ledger.jsonl").stat().st_size == 200
    for line in told[4:]:
        ledger.on_update(line)
    ledger.seal()
    ledger.close()
    assert read_lines(tmp_path / "ledger.jsonl") == told
    assert len(read_lines(tmp_path / "events.jsonl")) == 2


def test_a_checkpoint_cannot_refer_to_lines_that_the_disk_refused(open_ledger: Open) -> None:
    ledger = open_ledger()
    ledger.on_update({"text": "x" * 200})
    with room_for(100):
        length = ledger.seal()
        with pytest.raises(StorageError, match="File too large"):
            ledger.sync()
    assert length > 200
    assert ledger.seal() == length
    ledger.on_settled()
    ledger.sync()


def test_a_ledger_that_was_deleted_under_the_run_cannot_be_referred_to(open_ledger: Open, tmp_path: Path) -> None:
    ledger = open_ledger()
    ledger.on_update({"step": 1})
    ledger.seal()
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(StorageError, match="it was deleted"):
        ledger.sync()


def test_closing_a_ledger_that_still_holds_lines_is_a_storage_error(open_ledger: Open) -> None:
    ledger = open_ledger()
    ledger.on_update({"text": "x" * 200})
    with room_for(100):
        ledger.seal()
        with pytest.raises(StorageError, match="File too large"):
            ledger.close()


def test_a_ledger_that_cannot_be_opened_is_a_storage_error(open_ledger: Open, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"ledger\.jsonl"):
        open_ledger()

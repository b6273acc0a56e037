"""The report: what it says of real runs, of broken directories, and how it looks in a browser."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.config.io import dump_config, load_config
from harness.observers.ledger import MEASURED
from harness.report.__main__ import main
from harness.report.accounting import wall_time
from harness.report.charts import charts, thin
from harness.report.page import differing
from harness.report.read import Record, read_run
from harness.report.shapes import ConfusionMatrix, HeatMap, LineChart, Series, ShareChart
from tests import browser
from tests.conftest import run_to_the_end
from tests.distributed.ranks import run_ranks
from tests.helpers import wait_until

ROOT = Path(__file__).parents[1]
START = datetime(2026, 1, 1, tzinfo=UTC)


def drawn(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> tuple[str, str]:
    """The page of these runs, and what was said on stderr."""
    to = Path(arguments[0]).parent / "page.html"
    assert main([*map(str, arguments), "--to", str(to)]) == 0
    text = to.read_text()
    to.unlink()
    return text, capsys.readouterr().err


def ledger_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture
def run(real_runs: Path, tmp_path: Path) -> Path:
    """A copy of the run that was killed once."""
    return Path(shutil.copytree(real_runs / "restarted", tmp_path / "restarted"))


# ---------------------------------------------------------------- what is read


def test_a_run_is_read_to_the_bit(real_runs: Path) -> None:
    record = read_run(real_runs / "restarted")
    updates = [line for line in ledger_of(real_runs / "restarted") if line["event"] == "update"]
    for name in ("step", "loss", "grad_norm", "clip_coefficient", "learning_rate", "samples_seen", "seconds"):
        assert record.updates[name].tolist() == [line[name] for line in updates]
    assert record.ignored == []
    assert len(updates) == 120


def test_the_restart_and_the_best_evaluation_are_those_of_the_checkpoints(real_runs: Path) -> None:
    record = read_run(real_runs / "restarted")
    assert record.restarts == [80]
    assert record.best.best_step == json.loads((real_runs / "restarted/checkpoints/BEST").read_text())["step"]


def test_what_is_not_a_default_is_known_by_path(real_runs: Path) -> None:
    record = read_run(real_runs / "steady")
    assert {"optim.peak_lr", "clip.max_norm", "diagnostics.every_steps", "run.name"} <= record.changed
    assert not {"optim.weight_decay", "run.seed", "tracking.wandb"} & record.changed
    assert record.settings["optim.peak_lr"] == 0.01


def test_a_section_that_is_off_by_default_is_a_difference_where_it_is_on_whatever_it_says(run: Path) -> None:
    before = read_run(run).changed
    config = load_config(run / "config.yaml", ["early_stopping={}", "tracking.wandb={}"]).config
    (run / "config.yaml").write_text(dump_config(config))
    stopping = {f"early_stopping.{name}" for name in ("metric", "mode", "patience_evaluations", "min_delta")}
    added = read_run(run).changed - before
    assert {path for path in added if not path.startswith("tracking.wandb.")} == stopping
    assert {"tracking.wandb.mode", "tracking.wandb.project"} <= added
    assert "tracking.wandb.notes" not in added  # null says nothing


def test_settings_that_differ_are_the_overrides(real_runs: Path) -> None:
    rows = differing([read_run(real_runs / name) for name in ("steady", "other")])
    assert rows == [("optim.peak_lr", ["0.01", "0.003"]), ("clip.max_norm", ["0.5", "0.2"])]


def test_a_setting_that_a_run_does_not_have_is_a_dash_and_not_null(real_runs: Path, run: Path) -> None:
    config = load_config(run / "config.yaml", ["clip={kind: none}"]).config
    (run / "config.yaml").write_text(dump_config(config))
    assert ("clip.max_norm", ["0.5", "\N{EN DASH}"]) in differing([read_run(real_runs / "steady"), read_run(run)])


# ---------------------------------------------------------------- where the time went


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat()


def made(folder: Path, *, events: list[dict[str, Any]], ledger: list[dict[str, Any]]) -> Record:
    """A hand-written run that was created at START."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"id": "0", "created": at(0), "schema": 1}))
    for name, lines in (("events", events), ("ledger", ledger)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


def updates(first: int, last: int, *, seconds: float, **changes: Any) -> list[dict[str, Any]]:
    line = {"event": "update", "loss": 1.0, "applied": True, "seconds": seconds, **changes}
    return [{**line, "step": step} for step in range(first, last + 1)]


def test_the_wall_time_of_a_killed_and_resumed_run_is_divided_as_it_was_spent(tmp_path: Path) -> None:
    record = made(
        tmp_path / "a",
        events=[
            {"event": "started", "time": at(5), "step": 0},
            {"event": "saved", "time": at(16), "step": 10},
            # It went on to update 14, which takes until second 20, and was killed; somebody came back at second 50.
            {"event": "cut back", "time": at(49), "updates": 4, "seconds": 4.0},
            {"event": "notice", "time": at(49), "text": "changed"},
            {"event": "started", "time": at(50), "step": 10},
            {"event": "ended", "time": at(80), "reason": "budget"},
        ],
        ledger=[*updates(1, 10, seconds=1.0), *updates(11, 20, seconds=2.0)],
    )
    spent = wall_time(record)
    assert spent is not None
    assert (spent.useful, spent.repeated) == (10 + 20, 4)
    assert spent.around == (16 - 5 - 10 - 4 + 3) + (80 - 50 - 20)  # the end of the first is its start and its updates
    assert spent.stopped == 5 + (50 - 19)
    assert spent.total == 80
    assert spent.goodput == 30 / 80


def test_an_update_that_was_not_applied_is_not_useful_time(tmp_path: Path) -> None:
    record = made(
        tmp_path / "a",
        events=[{"event": "started", "time": at(0), "step": 0}, {"event": "ended", "time": at(10)}],
        ledger=[*updates(1, 3, seconds=1.0), *updates(4, 4, seconds=2.0, applied=False), *updates(4, 5, seconds=1.0)],
    )
    spent = wall_time(record)
    assert spent is not None
    assert (spent.useful, spent.around, spent.total) == (5, 5, 10)


def test_the_parts_of_a_real_runs_wall_time_add_up_to_the_time_from_its_creation_to_its_last_event(
    real_runs: Path,
) -> None:
    record = read_run(real_runs / "restarted")
    spent, last = wall_time(record), datetime.fromisoformat(record.events[-1]["time"]).timestamp()
    assert spent is not None
    assert min(spent.useful, spent.repeated, spent.around, spent.stopped) > 0
    assert spent.total == pytest.approx(last - (record.status.created or 0), abs=0.01)


# ---------------------------------------------------------------- curves


def test_a_thinned_curve_keeps_every_spike_in_its_band() -> None:
    x, y = np.arange(10_000.0), np.random.default_rng(0).normal(size=10_000)
    y[4_321] = 77.0
    steps, mean, low, high = thin(x, y)
    assert len(steps) == 300
    assert high.max() == 77.0
    assert low.min() == y.min()
    assert ((low <= mean) & (mean <= high)).all()
    assert (mean * np.diff(np.linspace(0, 10_000, 301).astype(int))).sum() == pytest.approx(y.sum())


def test_figures_that_are_told_once_an_interval_are_a_line(tmp_path: Path) -> None:
    lines = updates(1, 20, seconds=0.5)
    for line in lines[::5]:
        parts = {"data_wait_fraction": 0.25, "compute_fraction": 0.5, "rest_fraction": 0.25}
        line |= {"samples_per_second": 100.0, "tokens_per_second": 700.0, "memory_bytes": 2**30, "mfu": 0.4, **parts}
    record = made(tmp_path / "a", events=[], ledger=lines)
    found = {chart.slug: chart for chart in charts([record]) if isinstance(chart, LineChart)}
    assert found["throughput"].title == "Tokens a second, while updating"
    assert found["throughput"].series[0].x.tolist() == [1, 6, 11, 16]
    for slug, wanted in (
        ("throughput", [700.0]),
        ("memory", [1.0]),
        ("mfu", [0.4]),
        ("update-parts", [0.25, 0.5, 0.25]),
    ):
        assert [series.y.tolist() for series in found[slug].series] == [[value] * 4 for value in wanted]
    assert [series.label for series in found["update-parts"].series] == ["waiting for data", "computing", "rest"]


def test_the_confusion_matrix_and_the_validation_rows_that_count_are_those_of_the_last_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def samples(step: int, prediction: str) -> dict[str, Any]:
        columns = ["row", "target", "prediction", "probability"]
        rows = [[0, "ant", "ant", 0.5], [1, "bee", prediction, 0.75]]
        return {"event": "samples", "time": at(step), "step": step, "columns": columns, "rows": rows}

    def scores(step: int, matrix: list[list[int]]) -> dict[str, Any]:
        return {"event": "evaluation", "step": step, "metrics": {"val/loss": 1.0, "val/confusion_matrix": matrix}}

    start = {"event": "started", "time": at(0)}
    record = made(
        tmp_path / "a",
        events=[
            {**start, "step": 0},
            samples(10, "fox"),
            samples(20, "elk"),
            {**start, "step": 15},
            samples(20, "cow"),
        ],
        ledger=[*updates(1, 10, seconds=1), scores(10, [[9, 0], [0, 9]]), scores(20, [[3, 1], [0, 4]])],
    )
    (matrix,) = [chart for chart in charts([record]) if isinstance(chart, ConfusionMatrix)]
    assert matrix.counts.tolist() == [[3, 1], [0, 4]]
    page, _ = drawn(capsys, tmp_path / "a")
    assert "final val/confusion_matrix" not in page
    assert '<tr class="wrong"><td>1</td><td>bee</td><td>cow</td><td>0.75</td></tr>' in page
    assert "<tr><td>0</td><td>ant</td><td>ant</td><td>0.5</td></tr>" in page
    assert "fox" not in page
    assert "elk" not in page


def test_the_heat_map_has_the_norm_of_each_layer_and_what_was_made_again_once(tmp_path: Path) -> None:
    def gradients(step: int, weight: float | None) -> dict[str, Any]:
        norms = {"in.weight": weight, "in.bias": 4.0, "out.weight": 1.0}
        return {"event": "gradients", "time": at(step), "step": step, "norms": norms}

    record = made(
        tmp_path / "a",
        events=[
            {"event": "started", "time": at(0), "step": 0},
            *(gradients(step, 3.0) for step in (2, 4, 6)),
            {"event": "started", "time": at(9), "step": 3},
            gradients(4, 0.0),
            gradients(5, None),
        ],
        ledger=[],
    )
    (heat_map,) = [chart for chart in charts([record]) if isinstance(chart, HeatMap)]
    assert heat_map.rows == ["in", "out"]
    assert heat_map.steps == [2, 4, 5]
    assert heat_map.values.tolist() == pytest.approx(np.array([[5, 4, np.nan], [1, 1, 1]]), nan_ok=True)


def test_a_restart_is_a_dotted_line_in_every_curve_and_the_best_evaluation_a_star_in_each_of_its_scores(
    real_runs: Path,
) -> None:
    record = read_run(real_runs / "restarted")
    curves = [chart for chart in charts([record]) if isinstance(chart, LineChart)]
    assert len(curves) > 5
    assert all([mark.x for mark in curve.marks if mark.y is None] == [80] for curve in curves)
    scores = dict(record.evaluations)[record.best.best_step or 0]
    stars = {curve.title: (mark.x, mark.y) for curve in curves for mark in curve.marks if mark.y is not None}
    assert stars["Loss"] == (record.best.best_step, scores["val/loss"])
    assert len(stars) == len(scores)


def test_the_labels_of_a_curve_over_many_powers_of_ten_leave_each_other_room_and_a_level_one_is_not_the_edge() -> None:
    def axes_of(y: list[float], **options: bool) -> Axes:
        axes = Figure().add_subplot()
        x = np.arange(float(len(y)))
        LineChart("a", "a", [Series("a", x, np.array(y))], **options).draw(axes)  # type: ignore[arg-type]
        return axes

    low, high = (many := axes_of([1e-5, 1.0, 5.0], is_log=True)).get_ylim()
    assert 3 <= len([tick for tick in many.get_yticks() if low <= tick <= high]) <= 8
    assert axes_of([0.5, 0.5], from_zero=True).get_ylim()[1] > 0.52


def test_verdicts_on_a_run_are_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = {"event": "verdict", "time": at(0), "learns": True, "seeds": 3}
    for name, events in (("a", []), ("b", [verdict])):
        made(tmp_path / name, events=events, ledger=updates(1, 10, seconds=0.5))
    assert "Verdicts" not in drawn(capsys, tmp_path / "a")[0]
    page, _ = drawn(capsys, tmp_path / "b")
    assert re.search(r"<h2>Verdicts</h2>\s*<div class=\"card\"><p>learns true, seeds 3</p>", page)


# ---------------------------------------------------------------- bad input


def test_a_file_that_cannot_be_read_is_told_and_the_rest_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").mkdir()
    (run / "exit.json").write_text("[]")
    page, said = drawn(capsys, run)
    assert "events.jsonl, left out: the rest cannot be read (Is a directory)" in said
    assert "unreadable after 120 updates" in page
    assert page.count("<svg") > 5


def test_a_corrupt_line_in_the_middle_and_a_half_written_last_one_are_told_and_the_rest_is_drawn(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    lines[17] = b'{"event": "upd\xff\x00ate", "step"\n'
    lines[18] = b'["no", "object"]\n'
    lines[19] = b'{"event": "update", "step": "nineteen"}\n'
    lines[-1] = lines[-1][:20]
    (run / "ledger.jsonl").write_bytes(b"".join(lines))
    page, said = drawn(capsys, run)
    for text in (
        "ledger.jsonl, left out: line 18 is no JSON object",
        "ledger.jsonl, left out: line 19 is no JSON object",
        "ledger.jsonl, left out: a line that lacks what its kind has",
        f"ledger.jsonl, left out: the last line, {len(lines)}, is half-written",
    ):
        assert text in page
        assert text in said
    assert page.count("<svg") == 12


def test_lines_whose_values_are_of_other_types_are_told_and_count_as_no_update(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_run(run)
    time = '"time": "2026-11-27T00:00:00+00:00"'
    with (run / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"event": "evaluation", "step": 120, "metrics": null}\n{"event": [1], "step": 120}\n')
        ledger.write(f'{{"event": "update", "step": 1{400 * "0"}}}\n')
    with (run / "events.jsonl").open("a") as events:
        events.write(f'{{"event": ["x"], {time}}}\n{{"event": "overflow", {time}}}\n')
        events.write(f'{{"event": "gradients", "step": 119, "norms": {{"a.w": 1e300, "b.w": "x"}}, {time}}}\n')
    page, said = drawn(capsys, run)
    assert said.count("a line that lacks what its kind has") == 5
    assert page.count("<svg") == 12
    assert read_run(run).updates["step"].tolist() == before.updates["step"].tolist()


def test_runs_of_one_name_are_told_apart_by_their_directories(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twins = [Path(shutil.copytree(real_runs / "restarted", tmp_path / name)) for name in ("here", "there")]
    assert main([*map(str, twins), "--to", str(tmp_path / "both.html"), "--png", str(tmp_path / "png")]) == 0
    page = (tmp_path / "both.html").read_text()
    for twin in twins:
        assert page.count(f"</span>{twin}</") >= 5  # in the heading, the table and the legends
    (said,) = re.findall(r"^images: (\d+) in", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(list((tmp_path / "png").iterdir())) == int(said)
    assert "run.name=restarted-again" in page


def test_a_long_name_leaves_the_bars_of_the_wall_time_room() -> None:
    widths = []
    for name in ("a", 64 * "a"):
        figure = Figure(figsize=(4.4, 2), layout="constrained")
        axes = figure.add_subplot()
        ShareChart("wall-time", "", [name, "b"], {"useful": [0.5, 0.5], "other": [0.5, 0.5]}).draw(axes)
        figure.draw_without_rendering()
        widths.append(axes.get_position().width)
    assert widths[1] > 0.5 * widths[0]


def test_a_number_of_hundreds_of_digits_is_none(tmp_path: Path) -> None:
    lines = updates(1, 10, seconds=0.5)
    lines[4]["loss"] = 10**400
    record = made(tmp_path / "a", events=[], ledger=lines)
    assert np.isnan(record.updates["loss"]).tolist() == [step == 5 for step in range(1, 11)]


def test_a_ledger_of_rubbish_is_told_in_a_few_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ledger.jsonl").write_text("rubbish\n" * 5000)
    page, said = drawn(capsys, run)
    assert "ledger.jsonl: 4,992 more lines were left out" in page
    assert len(said.splitlines()) == 9


def test_nan_is_null_in_the_ledger_and_a_gap_in_no_other_curve(tmp_path: Path) -> None:
    lines = updates(1, 10, seconds=0.5, grad_norm=2.0)
    lines[4] |= {"loss": None, "grad_norm": None, "applied": False}
    record = made(tmp_path / "a", events=[], ledger=lines)
    loss, norm = [chart for chart in charts([record]) if chart.slug in ("loss", "grad-norm")]
    assert loss.series[0].x.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]  # type: ignore[union-attr]
    assert norm.series[0].y.tolist() == [2.0] * 9  # type: ignore[union-attr]
    assert [mark.x for mark in loss.marks if mark.is_bad] == [5]  # type: ignore[union-attr]


def test_a_run_whose_every_loss_is_nan_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = {"event": "evaluation", "step": 10, "metrics": {"val/loss": None, "val/accuracy": 0.1}}
    lines = updates(1, 10, seconds=0.5, applied=False, grad_norm=None, loss=None)
    made(tmp_path / "a", events=[], ledger=[*lines, evaluation])
    page, _ = drawn(capsys, tmp_path / "a")
    assert "final val/loss" in page
    assert ">nan<" in page


def test_an_empty_run_is_a_page_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.json").write_text(json.dumps({"id": "0", "created": at(0), "schema": 1}))
    page, said = drawn(capsys, tmp_path / "a")
    assert "killed before its first update" in page
    assert "There is nothing to draw yet" in page
    assert "config.yaml: no such file" in said


def test_a_run_of_another_schema_is_drawn_with_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**identity, "schema": 7}))
    page, _ = drawn(capsys, run)
    assert "run.json is of schema 7, this harness writes and reads 1" in page
    assert page.count("<svg") == 12


def test_a_config_with_a_key_of_the_future_is_shown_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ledger.jsonl").write_text("")  # fewer charts to draw
    with (run / "config.yaml").open("a") as file:
        file.write("hologram: {depth: 3}\n")
    page, _ = drawn(capsys, run)
    assert "hologram: unknown key" in page
    assert "<code>hologram.depth</code></td><td>3</td>" in page


def test_a_folder_that_is_no_run_and_a_run_that_is_given_twice_are_refused(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is not a run directory: it has no run.json" in capsys.readouterr().err
    assert main([str(real_runs / "steady")] * 2) == 2
    assert "give each run once" in capsys.readouterr().err
    assert main([str(real_runs / "steady"), "--to", f"{real_runs}/rows.csv/x.html"]) == 5


def test_what_a_run_says_is_text_and_never_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    event = {"event": "notice", "time": at(0), "text": "<script>alert(1)</script>"}
    made(tmp_path / "a", events=[event], ledger=updates(1, 10, seconds=0.5))
    page, _ = drawn(capsys, tmp_path / "a")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


# ---------------------------------------------------------------- the command


def test_the_command_that_the_report_gives_makes_the_same_updates_again(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, _ = drawn(capsys, real_runs / "steady")
    (command,) = re.findall(r"<pre>(harness launch .*?)</pre>", page)
    program, verb, config, gpus, ranks, *overrides = shlex.split(command)
    assert (program, verb, gpus, ranks) == ("harness", "launch", "--gpus", "1")
    run_to_the_end(Path(config), *overrides, f"run.output_root={tmp_path}")
    again, first = ledger_of(tmp_path / "steady-again"), ledger_of(real_runs / "steady")
    same = [[{**line, **dict.fromkeys(MEASURED, 0)} for line in lines] for lines in (again, first)]
    assert same[0] == same[1]


def test_the_report_has_the_command_the_run_was_started_with(real_runs: Path) -> None:
    (start,) = read_run(real_runs / "other").starts
    tiny = real_runs / "tiny.yaml"
    assert start["command"].startswith(f"harness train {tiny} run.name=other optim.peak_lr=0.003 ")


def test_images_are_written_beside_the_page(tmp_path: Path) -> None:
    made(tmp_path / "run", events=[], ledger=updates(1, 10, seconds=0.5))
    assert main([str(tmp_path / "run"), "--to", str(tmp_path / "a/b.html"), "--png", str(tmp_path / "png")]) == 0
    images = sorted((tmp_path / "png").glob("*.png"))
    assert len(images) == (tmp_path / "a/b.html").read_text().count("<svg") > 0
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)


@pytest.mark.slow
def test_a_hundred_thousand_updates_are_drawn_in_five_seconds_of_a_core_without_torch(
    real_runs: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(real_runs / "steady", tmp_path / "long", ignore=shutil.ignore_patterns("checkpoints")))
    line = ledger_of(run)[0]
    with (run / "ledger.jsonl").open("w") as file:
        file.writelines(json.dumps({**line, "step": step}) + "\n" for step in range(1, 100_001))
    script = "import sys, time; from harness.report.__main__ import main; code = main(sys.argv[1:]); "
    script += "print(time.process_time()); sys.exit(code or 'torch' in sys.modules)"
    command = [sys.executable, "-c", script, str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert float(done.stdout.split()[-1]) < 5
    assert (run / "report.html").stat().st_size < 500_000  # not a point for each update


# ---------------------------------------------------------------- at the end of a launch


def train_and_listen(*arguments: str) -> tuple[int, str]:
    """Train with the report at the end; return the exit code and what was said on stderr."""
    from harness.train import main as train

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        return train(list(arguments)), said.getvalue()


def test_every_launch_ends_with_a_report_whether_it_went_well_or_not(real_runs: Path, tmp_path: Path) -> None:
    config, output = str(real_runs / "tiny.yaml"), f"run.output_root={tmp_path}"
    ((code, said),) = run_ranks(1, train_and_listen, config, output, "run.max_steps=12")
    assert (code, said) == (0, "")
    assert "finished after 12 updates" in (tmp_path / "steady/report.html").read_text()
    nan = (output, "run.name=bad", "optim={kind: sgd, peak_lr: 1e30}", "clip={kind: none}", "model.hidden=[]")
    ((code, said),) = run_ranks(1, train_and_listen, config, *nan, "schedule={kind: constant}")
    assert code == 6
    assert said.startswith("NonFiniteError")
    assert "failed (exit code 6)" in (tmp_path / "bad/report.html").read_text()


def test_a_report_that_cannot_be_drawn_is_told_and_changes_no_exit_code(real_runs: Path, tmp_path: Path) -> None:
    (tmp_path / "steady/report.html").mkdir(parents=True)
    arguments = (str(real_runs / "tiny.yaml"), f"run.output_root={tmp_path}", "run.max_steps=12")
    ((code, said),) = run_ranks(1, train_and_listen, *arguments)
    assert code == 0
    assert "the report was not drawn (StorageError: cannot write" in said
    assert f"try: harness report {tmp_path / 'steady'}" in said
    assert json.loads((tmp_path / "steady/exit.json").read_text())["code"] == 0


def test_a_report_is_drawn_though_torchrun_ends_the_ranks_of_a_failed_run(run: Path) -> None:
    script = """
import pathlib, sys
from harness.report.at_end import write_report
from harness.stopping import StopSignals
StopSignals().install(second_interrupt_ends=False)
print("ready", flush=True)
write_report(pathlib.Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", script, str(run)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd=ROOT)
    assert rank.stdout
    rank.stdout.readline()
    children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children")

    def is_drawing(child: str) -> bool:
        return b"harness.report" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")

    wait_until(lambda: any(map(is_drawing, children.read_text().split())), "the drawing")
    os.killpg(rank.pid, signal.SIGTERM)
    _, said = rank.communicate(timeout=60)
    assert (rank.returncode, said) == (0, b"")
    assert (run / "report.html").exists()


def test_a_run_can_do_without_a_report(real_runs: Path) -> None:
    assert load_config(real_runs / "tiny.yaml").config.tracking.report
    assert not (real_runs / "steady/report.html").exists()  # it was trained with tracking.report=false


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.PROGRAM is None:
        assert "REQUIRE_CHROMIUM" not in os.environ, ".ci/run installs chromium, yet there is none"
        pytest.skip("chromium is not installed: apt-get install --no-install-recommends chromium")
    with browser.browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def pages(real_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By how many runs are in it: a page; what it looks like is kept beside it."""
    folder, drawn = tmp_path_factory.mktemp("pages"), {}
    for names in (["restarted"], ["steady", "other", "restarted"]):
        drawn[len(names)] = folder / f"{len(names)}.html"
        assert main([*(str(real_runs / name) for name in names), "--to", str(drawn[len(names)])]) == 0
    return drawn


FINDINGS = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = c => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const contrast = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const card = luminance(rgb(getComputedStyle(document.querySelector('figure')).backgroundColor));
  const texts = [...document.querySelectorAll('figure svg text')];
  const figures = [...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect());
  return {
    charts: document.querySelectorAll('figure svg[role=img]').length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    columns: new Set(figures.map(f => Math.round(f.left))).size,
    letter: Math.min(...texts.map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)),
    contrast: Math.min(...texts.map(t => contrast(luminance(rgb(getComputedStyle(t).fill)), card))),
    page: luminance(rgb(getComputedStyle(document.body).backgroundColor)),
    cell: Math.min(...[...document.querySelectorAll('.scroll td')].map(td => td.getBoundingClientRect().width)),
    row: Math.max(...[...document.querySelectorAll('.scroll tr')].map(tr => tr.getBoundingClientRect().height)),
    cut: texts.filter(t => { const b = t.getBoundingClientRect(), f = t.closest('figure').getBoundingClientRect();
        return b.left < f.left || b.right > f.right; }).length,
  };
})()"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("num_runs", [1, 3])
def test_in_a_browser_every_chart_is_there_and_readable_and_nothing_is_asked_of_the_network(
    pages: dict[int, Path], chromium: browser.Page, num_runs: int, width: int, scheme: str
) -> None:
    path = pages[num_runs]
    chromium.open(path, width=width, scheme=scheme)
    found = chromium.evaluate(FINDINGS)
    chromium.screenshot(path.with_name(f"{num_runs}-{width}-{scheme}.png"))
    requests = [told["request"]["url"] for told in chromium.told("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert chromium.told("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    assert found["charts"] == {1: 12, 3: 15}[num_runs]
    assert found["overflow"] <= 0
    assert found["columns"] == {400: 1, 1600: 3}[width]
    assert found["letter"] >= 9.5
    assert found["contrast"] >= 4.5
    assert found["cut"] == 0
    assert num_runs == 1 or (found["cell"] >= 80 and found["row"] <= 100)  # pixels: words stay whole
    assert (found["page"] < 0.1) == (scheme == "dark")


def test_the_page_can_run_no_script_and_load_nothing(pages: dict[int, Path]) -> None:
    for path in pages.values():
        page = path.read_text()
        assert "default-src 'none'" in page
        assert re.findall(r"(?:src|href)=\"(?!data:|#)", page) == []


@pytest.mark.slow
def test_drawing_at_the_end_of_a_run_costs_a_second_or_two_of_a_core(real_runs: Path, tmp_path: Path) -> None:
    began = time.process_time()
    assert main([str(real_runs / "steady"), "--to", str(tmp_path / "page.html")]) == 0
    assert time.process_time() - began < 2

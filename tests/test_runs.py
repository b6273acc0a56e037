"""`harness runs`: how every run is doing, from the ends of its files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harness.config.io import load_config
from harness.launch import cli
from harness.record.manifest import TRAINER
from harness.record.run_directory import RunDirectory
from harness.record.run_status import END_BYTES, RunStatus, duration, find_runs, run_status


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.main(["runs", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def run_in(folder: Path, **files: Any) -> Path:
    """A run directory with these files; `exit` is exit.json, `ledger` and `events` are lists of lines."""
    folder.mkdir(parents=True)
    identity = {"id": "0", "created": "2026-01-01T00:00:00+00:00", "schema": 1}
    (folder / "run.json").write_text(json.dumps(files.get("identity", identity)))
    if "exit" in files:
        (folder / "exit.json").write_text(json.dumps(files["exit"]))
    for name in ("ledger", "events"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in files.get(name, [])))
    return folder


def test_a_list_whose_reader_goes_away_ends_without_a_traceback(tmp_path: Path) -> None:
    run_in(tmp_path / "a")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "harness.launch.cli", "runs", str(tmp_path)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("ending", [{"code": "x", "reason": "budget", "step": 1}, {"code": 0}])
def test_an_ending_of_other_types_names_its_file(tmp_path: Path, ending: dict[str, Any]) -> None:
    status = run_status(run_in(tmp_path / "a", exit=ending))
    assert (status.state, status.reason) == ("unreadable", "exit.json is broken: it does not say code, reason and step")


# ---------------------------------------------------------------- one run


def test_a_finished_run_has_its_step_and_best_score_strategy_and_ranks(real_runs: Path) -> None:
    status = run_status(real_runs / "steady")
    best = json.loads((real_runs / "steady/checkpoints/BEST").read_text())["step"]
    lines = [json.loads(line) for line in (real_runs / "steady/ledger.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["metrics"]["val/loss"] for line in lines if line["event"] == "evaluation"}
    assert (status.state, status.code, status.reason, status.step) == ("finished", 0, "budget", 120)
    assert (status.metric, status.best, status.best_step) == ("val/loss", min(scores.values()), best)
    assert scores[best] == status.best
    assert (status.strategy, status.ranks) == ("ddp", 1)


@pytest.mark.parametrize(
    ("code", "state"), [(0, "finished"), (75, "interrupted"), (6, "failed"), (2, "failed"), (1, "failed")]
)
def test_the_exit_code_decides_the_state(tmp_path: Path, code: int, state: str) -> None:
    run = run_in(tmp_path / "a", exit={"code": code, "reason": "because", "step": 7})
    assert run_status(run) == RunStatus(run, state, code, "because", 7, created=run_status(run).created)


def test_a_run_is_running_while_its_lock_is_held_and_killed_when_nobody_holds_it(real_runs: Path) -> None:
    config = load_config(real_runs / "tiny.yaml", ["run.name=held"]).config
    with RunDirectory(config) as directory:
        directory.describe()
        assert run_status(directory.path).state == "running"
    assert run_status(directory.path).state == "killed"
    shutil.rmtree(directory.path)


def test_a_run_on_another_machine_is_running_as_long_as_its_files_grow(tmp_path: Path) -> None:
    run = run_in(tmp_path / "a")
    (run / "lock").write_text(json.dumps({"host": "another-machine", "pid": 1}))
    assert run_status(run).state == "running"
    for path in (run / "lock", *run.glob("*.jsonl")):
        subprocess.run(["touch", "-d", "20 minutes ago", path], check=True)
    assert run_status(run).state == "killed"


def test_the_step_of_a_killed_run_is_that_of_its_last_whole_line(tmp_path: Path) -> None:
    run = run_in(tmp_path / "a", ledger=[{"event": "update", "step": step} for step in (1, 2, 3)])
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"event": "update", "st')
    assert run_status(run).step == 3


def test_the_last_start_counts_however_much_was_told_since_the_first(tmp_path: Path) -> None:
    started = {"event": "started", "strategy": "ddp", "world_size": 2}
    noise = [{"event": "gradients", "norms": {"weight": 1.0}}] * (END_BYTES // 40)
    again = {**started, "strategy": "zero1", "world_size": 4}
    status = run_status(run_in(tmp_path / "a", events=[started, *noise, again]))
    assert (status.strategy, status.ranks) == ("zero1", 4)
    status = run_status(run_in(tmp_path / "b", events=[started, *noise]))
    assert (status.strategy, status.ranks) == ("ddp", 2)


def test_a_file_that_cannot_be_read_is_told_and_the_other_runs_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in(tmp_path / "good", exit={"code": 0, "reason": "budget", "step": 7})
    run_in(tmp_path / "bad", identity=["what"])
    (run_in(tmp_path / "worse") / "exit.json").write_text("{")
    run_in(tmp_path / "worst", identity={"id": "0"})
    lines = told(capsys, str(tmp_path), "--sort", "run")
    assert "unreadable: run.json is broken: it holds no JSON object" in lines[1]
    assert lines[2].split()[:3] == ["good", "finished", "7"]
    assert "unreadable: exit.json is broken" in lines[3]
    assert "unreadable: run.json is broken: it does not say when the run was created" in lines[4]


def test_a_checkpoint_of_nonsense_is_told_and_the_other_runs_are_listed(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("other", "steady"):
        shutil.copytree(real_runs / name, tmp_path / name)
    path = max((tmp_path / "other/checkpoints").glob("step-*")) / "trainer.json"
    trainer = json.loads(path.read_bytes())
    trainer["judge"]["score"]["best"] = "x"
    path.write_text(json.dumps(trainer))
    _, *lines = told(capsys, str(tmp_path), "--sort", "run")
    assert lines[0].startswith("other")
    assert f"unreadable: {path.parent.name}/trainer.json is broken: judge.score.best: 'x' is not" in lines[0]
    assert lines[1].split()[:2] == ["steady", "finished"]


# ---------------------------------------------------------------- the list


def test_a_start_that_failed_before_its_first_update_is_left_out_unless_it_is_asked_for(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(real_runs / "steady", tmp_path / "steady")
    for name, code, step in (("typo", 3, 0), ("late", 6, 4), ("stopped", 75, 0)):
        shutil.copytree(real_runs / "steady", tmp_path / name)
        (tmp_path / name / "exit.json").write_text(json.dumps({"code": code, "reason": "a reason", "step": step}))
    _, *rows, last = told(capsys, str(tmp_path), "--sort", "run")
    assert [row.split()[0] for row in rows] == ["late", "steady", "stopped"]
    assert last == "left out: 1 that failed before the first update (--all)"
    _, *rows = told(capsys, str(tmp_path), "--sort", "run", "--all")
    assert [row.split()[0] for row in rows] == ["late", "steady", "stopped", "typo"]


def test_the_list_is_aligned_and_the_youngest_run_is_first(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(real_runs, root)
    for index, name in enumerate(["restarted", "other", "steady"]):
        identity = json.loads((root / name / "run.json").read_text())
        created = datetime.now(UTC) - timedelta(minutes=index)
        (root / name / "run.json").write_text(json.dumps({**identity, "created": created.isoformat()}))
    heading, *rows = told(capsys, str(root))
    assert heading.split() == ["run", "state", "step", "best", "age", "strategy", "ranks"]
    assert [row.split()[0] for row in rows] == ["restarted", "other", "steady"]
    assert len({row.index("finished") for row in rows} | {heading.index("state")}) == 1


def save_score(run: Path, real: Path, metric: str, mode: str, best: float) -> None:
    """Give a run the newest save of a real one, with another score."""
    shutil.copy(real / "checkpoints/LATEST", make_directory(run / "checkpoints"))
    newest = json.loads((real / "checkpoints/LATEST").read_bytes())["directory"]
    trainer = json.loads((real / "checkpoints" / newest / TRAINER).read_bytes())
    trainer["judge"]["score"] |= {"metric": metric, "mode": mode, "best": best}
    (make_directory(run / "checkpoints" / newest) / TRAINER).write_text(json.dumps(trainer))


def make_directory(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (["--sort", "run"], "abcd"),
        (["--sort", "step"], "bdca"),
        (["--sort", "step", "--reverse"], "acdb"),
        (["--sort", "state"], "cabd"),
        (["--sort", "age"], "cbda"),
        (["--sort", "ranks"], "dacb"),
        (["--sort", "strategy"], "bacd"),
        (["--sort", "best"], "bdac"),  # the higher accuracy, then the lower loss
    ],
)
def test_the_list_is_sorted_by_any_column(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], order: str
) -> None:
    runs = [
        # name, exit code, step, day of its creation, strategy, ranks, metric, mode, best score
        ("a", 0, 1, 1, "ddp", 2, "val/loss", "min", 0.5),
        ("b", 75, 30, 3, "ddp", 1, "val/accuracy", "max", 0.9),
        ("c", 6, 4, 4, "zero1", 2, "val/loss", "min", 0.7),
        ("d", 75, 9, 2, "zero3", 8, "val/accuracy", "max", 0.8),
    ]
    for name, code, step, day, strategy, ranks, *score in runs:
        run = run_in(
            tmp_path / name,
            exit={"code": code, "reason": "because", "step": step},
            identity={"id": "0", "created": f"2026-01-0{day}T00:00:00+00:00", "schema": 1},
            events=[{"event": "started", "strategy": strategy, "world_size": ranks}],
        )
        save_score(run, real_runs / "steady", *score)
    assert "".join(row.split()[0] for row in told(capsys, str(tmp_path), *arguments)[1:]) == order


def test_a_run_without_a_score_is_not_the_best(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in(tmp_path / "a")
    save_score(run_in(tmp_path / "b"), real_runs / "steady", "val/loss", "min", 0.5)
    assert [row.split()[0] for row in told(capsys, str(tmp_path), "--sort", "best")[1:]] == ["b", "a"]


def test_json_has_every_figure_of_every_run(real_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads("\n".join(told(capsys, str(real_runs), "--json", "--sort", "best")))
    status = run_status(real_runs / "steady")
    (steady,) = [row for row in rows if row["directory"] == str(real_runs / "steady")]
    assert {key: value for key, value in steady.items() if key not in ("directory", "age_seconds")} == {
        key: value for key, value in vars(status).items() if key != "directory"
    }
    scores = [row["best"] for row in rows]
    assert scores == sorted(scores)
    assert len(scores) == 3


def test_runs_are_found_at_any_depth_but_not_inside_of_each_other(tmp_path: Path) -> None:
    for name in ("a", "team/b", "team/sweep/c", "a/checkpoints/d"):
        run_in(tmp_path / name) if not (tmp_path / name).exists() else None
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a", "team/b", "team/sweep/c"]


def test_a_folder_without_runs_and_a_folder_that_is_not_there_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, str(tmp_path)) == [f"no run below {tmp_path}"]
    assert cli.main(["runs", str(tmp_path / "no")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_five_hundred_runs_of_long_ledgers_are_listed_in_two_seconds_without_torch(
    real_runs: Path, tmp_path: Path
) -> None:
    long = (real_runs / "steady/ledger.jsonl").read_bytes() * 400  # 48,000 updates
    (tmp_path / "ledger.jsonl").write_bytes(long)
    for number in range(500):
        run = tmp_path / f"run-{number}"
        shutil.copytree(real_runs / "steady", run, ignore=shutil.ignore_patterns("*.safetensors", "ledger.jsonl"))
        (run / "ledger.jsonl").symlink_to(tmp_path / "ledger.jsonl")
    script = "import sys; from harness.launch.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", script, "runs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 2, "seconds of the processor, which a busy machine does not lengthen"
    assert len(done.stdout.splitlines()) == 501


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (86400 * 40, "40 d")]
)
def test_a_duration_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text

"""The directory of a run: one process at a time, one run for ever, and a word on how it ended."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from harness import __version__
from harness.config.io import dump_config, load_config
from harness.config.run_config import RunConfig
from harness.errors import ConfigError, NonFiniteError, RunInUseError, StorageError
from harness.export import main as export
from harness.launch import cli
from harness.observers.ledger import Ledger
from harness.ranks.env import Placement
from harness.ranks.rank_log import redirect_output
from harness.record.checkpoints import CheckpointDirectory
from harness.record.json_lines import append_event
from harness.record.run_directory import RunDirectory, stored_config
from harness.report.__main__ import main as report
from harness.session import Session
from harness.stopping import StopSignals
from harness.tracking.track import tracked_run
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main_and_listen


def a_config(root: Path, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "r", "output_root": str(root), "max_epochs": 1},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "mnist_5k", "global_batch": 64},
        "task": {"kind": "classification", "num_classes": 10},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunConfig.model_validate(values)


def described(config: RunConfig) -> list[str]:
    """Start the run of a config once; return its notices."""
    with RunDirectory(config) as directory:
        return directory.describe()


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock" and path.is_file()}


# ---------------------------------------------------------------- the lock


@contextmanager
def another_holder(config: RunConfig, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock until it is killed."""
    path = folder / "holder.yaml"
    path.write_text(dump_config(config))
    program = (
        "import sys\n"
        "from harness.config.io import load_config\n"
        "from harness.record.run_directory import RunDirectory\n"
        "with RunDirectory(load_config(sys.argv[1]).config):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_a_directory_that_another_process_trains_in_is_refused_with_its_host_and_pid(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    with another_holder(config, tmp_path) as holder, pytest.raises(RunInUseError) as caught:
        described(config)
    assert caught.value.exit_code == 8
    assert json.dumps({"host": socket.gethostname(), "pid": holder.pid}) in str(caught.value)


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    with another_holder(config, tmp_path) as holder:
        holder.kill()
        holder.wait()
        with RunDirectory(config):
            assert read(tmp_path / "r" / "lock")["pid"] == os.getpid()


def test_the_lock_is_free_again_when_the_run_is_over(tmp_path: Path) -> None:
    described(a_config(tmp_path))
    with RunDirectory(a_config(tmp_path)) as directory:
        assert directory.describe() == [], "a second start is refused nothing, and has nothing to say"


def test_the_lock_is_free_while_a_process_that_the_run_has_forked_is_still_there(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    context = multiprocessing.get_context("fork")
    is_there = context.Event()

    def stay() -> None:
        is_there.set()
        time.sleep(60)

    with RunDirectory(config):
        child = context.Process(target=stay)
        child.start()
        assert is_there.wait(60)
        with pytest.raises(RunInUseError):
            described(config)
    try:
        described(config)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
        child.close()


def test_another_run_of_the_same_root_is_not_in_the_way(tmp_path: Path) -> None:
    other = a_config(tmp_path, run={"name": "s"})
    with RunDirectory(a_config(tmp_path)), RunDirectory(other) as directory:
        assert directory.path == tmp_path / "s"
        assert read(directory.path / "lock")["pid"] == os.getpid()


@contextmanager
def in_use_and_untouched(folder: Path) -> Iterator[str]:
    """Hold a run directory; what is inside, given its configuration, must not change a byte of it."""
    config = a_config(folder)
    (folder / "r.yaml").write_text(dump_config(config))
    with RunDirectory(config) as directory:
        directory.describe()
        before = content_of(directory.path)
        yield str(folder / "r.yaml")
        assert content_of(directory.path) == before


def test_a_second_training_of_a_run_ends_with_exit_code_8_and_touches_nothing(tmp_path: Path) -> None:
    with in_use_and_untouched(tmp_path) as config:
        ((code, said),) = run_ranks(1, train_main_and_listen, config)
    assert code == 8, said
    assert said.startswith("RunInUseError: ")


@pytest.mark.slow
def test_what_rank_zero_finds_before_the_ranks_join_ends_them_all_alike(tmp_path: Path) -> None:
    with in_use_and_untouched(tmp_path) as config:
        first, second = run_ranks(2, train_main_and_listen, config, deadline_seconds=60)
    assert first[0] == second[0] == 8
    assert first[1].startswith("RunInUseError: ")
    assert second[1] == ""  # rank zero speaks for all


# ---------------------------------------------------------------- directories that cannot be written


@pytest.mark.parametrize("blocked", ["runs", "runs/r"])
def test_a_file_in_the_place_of_a_directory_is_a_storage_error(blocked: str, tmp_path: Path) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write to .*set run\.output_root") as caught:
        described(a_config(tmp_path / "runs"))
    assert caught.value.exit_code == 5
    assert (tmp_path / blocked).read_text() == "in the way"


def test_the_disk_has_the_name_of_every_new_directory_and_file_before_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    had: dict[str, list[str]] = {}
    monkeypatch.setattr(
        os, "fsync", lambda fd: had.update({(path := os.readlink(f"/proc/self/fd/{fd}")): list_of(Path(path))})
    )
    with RunDirectory(a_config(tmp_path / "new" / "runs")) as directory:
        CheckpointDirectory(directory.path / "checkpoints").prepare()
        Ledger(directory.path, keep_bytes=0).close()
    assert had[str(tmp_path)] == ["new"]
    assert had[str(tmp_path / "new")] == ["runs"]
    assert had[str(tmp_path / "new/runs")] == ["r"]
    assert {"checkpoints", "events.jsonl", "ledger.jsonl"} <= set(had[str(directory.path)])


def list_of(path: Path) -> list[str]:
    return os.listdir(path) if path.is_dir() else []


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_disk_that_is_full_when_the_run_is_described_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch)
    with pytest.raises(StorageError, match="No space left on device"):
        described(a_config(tmp_path))


def test_a_disk_that_is_full_when_the_exit_is_written_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch)
    with RunDirectory(a_config(tmp_path)) as directory, pytest.raises(StorageError, match="No space left on device"):
        directory.write_exit(code=0, reason="budget", step=1)


def test_an_exit_that_cannot_be_written_does_not_hide_why_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(self: Session) -> None:
        fill_disk(monkeypatch)
        raise NonFiniteError("loss is nan")

    monkeypatch.setattr(Session, "_fit", fit)
    path = tmp_path / "r.yaml"
    path.write_text(dump_config(a_config(tmp_path)))
    session = Session(load_config(path), Placement(), StopSignals(), str(path), [])
    with ExitStack() as stack, pytest.raises(NonFiniteError, match="loss is nan"):
        session.run_to_the_end(stack, stack)
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "r/exit.json").exists()


# ---------------------------------------------------------------- what a run is


def test_the_identity_of_a_run_is_written_once_and_kept(tmp_path: Path) -> None:
    described(a_config(tmp_path))
    first = (tmp_path / "r" / "run.json").read_bytes()
    described(a_config(tmp_path, optim={"peak_lr": 0.2}))
    assert (tmp_path / "r" / "run.json").read_bytes() == first
    identity = json.loads(first)
    assert identity.keys() == {"id", "created", "schema"}
    assert datetime.fromisoformat(identity["created"]).tzinfo is not None


def test_two_runs_have_two_identities(tmp_path: Path) -> None:
    for name in ("r", "s"):
        described(a_config(tmp_path, run={"name": name}))
    assert read(tmp_path / "r" / "run.json")["id"] != read(tmp_path / "s" / "run.json")["id"]


def test_the_resolved_configuration_lies_there_and_loads_as_the_same(tmp_path: Path) -> None:
    for config in (a_config(tmp_path), a_config(tmp_path, optim={"peak_lr": 1 / 3})):
        described(config)
        assert load_config(tmp_path / "r" / "config.yaml").config == config


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"model": {"hidden": [8]}}, "model.hidden: stored [4], given [8]"),
        ({"run": {"seed": 1}}, "run.seed: stored 42, given 1"),
        ({"data": {"global_batch": 32}}, "data.global_batch: stored 64, given 32"),
        ({"optim": {"kind": "adam"}}, 'optim.kind: stored "sgd", given "adam"'),
    ],
)
def test_the_directory_of_another_run_is_refused_with_the_difference_and_left_alone(
    changed: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    with RunDirectory(a_config(tmp_path)) as directory:
        directory.describe()
        directory.write_exit(code=0, reason="budget", step=1)
    (tmp_path / "r/checkpoints/step-00000001").mkdir(parents=True)
    before = content_of(tmp_path / "r")
    with pytest.raises(ConfigError) as caught:
        described(a_config(tmp_path, **changed))
    assert caught.value.exit_code == 2
    assert f"{tmp_path / 'r'} holds another run" in str(caught.value)
    assert difference in str(caught.value)
    assert content_of(tmp_path / "r") == before


def test_a_first_start_that_saved_nothing_may_be_mended_in_any_way(tmp_path: Path) -> None:
    described(a_config(tmp_path))
    assert described(a_config(tmp_path, model={"kind": "mlp", "hidden": [8]})) == []
    assert "[8]" in (tmp_path / "r/config.yaml").read_text()


def test_a_run_whose_checkpoints_are_all_in_quarantine_is_still_that_run(tmp_path: Path) -> None:
    described(a_config(tmp_path))
    (tmp_path / "r/checkpoints/quarantine/step-00000001-0123abcd").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model\.hidden"):
        described(a_config(tmp_path, model={"kind": "mlp", "hidden": [8]}))


@pytest.mark.parametrize("content", [b"run: [", b"[1]", b"", b"\xff", b"run: {name: r}", b"- " * 200_000])
def test_a_damaged_config_in_a_run_directory_says_what_it_is_and_what_to_do(
    real_runs: Path, tmp_path: Path, content: bytes
) -> None:
    run = Path(shutil.copytree(real_runs / "steady", tmp_path / "steady"))
    config = load_config(real_runs / "tiny.yaml", [f"run.output_root={tmp_path}"]).config
    (run / "config.yaml").write_bytes(content)
    before = content_of(run)
    with pytest.raises(ConfigError) as caught:
        described(config)
    assert str(run / "config.yaml") in str(caught.value)
    assert "Put it back from a copy; or remove it and start the run's command again" in str(caught.value)
    assert content_of(run) == before
    (run / "config.yaml").unlink()
    assert described(config) == []
    assert not (run / "config.yaml").exists(), "it is not known yet whether it is that of the run"
    RunDirectory(config).keep_config()
    assert load_config(run / "config.yaml").config == config


def test_a_config_of_another_version_with_keys_that_this_one_lacks_says_so(tmp_path: Path) -> None:
    path, config = tmp_path / "a.yaml", a_config(tmp_path)
    path.write_text(f"{dump_config(config).replace(__version__, '9.8.7')}new_section: {{}}\n")
    with pytest.raises(ConfigError, match=r"(?s)new_section: unknown key.*harness 9\.8\.7 wrote this file, and"):
        load_config(path)
    path.write_text(f"{dump_config(config)}new_section: {{}}\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    assert "wrote this file" not in str(refusal.value)


def test_nobody_is_advised_to_remove_a_config_that_another_version_wrote(tmp_path: Path) -> None:
    with RunDirectory(a_config(tmp_path)) as directory:
        directory.describe()
    path = directory.path / "config.yaml"
    path.write_text(f"{path.read_text().replace(__version__, '9.8.7')}new_section: {{}}\n")
    with pytest.raises(ConfigError, match=r"(?s)harness 9\.8\.7 wrote this file, and .*use 9\.8\.7$"):
        stored_config(directory.path)


def test_a_run_whose_directory_and_name_are_changed_together_goes_on_as_the_same_run(tmp_path: Path) -> None:
    described(a_config(tmp_path))
    (tmp_path / "r/checkpoints/step-00000001").mkdir(parents=True)
    identity = read(tmp_path / "r/run.json")
    (tmp_path / "r").rename(tmp_path / "s")
    (notice,) = described(a_config(tmp_path, run={"name": "s"}))
    assert notice == 'changed since the run was last started: run.name: stored "r", given "s"'
    assert read(tmp_path / "s/run.json") == identity


def test_a_changed_rate_is_noticed_once(tmp_path: Path) -> None:
    assert described(a_config(tmp_path)) == []
    (tmp_path / "r/checkpoints/step-00000001").mkdir(parents=True)
    faster = a_config(tmp_path, optim={"peak_lr": 0.2})
    assert described(faster) == ["changed since the run was last started: optim.peak_lr: stored 0.1, given 0.2"]
    assert described(faster) == []


def test_a_changed_budget_or_interval_is_not_worth_a_word(tmp_path: Path) -> None:
    described(a_config(tmp_path))
    assert described(a_config(tmp_path, run={"max_epochs": 9}, tracking={"log_every_steps": 3})) == []


# ---------------------------------------------------------------- how it ended


def test_how_the_run_ended_is_written_down_and_forgotten_when_it_starts_again(tmp_path: Path) -> None:
    with RunDirectory(a_config(tmp_path)) as directory:
        directory.describe()
        directory.write_exit(code=75, reason="interrupted", step=17)
        assert read(tmp_path / "r" / "exit.json") == {"code": 75, "reason": "interrupted", "step": 17}
        directory.write_exit(code=0, reason="budget", step=20)
        assert read(tmp_path / "r" / "exit.json") == {"code": 0, "reason": "budget", "step": 20}
    described(a_config(tmp_path))
    assert not (tmp_path / "r" / "exit.json").exists()


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    with RunDirectory(a_config(tmp_path)) as directory:
        directory.describe()
        directory.write_exit(code=0, reason="budget", step=1)
        found = {path.name for path in directory.path.iterdir()}
    assert found == {"lock", "run.json", "config.yaml", "exit.json"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            b'{"id": "0", "created": "", "schema": 7}',
            "is of schema 7, this harness knows 1; use the version that wrote it",
        ),
        (b'{"id": "0"}', "is broken: it is no object with a schema. Put it back from a copy, or remove it"),
        (b"[]", "is broken: it is no object with a schema"),
        (b'{"id"', "is broken: run.json cannot be read"),
        (b"[" * 100_000, "is broken: run.json cannot be read"),
        (b'{"schema": 1}', "is broken: its id is null"),
        (b'{"id": 5, "schema": 1}', "is broken: its id is 5"),
        (b'{"id": "../../x", "schema": 1}', r"is broken: its id is '\.\./\.\./x'"),
        (b'{"id": "", "schema": 1}', "is broken: its id is ''"),
    ],
)
def test_a_run_that_another_version_wrote_or_that_is_broken_is_left_alone(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    config = a_config(tmp_path)
    described(config)
    (config.run_directory / "run.json").write_bytes(content)
    before = content_of(config.run_directory)
    with pytest.raises(ConfigError, match=problem):
        described(config)
    with pytest.raises(ConfigError, match=problem):
        tracked_run(config.run_directory)
    assert content_of(config.run_directory) == before


@pytest.mark.parametrize(("has_ledger", "wanted"), [(True, "saved"), (False, "chosen")])
def test_an_id_is_chosen_for_a_new_run_only_and_without_a_ledger_a_run_with_checkpoints_is_new(
    real_runs: Path, tmp_path: Path, has_ledger: bool, wanted: str
) -> None:
    run = Path(shutil.copytree(real_runs / "steady", tmp_path / "steady"))
    config = load_config(real_runs / "tiny.yaml", [f"run.output_root={tmp_path}"]).config
    ids = {"saved": read(run / "run.json")["id"], "chosen": "chosen"}
    (run / "run.json").unlink()
    if not has_ledger:
        (run / "ledger.jsonl").unlink()
    with RunDirectory(config, new_id="chosen") as directory:
        directory.describe()
    assert directory.run_id == read(run / "run.json")["id"] == ids[wanted]


DAMAGED = {
    "truncated": b'{"id": "abc',
    "empty": b"",
    "a list": b"[1]",
    "nested deeply": b"[" * 100_000,
    "no text": b"\xff\xfe",
    "no id": b'{"created": "2026-01-01T00:00:00+00:00", "schema": 1}',
    "an id of nonsense": b'{"id": [], "created": "2026-01-01T00:00:00+00:00", "schema": 1}',
    "no schema": b'{"id": "a", "created": "2026-01-01T00:00:00+00:00"}',
    "no time": b'{"id": "a", "schema": 1}',
    "a time of nonsense": b'{"id": "a", "created": 5, "schema": 1}',
    "a time before all times": b'{"id": "a", "created": "0001-01-01", "schema": 1}',
}


@pytest.mark.parametrize("way", DAMAGED)
def test_commands_that_only_look_at_a_run_say_what_is_wrong_with_its_run_json_and_go_on(
    way: str, real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(real_runs / "steady", tmp_path / "steady"))
    update = {"event": "update", "step": 1, "loss": 0.5, "seconds": 0.1, "applied": True}  # few charts to draw
    (run / "ledger.jsonl").write_text(json.dumps(update) + "\n")
    (run / "run.json").write_bytes(DAMAGED[way])
    is_told = way not in ("no id", "an id of nonsense", "no schema")  # which are not shown
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert ("unreadable: run.json is broken" in capsys.readouterr().out) == is_told
    assert report([str(run)]) == 0
    assert ("run.json is broken" in capsys.readouterr().err) == is_told
    assert cli.main(["verify", str(run)]) == cli.main(["status", str(run)]) == 0
    assert export([str(run), "--to", str(tmp_path / "out")]) == 0


def test_a_run_json_that_is_removed_because_it_was_broken_has_the_id_again(real_runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(real_runs / "steady", tmp_path / "steady"))
    config = load_config(real_runs / "tiny.yaml", [f"run.output_root={tmp_path}"]).config
    run_id = read(run / "run.json")["id"]
    (run / "run.json").write_bytes(b"")
    with pytest.raises(ConfigError, match="or remove it: the checkpoints have the run's id too"):
        described(config)
    (run / "run.json").unlink()
    described(config)
    assert read(run / "run.json")["id"] == run_id


@pytest.mark.parametrize("name", ["lock", "ledger.jsonl", "events.jsonl", "logs/rank-0.log"])
def test_a_link_in_a_run_of_a_stranger_leads_to_no_file_of_ours(tmp_path: Path, name: str) -> None:
    victim, link = tmp_path / "victim", tmp_path / "r" / name
    link.parent.mkdir(parents=True)
    victim.write_text("mine\n")
    link.symlink_to(victim)
    write: dict[str, Callable[[], object]] = {
        "lock": RunDirectory(a_config(tmp_path)).__enter__,
        "ledger.jsonl": lambda: Ledger(tmp_path / "r", keep_bytes=0),
        "events.jsonl": lambda: append_event(tmp_path / "r", "started"),
        "logs/rank-0.log": lambda: redirect_output(Placement(log_file=link)),
    }
    with pytest.raises(StorageError, match="it is a link, which may lead anywhere; put the file itself there"):
        write[name]()
    assert victim.read_text() == "mine\n"

"""The directory of a run: made, locked and described by rank zero."""

import fcntl
import json
import os
import socket
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from harness.config.changes import compare
from harness.config.fields import RUN_ID
from harness.config.io import dump_config, load_stored, other_version, shown
from harness.config.run_config import RunConfig
from harness.config.use import UsedFile
from harness.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HarnessError,
    NonFiniteError,
    RunInUseError,
    StorageError,
)
from harness.record.checkpoints import CheckpointDirectory
from harness.record.files import json_bytes, make_directory_durably, own_file, replace_durably, storage_errors
from harness.record.manifest import checkpoint_problems, read_json, read_trainer

SCHEMA = 1


class RunDirectory:
    """Holds the lock of a run directory from `__enter__` to `__exit__`; the kernel frees it if this process dies.

    Args:
        new_id: of a run that has none yet, if somebody else has chosen one.
        used: the files whose code the configuration brings.
    """

    def __init__(self, config: RunConfig, *, new_id: str | None = None, used: Sequence[UsedFile] = ()) -> None:
        self._config, self._new_id, self._used = config, new_id, used
        self._stored: RunConfig | None = None
        self.path = config.run_directory
        self.run_id = ""
        """What trackers know the run by; known to who has described the directory."""

    def __enter__(self) -> "RunDirectory":
        """Make and lock the directory.

        Raises:
            StorageError: it cannot be written.
            RunInUseError: another process trains in it.
        """
        try:
            make_directory_durably(self.path)
            self._lock = open(self.path / "lock", "a+", opener=own_file)
            _keep_from_children(self._lock)
        except OSError as error:
            raise StorageError(
                f"cannot write to {self.path}: {error.strerror}. "
                "Mend it, or set run.output_root to a folder you can write"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "an unknown process"
            self._lock.close()
            raise RunInUseError(
                f"{self.path} is in use by {holder}. Wait for it, stop it, or give this run another run.name"
            ) from error
        with storage_errors("write", self.path / "lock"):
            self._lock.truncate(0)
            self._lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            self._lock.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def describe(self) -> list[str]:
        """Write run.json once and config.yaml; return what changed since the run was last started and is worth a word.

        Where config.yaml was lost, nobody has compared this configuration with the run: `keep_config` writes it later.

        Raises:
            ConfigError: the directory holds a run that this config, or this version, cannot continue.
        """
        notices = changes_since(self.path, self._config)
        if goes_on(self.path):
            self._stored = stored_config(self.path)
            notices += self._changed_code()
        identity = self.path / "run.json"
        created = datetime.now(UTC).isoformat(timespec="seconds")
        with storage_errors("write in", self.path):
            if not identity.exists():
                run_id = self._saved_id() or self._new_id or uuid.uuid4().hex[:8]
                replace_durably(identity, json_bytes({"id": run_id, "created": created, "schema": SCHEMA}))
            for old in (self.path / "exit.json", *self.path.glob("failed-rank-*.json")):
                old.unlink(missing_ok=True)
        if (self.path / "config.yaml").exists() or not has_saves(self.path):
            self.keep_config()
        if not has_saves(self.path):
            self.note_used()
        self.run_id = str(read_identity(self.path)["id"])
        return notices

    def keep_config(self) -> None:
        """Write config.yaml, with what an earlier start took from the data until this one has taken it."""
        config = self._config
        if self._stored and (left := _left_to_data(config)):
            kept = {name: getattr(self._stored.model, name, None) for name in left}
            config = config.model_copy(update={"model": config.model.model_copy(update=kept)})
        with storage_errors("write in", self.path):
            replace_durably(self.path / "config.yaml", dump_config(config).encode())

    def note_used(self) -> None:
        """Write into run.json which files brought code of the user."""
        if self._used or "use" in read_identity(self.path):
            self.note(use=[file.to_json() for file in self._used])

    def take_facts(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write the configuration after its network has taken what the data say, and what they say.

        Raises:
            ConfigError: they say otherwise than when the run began.
        """
        left = _left_to_data(self._config)
        for name in left:
            before, now = getattr(self._stored and self._stored.model, name, None), getattr(config.model, name)
            if before is not None and before != now:
                raise ConfigError(
                    f"{self.path} holds another run: model.{name} was {before!r}, and the data say {now!r} now. Give "
                    "it the data that it began with, or use another run.name for a new run"
                )
        if not (config.model.is_ours and config.data.is_ours):
            self.note(facts=dict(facts))
        if left:
            self._config = config
            self.keep_config()

    def note(self, **facts: Any) -> None:
        """Write facts of this launch into run.json, in the place of those of the one before."""
        identity = self.path / "run.json"
        with storage_errors("write in", self.path):
            replace_durably(identity, json_bytes({**read_identity(self.path), **facts}))

    def _changed_code(self) -> list[str]:
        """Return a sentence where code of the user is not what it was at the last start."""
        before = {Path(file["file"]).name: file["sha256"] for file in read_identity(self.path).get("use", [])}
        now = {Path(file.file).name: file.sha256 for file in self._used}
        names = [name for name in before | now if before.get(name) != now.get(name)]
        if not names:
            return []
        return [
            f"the code of {', '.join(names)} is not what it was when the run was last started; a network whose tensors "
            "have other names or shapes is refused"
        ]

    def _saved_id(self) -> str | None:
        """Return the id that a checkpoint knows this run by, where run.json is lost.

        Without a ledger nothing is lost: then somebody has put checkpoints of another run here to begin with.
        """
        if not (self.path / "ledger.jsonl").exists():
            return None
        checkpoints = CheckpointDirectory(self.path / "checkpoints")
        for checkpoint in checkpoints.steps() if checkpoints.path.is_dir() else ():
            if checkpoint_problems(checkpoint) == []:
                run_id = read_trainer(checkpoint).get("run_id")
                return run_id if is_run_id(run_id) else None
        return None

    def write_exit(self, *, code: int, reason: str, step: int) -> None:
        """Write how the run ended, since torchrun itself exits with 1 for everything."""
        with storage_errors("write", self.path / "exit.json"):
            replace_durably(self.path / "exit.json", json_bytes({"code": code, "reason": reason, "step": step}))

    def write_failure(self, rank: int, *, code: int, reason: str) -> None:
        """Leave word for rank zero of what ends another rank."""
        path = self.path / f"failed-rank-{rank}.json"
        with storage_errors("write", path):
            replace_durably(path, json_bytes({"code": code, "reason": reason}))

    def first_failure(self, *, wait_seconds: float = 2.0) -> HarnessError | None:
        """Return what another rank has left word of, as an error with its exit code; None if none does in time."""
        kinds = {
            kind.exit_code: kind for kind in (ConfigError, DataError, CheckpointError, StorageError, NonFiniteError)
        }
        until = time.monotonic() + wait_seconds
        while not (found := sorted(self.path.glob("failed-rank-*.json"))):
            if time.monotonic() > until:
                return None
            time.sleep(0.05)
        failure = read_json(found[0])
        rank = found[0].stem.removeprefix("failed-rank-")
        return kinds.get(failure["code"], HarnessError)(f"{failure['reason']} (told by rank {rank}, which ended)")


def _keep_from_children(lock: IO[str]) -> None:
    """Have a process that is forked from this one let go of a file: those that read rows outlive a killed rank by
    some milliseconds, and the next start may come before they have ended."""
    found = weakref.ref(lock)

    def close() -> None:
        if (inherited := found()) is not None:
            inherited.close()

    os.register_at_fork(after_in_child=close)


def _left_to_data(config: RunConfig) -> list[str]:
    """Return the keys of the network that the data are to say."""
    return [name for name in config.model.facts_wanted if getattr(config.model, name) is None]


def goes_on(directory: Path) -> bool:
    """Whether a run directory holds a run that a start continues."""
    return (directory / "config.yaml").exists() and (directory / "run.json").exists() and has_saves(directory)


def has_saves(directory: Path) -> bool:
    """Whether a run directory has a checkpoint, be it a broken one."""
    patterns = ("checkpoints/step-*", "checkpoints/quarantine/step-*")
    return any(any(directory.glob(pattern)) for pattern in patterns)


def changes_since(directory: Path, config: RunConfig) -> list[str]:
    """Return what changed since a run was last started and is worth a word; writes nothing.

    Raises:
        ConfigError: the directory holds a run that this config, or this version, cannot continue.
    """
    if (directory / "run.json").exists():
        read_identity(directory)
    # Before anything was saved there is no run to continue: a first start may be mended in any way.
    if not (directory / "config.yaml").exists() or not has_saves(directory):
        return []
    changes = compare(stored_config(directory), config)
    if changes.refused:
        raise ConfigError(f"{directory} holds another run: {changes.refusal_message()}")
    return [f"changed since the run was last started: {change}" for change in changes.noticed]


def read_identity(directory: Path) -> dict[str, Any]:
    """Return what run.json says: `id`, `created` and `schema`.

    Raises:
        ConfigError: there is none, it is broken, or another version of this harness wrote it.
    """
    path = directory / "run.json"
    if not path.exists():
        raise ConfigError(f"{directory} is not a run directory: it has no run.json. Give one such as runs/mnist-cnn")
    try:
        identity = read_json(path)
        problem = "" if isinstance(identity, dict) and "schema" in identity else "it is no object with a schema"
    except (OSError, ValueError) as error:
        problem = str(error)
    if not problem and identity["schema"] != SCHEMA:
        raise ConfigError(
            f"{path} is of schema {shown(identity['schema'])}, this harness knows {SCHEMA}; use the version that wrote "
            "it, or another run.name. harness report draws what it can of any"
        )
    if not problem and not is_run_id(identity.get("id")):
        problem = f"its id is {shown(identity.get('id'))}"
    if problem:
        raise ConfigError(
            f"{path} is broken: {problem}. Put it back from a copy, or remove it: the checkpoints have the run's id too"
        )
    return dict(identity)


def stored_config(directory: Path) -> RunConfig:
    """Return the configuration that a run was last started with.

    Raises:
        ConfigError: its config.yaml is damaged or gone.
    """
    try:
        return load_stored(directory / "config.yaml")
    except ConfigError as error:
        advice = (
            "\n  The run wrote it when it was started. Put it back from a copy; or remove it and start "
            "the run's command again, which writes it anew"
        )
        is_whole = other_version(directory / "config.yaml")  # then it is not the file that is to be mended
        raise ConfigError(f"{error.args[0]}{'' if is_whole else advice}") from error


def is_run_id(value: Any) -> bool:
    """Whether something that was read may be the id of a run."""
    return isinstance(value, str) and RUN_ID.fullmatch(value) is not None

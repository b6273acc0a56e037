"""Weights & Biases: one wandb run for a run, whatever happens to either."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import harness
from harness.config.tracking import VARIABLES, Wandb, wandb_settings
from harness.errors import EXIT_DONE, EXIT_INTERRUPTED, TrackingError
from harness.observers.base import Link
from harness.record.checkpoints import CheckpointDirectory
from harness.tracking.points import STEP, Row
from harness.tracking.tracker import TO_SEND, Opened, TrackedRun, Tracker
from harness.tracking.wandb_progress import last_step_on_disk, loss_at, what_is_missing


class WandbTracker(Tracker):
    """Sends rows under their own steps, so that `_step` and `trainer/global_step` are one.

    Online the server knows which rows it has, and is asked again at the end: of rows that it refused, wandb says so in
    its log only. Offline the files of earlier processes are read back: what wandb holds in memory when it is killed is
    lost, so nothing else can tell. Either way a row is there once and none is missing.
    """

    name = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._settings = wandb_settings(run.config.tracking) or Wandb()

    @classmethod
    def links(cls, directory: Path) -> list[Link]:
        return [
            ("to look at it", shlex.join(["wandb", "leet", str(_folder(directory) / "wandb")])),
            (TO_SEND, shlex.join(["harness", "track", "sync", str(directory)])),
        ]

    def open(self, *, offline: bool) -> Opened:
        import wandb

        self._wandb = wandb
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing goes anywhere but to the server that is named
        for variable in VARIABLES.values():  # they are in the settings; wandb would refuse a value such as tags "a,,b"
            os.environ.pop(variable, None)
        settings, folder = self._settings, _folder(self.run.directory)
        self._is_offline = offline = offline or settings.mode == "offline"
        try:
            self._wandb_run = wandb.init(
                id=self.run.id,
                resume="allow",
                mode="offline" if offline else "online",
                dir=folder.absolute(),
                name=os.environ.get("WANDB_NAME") or self.run.config.run.name,
                **settings.model_dump(include={"project", "entity", "group", "notes", "job_type", "tags"}),
                settings=wandb.Settings(
                    console="off",
                    init_timeout=settings.start_timeout_seconds,
                    save_code=False,  # it would be the code of this process
                    **({"x_stats_pid": self.run.trainer_pid} if self.run.trainer_pid else {}),
                ),
            )
        except (wandb.Error, ValueError) as error:  # the latter where it cannot take one of its variables
            raise TrackingError(f"wandb could not begin run {self.run.id}: {error}") from error
        self._wandb_run.define_metric(STEP)
        self._wandb_run.define_metric("*", step_metric=STEP)
        self.describe(self.run.config.model_dump(mode="json"))
        if settings.save_code:
            self._wandb_run.log_code(str(Path(harness.__file__).parent))
        if offline:
            self._last_step = last_step_on_disk(folder, self.run.id)
            return Opened(f"wandb: offline, in {folder}", last_step=self._last_step)
        self._last_step = self._wandb_run.starting_step - 1
        loss = loss_at(self._last_step, self._wandb_run.summary)
        url = self._wandb_run.url
        return Opened(f"wandb: {url}", url=url, last_step=self._last_step, last_loss=loss)

    def describe(self, facts: dict[str, Any]) -> None:
        self._wandb_run.config.update(facts, allow_val_change=True)

    def log(self, row: Row) -> None:
        charts = {name: self._confusion_chart(matrix, title=name) for name, matrix in row.matrices.items()}
        tables = {name: self._wandb.Table(columns=table.columns, data=table.rows) for name, table in row.tables.items()}
        self._wandb_run.log({**row.figures, **charts, **tables}, step=row.step, commit=True)
        self._last_step = row.step

    def alert(self, title: str, text: str) -> None:
        self._wandb_run.alert(title, text, level="WARN", wait_duration=0)

    def close(self, *, exit_code: int) -> str:
        if exit_code == EXIT_INTERRUPTED:
            self._wandb_run.mark_preempting()
        if exit_code == EXIT_DONE and self._settings.log_checkpoints:
            self._log_best_checkpoint()
        self._wandb_run.finish(exit_code=exit_code)
        return "" if self._is_offline else what_is_missing(self._wandb, self._wandb_run.path, of=self._last_step)

    def _log_best_checkpoint(self) -> None:
        checkpoints = CheckpointDirectory(self.run.directory / "checkpoints")
        if best := checkpoints.best():
            artifact = self._wandb.Artifact(f"{self.run.config.run.name}-checkpoint", type="model")
            artifact.add_dir(str(checkpoints.path / best), name=best, policy="immutable")  # else copied to home
            self._wandb_run.log_artifact(artifact, aliases=["best"])

    def _confusion_chart(self, matrix: list[list[float]], *, title: str) -> Any:
        axes = ("Actual", "Predicted", "nPredictions")  # as wandb's own chart calls them
        cells = [[str(i), str(j), count] for i, counts in enumerate(matrix) for j, count in enumerate(counts)]
        table, fields = self._wandb.Table(columns=list(axes), data=cells), dict(zip(axes, axes, strict=True))
        return self._wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": title})


def _folder(directory: Path) -> Path:
    return Path(os.environ.get("WANDB_DIR") or directory)

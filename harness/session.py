"""One launch of a run on one rank: joins the others, builds, trains, and writes how it ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from harness.config.io import LoadedConfig, load_config
from harness.config.sweep import chosen_run_id, swept
from harness.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    ConfigError,
    HarnessError,
    NonFiniteError,
    PeerError,
    StorageError,
)
from harness.own_code import told
from harness.ranks.env import Placement
from harness.ranks.process import let_go_of_frames
from harness.record.json_lines import append_event
from harness.record.run_directory import RunDirectory
from harness.report.at_end import write_report
from harness.state import FitResult, TrainState
from harness.stopping import StopSignals

if TYPE_CHECKING:
    from harness.observers.base import Observers
    from harness.ranks.group import Ranks
    from harness.run import Run
    from harness.tracking.sidecar import Sidecar


class Session:
    """One launch of a run, on one rank.

    Args:
        path: of the configuration, which with `overrides` was `loaded`.
    """

    ranks: Ranks
    """From `_join` on."""

    def __init__(
        self, loaded: LoadedConfig, place: Placement, signals: StopSignals, path: str, overrides: Sequence[str]
    ) -> None:
        self.place, self.signals, self._path = place, signals, path
        self.command = place.command(path, overrides)
        self.state = TrainState()
        self.trackers: Sequence[Sidecar] = ()  # on rank zero, the processes that show this run elsewhere
        self._take(loaded, overrides)

    def _take(self, loaded: LoadedConfig, overrides: Sequence[str]) -> None:
        self.config, self.notices, self._overrides = loaded.config, list(loaded.notices), list(overrides)
        chosen_id = chosen_run_id() if self.config.tracking.wandb else None
        self.used = loaded.used
        self.directory = RunDirectory(self.config, new_id=chosen_id, used=loaded.used.files)

    def run_to_the_end(self, stack: ExitStack, after_exit: ExitStack) -> int:
        """Join the other ranks, build, train, and write exit.json whatever happens. Collective.

        Args:
            stack: is given what is to be undone after it.
            after_exit: see `train`.
        """
        problem: HarnessError | None = None
        if self.place.rank == 0:  # before torch is imported and the ranks join: trackers open meanwhile
            try:
                self._open(stack, after_exit)
            except HarnessError as error:
                problem = error  # all ranks hear of it when they have joined

        try:
            with self._first_errors():
                self._join(stack, problem)
                result = self._fit()
        except Exception as error:
            try:
                self._write_exit(**_failure(error))
            except StorageError as second:  # the first error is the one that counts
                print(second, file=sys.stderr, flush=True)
            let_go_of_frames(error)
            raise
        return _exit_code(result)

    def _open(self, stack: ExitStack, after_exit: ExitStack) -> None:
        """Hear what a sweep wants, take the run directory and start its trackers. On rank zero alone."""
        from harness.tracking.build import start_trackers

        if self.config.tracking.wandb:
            self._hear_sweep(swept(self._overrides, name=self.config.run.name))
        stack.enter_context(self.directory)
        self.notices += self.directory.describe()
        if self.config.tracking.report:
            after_exit.callback(write_report, self.directory.path)
        self.trackers = start_trackers(self.config.tracking, self.directory, use=self.used.names)
        for tracker in self.trackers:
            stack.callback(tracker.close)

    def _join(self, stack: ExitStack, problem: HarnessError | None) -> None:
        """Join the other ranks, which hear what rank zero has found. Collective."""
        from harness.ranks.join import join_ranks, leave_ranks

        strategy = self.config.strategy
        timeout_seconds, is_zero = strategy.collective_timeout_seconds, strategy.kind != "ddp"
        self.ranks = join_ranks(self.place, timeout_seconds=timeout_seconds, alone_in_group=is_zero)
        stack.callback(leave_ranks)
        with self.ranks.raise_on_all_ranks("opening the run directory"):
            if problem:
                raise problem
        self._hear_sweep(self.ranks.broadcast(self._overrides))

    def _hear_sweep(self, overrides: Sequence[str]) -> None:
        """Take the configuration of other overrides, if they are others."""
        if overrides == self._overrides:
            return
        found = load_config(self._path, overrides, world_size=self.place.world_size)
        if found.config.strategy != self.config.strategy:
            raise ConfigError(
                "strategy: the ranks join before all have heard of the sweep; start its runs with harness launch, "
                "which hears of it first"
            )
        self._take(found, overrides)

    @contextmanager
    def _first_errors(self) -> Iterator[None]:
        """Have rank zero say what has ended another rank, of which it only sees that the rank is gone.

        Raises:
            PeerError: a peer is gone and has left no word.
        """
        from harness.ranks.group import peer_errors

        try:
            with peer_errors():
                yield
        except PeerError as error:
            first = self.directory.first_failure() if self.place.rank == 0 else None
            if first is None:
                raise
            raise first from error
        except Exception as error:
            if self.place.rank != 0 and getattr(error, "is_of_one_rank", True):
                reason = error.args[0] if isinstance(error, HarnessError) else told(error)
                self.directory.write_failure(self.place.rank, code=_failure(error)["code"], reason=str(reason))
            raise

    def _write_exit(self, code: int, reason: str) -> None:
        if self.directory.run_id:  # of rank zero, which has taken the directory
            self.directory.write_exit(code=code, reason=reason, step=self.state.step)

    def _fit(self) -> FitResult:
        from harness.loop import fit
        from harness.saving import record_save_result

        run = self._build()
        try:
            with self._first_errors():  # so that what is told of the failure is what exit.json says
                run.batches.start(self.state.position)
                run.validation.start()
                result = fit(run, self.state)
            run.observers.happened("ended", reason=result.reason, step=result.step, signal=self.state.stop_signal)
            run.observers.ended(result)
            # Before trackers are waited for: a job that is out of time may be killed while they send.
            self._write_exit(_exit_code(result), result.reason)
        except Exception as error:
            run.observers.happened("failed", step=self.state.step, **_failure(error))
            if isinstance(error, NonFiniteError):  # of all ranks alike, so they can still agree on the save in flight
                record_save_result(run, self.state, run.checkpoints.finish())
            raise
        finally:
            run.batches.close()
            run.validation.close()
            run.checkpoints.close()
            run.observers.close()
        return result

    def _build(self) -> Run:
        """Construct everything, and pick the run up where its newest checkpoint left it. Collective."""
        import torch

        from harness.announce import announce_start
        from harness.assemble import assemble
        from harness.checkpoint import rng
        from harness.observers.base import own_random_numbers
        from harness.optim import moments_per_parameter
        from harness.rows.order import permutation_key
        from harness.saving import changed_settings, resume, take_stock

        config, ranks = self.config, self.ranks
        with ranks.raise_on_all_ranks("preparing the data"):
            if ranks.rank == 0:
                config.data.prepare(config.task, seed=config.run.seed)
        with ranks.raise_on_all_ranks("loading the data"):
            splits = config.data.open(config.task, seed=config.run.seed)
        self.notices = [*self.notices, *splits.notices]
        with ranks.raise_on_all_ranks("building the model"):
            if config.model.is_ours and not (splits.input_shape and splits.num_outputs):
                raise ConfigError(
                    f"model.kind: {config.model.kind} is built for rows of `inputs`, a tensor of one shape, and for a "
                    "task that says how many numbers a row wants; these rows, or this task, do not say it: name them "
                    "so, or bring a network of your own"
                )
            section, taken = config.model.with_facts(splits.facts)
            self.config = config = config.model_copy(update={"model": section})
            self.notices = [*self.notices, *taken]
            if ranks.rank == 0:
                self.directory.take_facts(config, splits.facts)
            torch.manual_seed(config.run.seed)  # the same first weights on every rank, at every world size
            model = config.model.build(splits.facts)
        self.notices = [*self.notices, *getattr(model, "notices", ())]
        run = assemble(config, ranks, splits, model, directory=self.directory.path, signals=self.signals)
        run.facts["run_id"] = self.directory.run_id
        saved = run.checkpoints.load(on_broken=self._note_broken, misfit=self._misfit)
        moments = moments_per_parameter(config.optim) + (config.ema is not None)
        run.checkpoints.check_room(run.strategy.state_bytes(moments_per_parameter=moments))
        rng.seed_everything(permutation_key(config.run.seed, ranks.rank, "rank"))
        if saved:
            self.state = resume(run, saved)
            self.notices = [*self.notices, *changed_settings(run, saved), *take_stock(run, self.state, saved)]
            with ranks.raise_on_all_ranks("writing the configuration"):
                if ranks.rank == 0:  # it is that of the run, as all has been compared
                    self.directory.keep_config()
                    self.directory.note_used()
        with own_random_numbers():  # rich draws some when it is imported
            run.observers = self._observers(run, trainer=saved.trainer if saved else {})
        if ranks.rank == 0:
            self.directory.note(promises=[promise.as_data() for promise in run.promises])
        announce_start(run, ranks, notices=self.notices, command=self.command, step=self.state.step)
        return run

    def _misfit(self, step: int, trainer: Mapping[str, Any]) -> str | None:
        """Return on rank zero why the run cannot go on from a whole checkpoint with the ledger that there is."""
        from harness.observers.ledger import ledger_problem
        from harness.record.progress import trainer_problems

        if trainer_problems(trainer, step=step):
            return None  # resuming says what is wrong with it
        return ledger_problem(self.directory.path, trainer, run_id=self.directory.run_id)

    def _note_broken(self, reason: str) -> None:
        """Say at once, on rank zero, that a checkpoint is not used: this start may come to nothing."""
        text = f"checkpoint not used, goes to quarantine/: {reason}"
        append_event(self.directory.path, "notice", text=text)
        print(text, file=sys.stderr, flush=True)

    def _observers(self, run: Run, *, trainer: Mapping[str, Any]) -> Observers:
        from harness.observers.base import Observers
        from harness.observers.console import Console
        from harness.observers.ledger import Ledger, is_of_another_run, kept_bytes

        with self.ranks.raise_on_all_ranks("opening the ledger"):
            if self.ranks.rank != 0:
                return Observers()
            run_id = self.directory.run_id
            ledger = Ledger(self.directory.path, keep_bytes=kept_bytes(trainer, run_id=run_id) if trainer else 0)
        if is_of_another_run(trainer, run_id=run_id):
            text = f"this run begins with a checkpoint of run {trainer['run_id']}: its ledger begins after update"
            self.notices = [*self.notices, f"{text} {self.state.step:,}"]
        console = Console(
            self.directory.path,
            agenda=run.agenda,
            state=self.state,
            samples_seen=trainer.get("samples_seen", 0),
            command=self.command,
            standings=run.judge.standings,
            report=self.directory.path / "report.html" if self.config.tracking.report else None,
            links=Observers(self.trackers).links,
        )
        for tracker in self.trackers:
            tracker.follow()
        return Observers([ledger, console, *self.trackers])


def _exit_code(result: FitResult) -> int:
    return EXIT_INTERRUPTED if result.reason == "interrupted" else EXIT_DONE


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, HarnessError):
        return {"code": error.exit_code, "reason": str(error)}
    return {"code": 1, "reason": repr(error)}

"""Trains one run: `python -m harness.train CONFIG [key=value ...]`, alone or under torchrun.

The only place that constructs. torch is imported after the config was found good, so that a typo answers at once.
"""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config_io import LoadedConfig, load_config
from harness.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError, HarnessError, PeerError
from harness.process import die_with_parent
from harness.run_directory import RunDirectory
from harness.state import FitResult, TrainState
from harness.stopping import StopSignals
from harness.strategy.env import Placement, placement

if TYPE_CHECKING:
    from torch import nn

    from harness.config import RunConfig
    from harness.data.order import BatchPlan
    from harness.data.sources import DataSplits
    from harness.observers.base import Observers
    from harness.run import Run
    from harness.strategy.base import Ranks

USAGE = "usage: python -m harness.train CONFIG [key=value ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit code of the run (see errors.py)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = 0
    try:
        place = placement()
        rank = place.rank
        if not arguments or arguments[0].startswith("-"):
            raise ConfigError(USAGE)
        path, *overrides = arguments
        return train(load_config(path, overrides, world_size=place.world_size), place)
    except HarnessError as error:
        # What all ranks know, rank zero says; whoever lost the others says so itself.
        if rank == 0 or isinstance(error, PeerError):
            print(error, file=sys.stderr, flush=True)
        return error.exit_code


def train(loaded: LoadedConfig, place: Placement) -> int:
    """Train on this rank and return the exit code. Collective."""
    signals = StopSignals()
    signals.install(second_interrupt_ends=not place.under_torchrun)
    if place.under_torchrun:
        die_with_parent()

    from harness.strategy.build import join_ranks, leave_ranks

    strategy = loaded.config.strategy
    timeout_seconds, is_zero = strategy.collective_timeout_seconds, strategy.kind != "ddp"
    ranks = join_ranks(place, timeout_seconds=timeout_seconds, alone_in_group=is_zero)
    with ExitStack() as stack:
        stack.callback(leave_ranks)
        directory = RunDirectory(loaded.config)
        session = Session(loaded.config, ranks, directory, signals)
        with ranks.together("opening the run directory"):
            if ranks.rank == 0:
                stack.enter_context(directory)
                session.notices = [*loaded.notices, *directory.describe()]
        return session.run_to_the_end()


@dataclass
class Session:
    """One launch of a run, on one rank."""

    config: RunConfig
    ranks: Ranks
    directory: RunDirectory
    signals: StopSignals
    notices: Sequence[str] = ()
    step: int = 0

    def run_to_the_end(self) -> int:
        """Build, train, and write exit.json whatever happens. Collective."""
        from harness.strategy.base import peers_answer

        try:
            with peers_answer():
                result = self._fit()
        except Exception as error:
            if isinstance(error, HarnessError):
                self._write_exit(error.exit_code, str(error))
            else:
                self._write_exit(1, f"{type(error).__name__}: {error}")
            raise
        code = EXIT_INTERRUPTED if result.reason == "interrupted" else EXIT_DONE
        self._write_exit(code, result.reason, step=result.step)
        return code

    def _write_exit(self, code: int, reason: str, *, step: int | None = None) -> None:
        if self.ranks.rank == 0:
            self.directory.write_exit(code=code, reason=reason, step=self.step if step is None else step)

    def _fit(self) -> FitResult:
        from harness.loop import fit

        run, state = self._build()
        self.step = state.step
        result = fit(run, state)
        run.observers.happened("ended", reason=result.reason, step=result.step, signal=state.stop_signal)
        run.observers.ended(result)
        return result

    def _build(self) -> tuple[Run, TrainState]:
        """Construct everything, and pick the run up where its newest checkpoint left it. Collective."""
        import torch

        from harness.checkpoint import rng
        from harness.data.order import permutation_key
        from harness.data.sources import load
        from harness.models.registry import build_model
        from harness.resume import resume

        config, ranks = self.config, self.ranks
        with ranks.together("loading the data"):
            splits = load(config.data, config.task, seed=config.run.seed)
        with ranks.together("building the model"):
            torch.manual_seed(config.run.seed)  # the same first weights on every rank, at every world size
            model = build_model(config.model, input_shape=splits.input_shape, num_outputs=splits.num_outputs)
        run = assemble(config, ranks, splits, model, directory=self.directory.path, signals=self.signals)
        saved = run.checkpoints.load()
        run.observers = self._observers(run.agenda.total_updates, trainer=saved.trainer if saved else {})
        rng.seed_everything(permutation_key(config.run.seed, ranks.rank, "rank"))
        state = resume(run, saved) if saved else TrainState()
        self._tell_start(run, state, rejected=saved.rejected if saved else [])
        return run, state

    def _observers(self, total_updates: int, *, trainer: Mapping[str, Any]) -> Observers:
        from harness.observers.base import Observers
        from harness.observers.console import Console
        from harness.observers.ledger import Ledger

        with self.ranks.together("opening the ledger"):
            if self.ranks.rank != 0:
                return Observers()
            ledger = Ledger(self.directory.path, keep_bytes=trainer.get("ledger_bytes", 0))
        return Observers([ledger, Console(total_updates=total_updates, start_step=trainer.get("step", 0))])

    def _tell_start(self, run: Run, state: TrainState, *, rejected: list[str]) -> None:
        config, plan = self.config, run.plan
        num_parameters = sum(parameter.numel() for parameter in run.strategy.module.parameters())
        for text in (*self.notices, *run.strategy.notices):
            run.observers.happened("notice", text=text)
        for text in rejected:
            run.observers.happened("notice", text=f"checkpoint not used, now in quarantine/: {text}")
        run.observers.happened(
            "started",
            step=state.step,
            world_size=self.ranks.world_size,
            strategy=config.strategy.kind,
            device=str(self.ranks.device),
            num_parameters=num_parameters,
            host=socket.gethostname(),
            python=platform.python_version(),
            versions={name: version(name) for name in ("harness", "torch", "accelerate", "datasets")},
        )
        where = f"resuming after update {state.step:,}" if state.step else "starting"
        run.observers.happened(
            "notice",
            text=f"{where}: {config.run.name}, {config.model.kind} with {num_parameters:,} parameters, "
            f"{config.strategy.kind} on {self.ranks.world_size} ranks ({self.ranks.device.type}); "
            f"{plan.num_rows:,} training rows, {plan.steps_per_epoch:,} updates an epoch, "
            f"{run.agenda.total_updates:,} in all; run directory {self.directory.path}",
        )


def assemble(
    config: RunConfig, ranks: Ranks, splits: DataSplits, model: nn.Module, *, directory: Path, signals: StopSignals
) -> Run:
    """Put a run together, with no observers yet. Collective.

    Raises:
        ConfigError: the parts do not fit together.
    """
    import torch

    from harness.agenda import Agenda
    from harness.checkpoint.store import CheckpointStore
    from harness.data.batches import TrainingBatches, ValidationBatches
    from harness.data.order import BatchPlan
    from harness.observers.base import Observers
    from harness.run import Run
    from harness.schedule import check_fits
    from harness.stopping import Judge
    from harness.strategy.build import DTYPES, build_strategy
    from harness.tasks import Scores, build_task

    plan = BatchPlan(
        num_rows=len(splits.train),
        global_batch=config.data.global_batch,
        world_size=ranks.world_size,
        micro_batch=config.strategy.micro_batch,
        seed=config.run.seed,
    )
    task = build_task(config.task, num_outputs=splits.num_outputs)
    agenda, judge = Agenda(config, plan.steps_per_epoch), Judge(config)
    with ranks.together("putting the run together"):
        judge.check_metrics(Scores(task, device=torch.device("cpu")).names)
        check_fits(config.schedule, total_updates=agenda.total_updates)
        check_batch_norm(model, plan)
    strategy = build_strategy(config, model, ranks)
    device, dtype = ranks.device, DTYPES[config.strategy.precision]
    return Run(
        config=config,
        strategy=strategy,
        task=task,
        plan=plan,
        batches=TrainingBatches(splits.train, plan, rank=ranks.rank, device=device, dtype=dtype),
        validation=ValidationBatches(
            splits.validation,
            rank=ranks.rank,
            world_size=ranks.world_size,
            batch_rows=config.strategy.micro_batch or config.data.global_batch // ranks.world_size,
            device=device,
            dtype=dtype,
        ),
        agenda=agenda,
        judge=judge,
        signals=signals,
        checkpoints=CheckpointStore(directory / "checkpoints", strategy, keep_last=config.checkpoint.keep_last),
        observers=Observers(),
    )


def check_batch_norm(model: nn.Module, plan: BatchPlan) -> None:
    """Refuse a batch arithmetic that would give BatchNorm a single row to take the variance of.

    Raises:
        ConfigError: names the layer and the batch that is too small.
    """
    from harness.tasks import batch_norms

    layers = batch_norms(model)
    if not layers:
        return
    for position in {0, plan.steps_per_epoch - 1}:
        for rank in range(plan.world_size):
            sizes = [stop - start for start, stop in plan.micro_batches(position, rank)]
            if 1 in sizes:
                raise ConfigError(
                    f"data.global_batch: batch {position + 1:,} of an epoch has {plan.rows_at(position)} rows, which "
                    f"leaves rank {rank} of {plan.world_size} a micro-batch of one row, and BatchNorm (layer "
                    f"{layers[0]}) wants two or more; with {plan.num_rows:,} training rows use another "
                    "data.global_batch, strategy.micro_batch or number of ranks, or model.norm=none"
                )


if __name__ == "__main__":
    sys.exit(main())

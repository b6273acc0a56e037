"""Trains one run: `python -m harness.train CONFIG [key=value ...]`, alone or under torchrun.

torch is imported after the config was found good, so that a typo answers at once.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from harness.config.io import LoadedConfig, load_config
from harness.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    ConfigError,
    HarnessError,
    NonFiniteError,
    PeerError,
    StorageError,
)
from harness.process import die_with_parent
from harness.rank_log import redirect_output
from harness.run_directory import RunDirectory
from harness.state import FitResult, TrainState
from harness.stopping import StopSignals
from harness.strategy.env import Placement, placement

if TYPE_CHECKING:
    from harness.config import RunConfig
    from harness.observers.base import Observers
    from harness.run import Run
    from harness.strategy.base import Ranks

USAGE = "usage: python -m harness.train CONFIG [key=value ...]"
SECONDS_FOR_RANK_ZERO = 1.0
"""How long other ranks leave rank zero to say what is wrong; torchrun ends all ranks when the first one does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit code of the run (see errors.py)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = 0
    try:
        place = placement()
        rank = place.rank
        redirect_output(place)
        if not arguments or arguments[0].startswith("-"):
            raise ConfigError(USAGE)
        path, *overrides = arguments
        return train(load_config(path, overrides, world_size=place.world_size), place)
    except PeerError as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except HarnessError as error:
        if rank == 0:  # what all ranks know, rank zero says
            print(error, file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS_FOR_RANK_ZERO)
        return error.exit_code


def train(loaded: LoadedConfig, place: Placement) -> int:
    """Train on this rank and return the exit code. Collective."""
    signals = StopSignals(end_time=place.end_time)
    signals.install(second_interrupt_ends=not place.under_torchrun)
    if place.under_torchrun:
        die_with_parent()

    from harness.strategy.base import peers_answer
    from harness.strategy.build import join_ranks, leave_ranks

    strategy = loaded.config.strategy
    timeout_seconds, is_zero = strategy.collective_timeout_seconds, strategy.kind != "ddp"
    with ExitStack() as stack:
        stack.enter_context(peers_answer())
        ranks = join_ranks(place, timeout_seconds=timeout_seconds, alone_in_group=is_zero)
        stack.callback(leave_ranks)
        session = Session(loaded.config, ranks, RunDirectory(loaded.config), signals)
        with ranks.together("opening the run directory"):
            if ranks.rank == 0:
                stack.enter_context(session.directory)
                session.notices = [*loaded.notices, *session.directory.describe()]
        return session.run_to_the_end()


@dataclass
class Session:
    """One launch of a run, on one rank."""

    config: RunConfig
    ranks: Ranks
    directory: RunDirectory
    signals: StopSignals
    notices: Sequence[str] = ()
    state: TrainState = field(default_factory=TrainState)

    def run_to_the_end(self) -> int:
        """Build, train, and write exit.json whatever happens. Collective."""
        from harness.strategy.base import peers_answer

        try:
            with peers_answer():
                result = self._fit()
        except Exception as error:
            code = error.exit_code if isinstance(error, HarnessError) else 1
            try:
                self._write_exit(code, str(error) if isinstance(error, HarnessError) else repr(error))
            except StorageError as second:  # the first error is the one that counts
                print(second, file=sys.stderr, flush=True)
            raise
        code = EXIT_INTERRUPTED if result.reason == "interrupted" else EXIT_DONE
        self._write_exit(code, result.reason)
        return code

    def _write_exit(self, code: int, reason: str) -> None:
        if self.ranks.rank == 0:
            self.directory.write_exit(code=code, reason=reason, step=self.state.step)

    def _fit(self) -> FitResult:
        from harness.loop import fit
        from harness.resume import finish_saving

        run = self._build()
        try:
            result = fit(run, self.state)
            run.observers.happened("ended", reason=result.reason, step=result.step, signal=self.state.stop_signal)
            run.observers.ended(result)
        except NonFiniteError:  # of all ranks alike, so that they can still agree on the save in flight
            finish_saving(run, self.state)
            raise
        finally:
            run.checkpoints.close()
            run.observers.close()
        return result

    def _build(self) -> Run:
        """Construct everything, and pick the run up where its newest checkpoint left it. Collective."""
        import torch

        from harness.assemble import assemble
        from harness.checkpoint import rng
        from harness.data.order import permutation_key
        from harness.data.sources import load
        from harness.models.registry import build_model
        from harness.observers.base import own_random_numbers
        from harness.optim import moments_per_parameter
        from harness.resume import changed_settings, resume

        config, ranks = self.config, self.ranks
        with ranks.together("loading the data"):
            splits = load(config.data, config.task, seed=config.run.seed)
        with ranks.together("building the model"):
            torch.manual_seed(config.run.seed)  # the same first weights on every rank, at every world size
            model = build_model(config.model, input_shape=splits.input_shape, num_outputs=splits.num_outputs)
        run = assemble(config, ranks, splits, model, directory=self.directory.path, signals=self.signals)
        saved = run.checkpoints.load()
        moments = moments_per_parameter(config.optim)
        run.checkpoints.check_room(run.strategy.state_bytes(moments_per_parameter=moments))
        rng.seed_everything(permutation_key(config.run.seed, ranks.rank, "rank"))
        if saved:
            self.state = resume(run, saved)
            self.notices = [*self.notices, *changed_settings(run, saved)]
        with own_random_numbers():  # rich draws some when it is imported
            run.observers = self._observers(run, trainer=saved.trainer if saved else {})
        self._tell_start(run, rejected=saved.rejected if saved else [])
        return run

    def _observers(self, run: Run, *, trainer: Mapping[str, Any]) -> Observers:
        from harness.observers.base import Observers
        from harness.observers.console import Console
        from harness.observers.ledger import Ledger

        with self.ranks.together("opening the ledger"):
            if self.ranks.rank != 0:
                return Observers()
            ledger = Ledger(self.directory.path, keep_bytes=trainer.get("ledger_bytes", 0))
        console = Console(
            self.directory.path,
            total_updates=run.agenda.total_updates,
            step=trainer.get("step", 0),
            samples_seen=trainer.get("samples_seen", 0),
        )
        return Observers([ledger, console])

    def _tell_start(self, run: Run, *, rejected: list[str]) -> None:
        config, plan, step = self.config, run.plan, self.state.step
        num_parameters = run.strategy.num_parameters
        for text in (*self.notices, *run.strategy.notices):
            run.observers.happened("notice", text=text)
        for text in rejected:
            run.observers.happened("notice", text=f"checkpoint not used, now in quarantine/: {text}")
        run.observers.happened(
            "started",
            step=step,
            world_size=self.ranks.world_size,
            strategy=config.strategy.kind,
            device=str(self.ranks.device),
            num_parameters=num_parameters,
            host=socket.gethostname(),
            python=platform.python_version(),
            versions={name: version(name) for name in ("harness", "torch", "accelerate", "datasets")},
        )
        run.observers.happened(
            "notice",
            text=f"{f'resuming after update {step:,}' if step else 'starting'}: {config.run.name}, {config.model.kind} "
            f"with {num_parameters:,} parameters, {config.strategy.kind} on {self.ranks.world_size} "
            f"rank{'s' if self.ranks.world_size > 1 else ''} ({self.ranks.device.type}); {plan.num_rows:,} training "
            f"rows, {plan.steps_per_epoch:,} updates an epoch, {run.agenda.total_updates:,} in all; run directory "
            f"{self.directory.path}",
        )


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed. In the teardown of the libraries a C++ thread now and then aborts the process (SIGABRT,
    # "terminate called without an active exception"), after a run that went well.
    os._exit(exit_code)

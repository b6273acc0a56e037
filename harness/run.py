"""Everything one run consists of; `train.py` constructs it, the loop only uses it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.agenda import Agenda
from harness.checkpoint.store import CheckpointStore
from harness.config.run_config import RunConfig
from harness.doctor.promises import Promise
from harness.observers.base import Observers
from harness.rows.batches import TrainingBatches, ValidationBatches
from harness.rows.order import BatchPlan
from harness.schedule import learning_rate
from harness.state import StopReason, TrainState
from harness.stopping import Judge, StopSignals
from harness.strategy.base import Strategy
from harness.tasks.base import TaskLoss
from harness.watch.stopwatch import Stopwatch


@dataclass
class Run:
    """The parts of a run on one rank."""

    config: RunConfig
    strategy: Strategy
    task: TaskLoss
    plan: BatchPlan
    batches: TrainingBatches
    validation: ValidationBatches
    agenda: Agenda
    judge: Judge
    signals: StopSignals
    checkpoints: CheckpointStore
    data_digest: str
    """Changes with the rows that are trained on or validated with."""
    facts: dict[str, Any]
    """What a checkpoint says of the data, besides: what is needed to build the network without them."""
    read_otherwise: tuple[str, ...]
    """What is done with columns of the data that the version before did not."""
    observers: Observers
    stopwatch: Stopwatch
    promises: Sequence[Promise] = ()
    """What this run keeps, with the parts that it was given."""
    seconds_looked: float = 0.0
    """What it took to find that out."""
    share_of_peak_per_row: float | None = None
    """What share of its device's peak each rank uses when the run trains one row a second; None where it is unknown."""

    @property
    def schedule_updates(self) -> int:
        """The updates that the schedule's shape is spread over."""
        return self.config.schedule.length(self.agenda.total_updates)

    def learning_rate(self, update: int) -> float:
        """Return the rate of the `update`-th applied update, from 1."""
        config = self.config
        rate = learning_rate(
            update,
            config.schedule,
            peak_lr=config.optim.peak_lr,
            total_updates=self.agenda.total_updates,
            updates_per_epoch=self.agenda.updates_per_epoch,
        )
        return rate * self.judge.lr_factor

    def reason_to_stop(self, state: TrainState) -> StopReason | None:
        """Return why the run ends here, or None."""
        return self.agenda.reason_to_stop(state, patience_is_over=self.judge.wants_to_stop)

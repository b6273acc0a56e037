"""What is due after an update: integers in, answers out, the same on every rank."""

from dataclasses import dataclass

from harness.config.run_config import RunConfig
from harness.state import StopReason, TrainState

SECONDS_BETWEEN_VOTES = 1.0


@dataclass
class Agenda:
    """Decides how long an interval is, and when to evaluate, save and stop.

    An interval ends wherever something could be due, so that `state` is exact when it is asked.
    """

    config: RunConfig
    updates_per_epoch: int
    updates_until_vote: int = 1
    """How long an interval may be at most; rank zero names it at each interval's end, aiming at a second."""
    seconds_per_update: float | None = None
    """What an update took on this rank in the last interval."""

    @property
    def total_updates(self) -> int:
        """Updates of the whole run if every one is applied."""
        run = self.config.run
        by_epochs = run.max_epochs * self.updates_per_epoch if run.max_epochs else None
        return min(count for count in (by_epochs, run.max_steps) if count is not None)

    def updates_in_a_second(self) -> int:
        """Return how many updates make the time between two votes, by the pace of the last interval; at least 1."""
        if self.seconds_per_update is None:
            return 1
        return max(1, round(SECONDS_BETWEEN_VOTES / self.seconds_per_update))

    def updates_in_interval(self, state: TrainState) -> int:
        """Return how many updates come before reports are next reduced, read and written, and the ranks vote."""
        intervals = (
            self.config.tracking.log_every_steps,
            self.config.evaluation.every_steps,
            self.config.checkpoint.every_steps,
            self.config.run.max_steps,
        )
        epochs = (self.config.evaluation.every_epochs, self.config.run.max_epochs)
        by_position = [count * self.updates_per_epoch for count in epochs if count is not None]
        return min(
            self.updates_until_vote,
            *(interval - state.position % interval for interval in by_position),
            *(interval - state.step % interval for interval in intervals if interval is not None),
        )

    def evaluation_is_due(self, state: TrainState) -> bool:
        """Whether to evaluate now; always at the end of the budget."""
        if state.step == state.evaluated_step:
            return False
        every_epochs = self.config.evaluation.every_epochs
        return (
            _is_multiple(state.step, self.config.evaluation.every_steps)
            or (every_epochs is not None and _is_multiple(state.position, every_epochs * self.updates_per_epoch))
            or self._budget_is_spent(state)
        )

    def updates_until_evaluation(self, state: TrainState) -> int:
        """Return how many updates come before the next evaluation, 0 if it is due, as long as all are applied."""
        if self.evaluation_is_due(state):
            return 0
        run, evaluation, per_epoch = self.config.run, self.config.evaluation, self.updates_per_epoch
        left = [
            *([evaluation.every_steps - state.step % evaluation.every_steps] if evaluation.every_steps else []),
            *([run.max_steps - state.step] if run.max_steps else []),
            *([run.max_epochs * per_epoch - state.position] if run.max_epochs else []),
        ]
        if evaluation.every_epochs:
            left.append(evaluation.every_epochs * per_epoch - state.position % (evaluation.every_epochs * per_epoch))
        return max(0, min(left))

    def save_is_due(self, state: TrainState) -> bool:
        """Whether to save now, apart from the save that ends a run."""
        return state.is_best or _is_multiple(state.step, self.config.checkpoint.every_steps)

    def reason_to_stop(self, state: TrainState, *, patience_is_over: bool) -> StopReason | None:
        """Return why the run ends here, or None; a run that is done is not called interrupted."""
        if self._budget_is_spent(state):
            return "budget"
        if patience_is_over:
            return "early_stopping"
        return "interrupted" if state.stop_signal else None

    def _budget_is_spent(self, state: TrainState) -> bool:
        run = self.config.run
        return (run.max_steps is not None and state.step >= run.max_steps) or (
            run.max_epochs is not None and state.position >= run.max_epochs * self.updates_per_epoch
        )


def _is_multiple(count: int, interval: int | None) -> bool:
    return interval is not None and count > 0 and count % interval == 0

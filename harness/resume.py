"""Saving a run where it stands, and picking it up from there."""

from harness import __version__
from harness.checkpoint.store import Loaded
from harness.errors import DataError
from harness.run import Run
from harness.state import TrainState


def save(run: Run, state: TrainState) -> None:
    """Save the run at an interval's end, unless this step is saved already. Collective."""
    if state.step == state.saved_step and not state.is_best:
        return
    trainer = {
        "harness": __version__,
        "position": state.position,
        "step": state.step,
        "samples_seen": run.plan.samples_before(state.position),
        "evaluated_step": state.evaluated_step,
        "nonfinite_in_a_row": state.nonfinite_in_a_row,
        "metrics": state.metrics,
        "judge": run.judge.state_dict(),
        "ledger_bytes": run.observers.seal(),
        "data_digest": run.data_digest,
        "world_size": run.strategy.world_size,
        "strategy": run.config.strategy.kind,
    }
    directory = run.checkpoints.save(state.step, trainer, is_best=state.is_best)
    run.observers.happened("saved", step=state.step, directory=directory.name, is_best=state.is_best)
    state.saved_step, state.is_best = state.step, False


def resume(run: Run, loaded: Loaded) -> TrainState:
    """Return the run's state as it was when `loaded` was saved. Collective.

    Raises:
        DataError: the rows are not those that the run was trained on.
    """
    trainer = loaded.trainer
    with run.strategy.together("comparing the data"):
        if trainer["data_digest"] != run.data_digest:
            raise DataError(
                f"the data are not those that {loaded.directory} was trained on (digest {trainer['data_digest']}, now "
                f"{run.data_digest}), so what is left of the epoch and of the validation split would be other rows. "
                "Put the old files back, or train on the new ones under another run.name"
            )
    run.checkpoints.restore(loaded)
    run.judge.load_state_dict(trainer["judge"])
    return TrainState(
        position=trainer["position"],
        step=trainer["step"],
        nonfinite_in_a_row=trainer["nonfinite_in_a_row"],
        evaluated_step=trainer["evaluated_step"],
        saved_step=trainer["step"],
        metrics=trainer["metrics"],
    )

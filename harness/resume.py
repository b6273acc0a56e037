"""Saving a run where it stands, and picking it up from there."""

from harness import __version__
from harness.checkpoint.manifest import TRAINER
from harness.checkpoint.store import Loaded, SaveResult
from harness.checkpoint.trainer import check_trainer
from harness.errors import CheckpointError, ConfigError, DataError, StorageError
from harness.files import ADVICE
from harness.run import Run
from harness.state import TrainState


def save(run: Run, state: TrainState) -> None:
    """Begin to save the run at an interval's end, unless this step is saved already. Collective.

    Raises:
        StorageError: too many saves in a row failed.
    """
    if state.step == state.saved_step and not state.is_best:
        return
    hear_of_save(run, state, run.checkpoints.finish())
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
        "order": _order(run),
        "world_size": run.strategy.world_size,
        "strategy": run.config.strategy.kind,
        "optimizer": run.strategy.optimizer_settings(),
        "loss_scale": run.strategy.loss_scale.state_dict() if run.strategy.loss_scale else None,
        **run.facts,
    }
    run.checkpoints.begin(state.step, trainer, is_best=state.is_best, also_sync=run.observers.sync)
    state.saved_step, state.is_best = state.step, False
    if not run.config.checkpoint.asynchronous:
        hear_of_save(run, state, run.checkpoints.finish())


def finish_saving(run: Run, state: TrainState) -> None:
    """Wait for the last save of a run. Collective.

    Raises:
        StorageError: it failed.
    """
    hear_of_save(run, state, run.checkpoints.finish())
    if state.failed_saves:
        raise StorageError(f"{state.failed_saves[-1].args[0]}{ADVICE}")


def hear_of_save(run: Run, state: TrainState, result: SaveResult | None) -> None:
    """Tell how a save ended, if one did, and count it.

    Raises:
        StorageError: too many in a row failed.
    """
    if result is None:
        return
    name, step, is_best = result.directory.name, result.step, result.is_best
    if result.problem is None:
        state.failed_saves.clear()
        state.save_seconds = max(state.save_seconds, result.seconds)
        seconds = {"blocked_seconds": result.blocked_seconds, "seconds": result.seconds}
        run.observers.happened("saved", step=step, directory=name, is_best=is_best, **seconds)
        if result.notice:
            run.observers.happened("notice", text=f"{name} is saved, but {result.notice}")
        return
    state.saved_step = 0
    state.failed_saves.append(result.problem)
    reason, limit, in_a_row = str(result.problem), run.config.checkpoint.max_failed_saves, len(state.failed_saves)
    run.observers.happened("save failed", step=step, is_best=is_best, in_a_row=in_a_row, limit=limit, reason=reason)
    if in_a_row >= limit:
        text = f"{limit} saves in a row failed, the last at update {step:,}: {result.problem.args[0]}{ADVICE}"
        raise StorageError(text)


def changed_settings(run: Run, loaded: Loaded) -> list[str]:
    """Return a sentence for each setting of the optimizer that is not what it was when `loaded` was saved."""
    saved, present = loaded.trainer["optimizer"], run.strategy.optimizer_settings()
    before, now = ({name: group for group in groups for name in group["parameters"]} for groups in (saved, present))
    changed: dict[str, list[str]] = {}
    for name in before.keys() & now.keys():
        for key in before[name].keys() & now[name].keys() - {"parameters"}:
            if before[name][key] != now[name][key]:
                changed.setdefault(f"{key} is {now[name][key]}, was {before[name][key]}", []).append(name)
    return [
        f"the optimizer's {what}, for {len(names)} parameters such as {min(names)}"
        for what, names in sorted(changed.items())
    ]


def _order(run: Run) -> dict[str, int]:
    """Return what decides, with the rows, which of them a position stands for."""
    return {"seed": run.plan.seed, "global_batch": run.plan.global_batch}


def resume(run: Run, loaded: Loaded) -> TrainState:
    """Return the run's state as it was when `loaded` was saved. Collective.

    Raises:
        CheckpointError: the checkpoint says what none of ours does.
        ConfigError: the rows would come in another order.
        DataError: the rows are not those that the run was trained on.
    """
    trainer = loaded.trainer
    with run.strategy.together("comparing the data"):
        check_trainer(trainer, loaded.directory, step=loaded.step)
        if trainer["order"] != _order(run):
            raise ConfigError(
                f"{loaded.directory} stands in the order of rows of {trainer['order']}, this run has {_order(run)}: "
                "some rows would be seen twice and some never. Set run.seed and data.global_batch as they were, or "
                "start afresh under another run.name"
            )
        if trainer["data_digest"] != run.data_digest:
            if run.read_otherwise and trainer.get("reading") != run.facts["reading"]:
                raise DataError(
                    f"{loaded.directory} was trained on rows that were read otherwise: this version "
                    f"{'; it '.join(run.read_otherwise)}. Go on with the harness that has written it "
                    f"({trainer['harness']}, before columns were read so), or start afresh under another run.name"
                )
            raise DataError(
                f"the data are not those that {loaded.directory} was trained on (digest {trainer['data_digest']}, now "
                f"{run.data_digest}), so what is left of the epoch and of the validation split would be other rows. "
                "Put the old files back, or train on the new ones under another run.name"
            )
        if trainer["samples_seen"] != (seen := run.plan.samples_before(trainer["position"])):
            raise CheckpointError(
                f"{loaded.directory / TRAINER} has samples_seen {trainer['samples_seen']:,}, but {seen:,} come before "
                f"its position {trainer['position']:,}: this harness has not written it. Take another checkpoint"
            )
    run.checkpoints.restore(loaded)
    run.judge.load_state_dict(trainer["judge"])
    if run.strategy.loss_scale and trainer["loss_scale"]:  # another precision starts with its own
        run.strategy.loss_scale.load_state_dict(trainer["loss_scale"])
    return TrainState(
        position=trainer["position"],
        step=trainer["step"],
        nonfinite_in_a_row=trainer["nonfinite_in_a_row"],
        evaluated_step=trainer["evaluated_step"],
        saved_step=trainer["step"],
        metrics=trainer["metrics"],
    )

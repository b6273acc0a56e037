"""Saving a run where it stands, and picking it up from there."""

import math
from collections.abc import Mapping
from typing import Any

from harness import __version__
from harness.checkpoint.store import Loaded, SaveResult
from harness.config.training import DecaySchedule
from harness.errors import CheckpointError, ConfigError, DataError, StorageError
from harness.observers.ledger import NAME, kept_bytes, read_back
from harness.record.checkpoints import step_of
from harness.record.files import ADVICE, storage_errors
from harness.record.manifest import TRAINER
from harness.record.progress import check_trainer
from harness.rows.dataset import own_rows
from harness.rows.order import RowsByLength
from harness.run import Run
from harness.state import TrainState
from harness.stopping import Standings, standings


def save(run: Run, state: TrainState) -> None:
    """Begin to save the run at an interval's end, unless this step is saved already. Collective.

    Raises:
        StorageError: too many saves in a row failed.
    """
    if state.step == state.saved_step and not state.is_best:
        return
    record_save_result(run, state, run.checkpoints.finish())
    if state.evaluated_step == state.step:  # again: what it was compared with may have found no room just now
        state.is_best |= run.judge.standings.observe(state.metrics, step=state.step)
    trainer = {
        "harness": __version__,
        "position": state.position,
        "step": state.step,
        "samples_seen": run.plan.samples_before(state.position),
        "evaluated_step": state.evaluated_step,
        "nonfinite_in_a_row": state.nonfinite_in_a_row,
        "metrics": state.metrics,
        "judge": run.judge.state_dict(),
        "schedule_updates": run.schedule_updates,
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
        record_save_result(run, state, run.checkpoints.finish())


def finish_saving(run: Run, state: TrainState) -> None:
    """Wait for the last save of a run. Collective.

    Raises:
        StorageError: it failed.
    """
    record_save_result(run, state, run.checkpoints.finish())
    if state.failed_saves:
        raise StorageError(f"{state.failed_saves[-1].args[0]}{ADVICE}")


def record_save_result(run: Run, state: TrainState, result: SaveResult | None) -> None:
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
    run.judge.standings.forget(step)
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


def take_stock(run: Run, state: TrainState, loaded: Loaded) -> list[str]:
    """Judge again all that the ledger tells, by the rule of now; return what differs from before. Collective.

    Raises:
        StorageError: the ledger cannot be read, or BEST not be written.
    """
    trainer, ledger = loaded.trainer, run.checkpoints.directory.path.with_name(NAME)
    found: tuple[Standings, float | None, list[str]] | None = None
    with run.strategy.raise_on_all_ranks("reading the ledger"), storage_errors("read", ledger):
        if run.strategy.rank == 0:
            num_bytes = kept_bytes(trainer, run_id=run.facts["run_id"])
            evaluations, rate = read_back(ledger, num_bytes=num_bytes) if num_bytes else ([], None)
            if not evaluations:  # of another run, whose ledger is elsewhere
                evaluations = [(trainer["evaluated_step"], trainer["metrics"])]
            judged = standings(evaluations, run.config.best_rule, run.checkpoints.kept_steps())
            found = judged, rate, _name_best(run, judged, trainer)
    judged, rate, notices = run.strategy.broadcast(found)
    run.judge.standings = judged
    return [*notices, *filter(None, [judged.missed]), *_other_rate(run, state, trainer, rate)]


def _name_best(run: Run, judged: Standings, trainer: Mapping[str, Any]) -> list[str]:
    """Have BEST name what is the best by the rule of now, and say so where it named another. On rank zero."""
    best, old, checkpoints = judged.best, trainer["judge"]["score"], run.checkpoints
    named = checkpoints.directory.best()
    before = step_of(named) if named else None
    if best.best_step is not None and best.best_step != before:
        checkpoints.name_best(best.best_step)
    is_other_rule = (old["metric"], old["mode"]) != (best.metric, best.mode)
    if not is_other_rule and before == best.best_step:
        return []
    rule = f"{best.metric} ({best.mode})"
    text = f"BEST is judged by {rule} now, by {old['metric']} ({old['mode']}) before" if is_other_rule else "BEST moves"
    if best.best_step is None:
        return [f"{text}: no evaluation with a checkpoint has that score yet"]
    text += f": it is step {best.best_step:,} with {best.metric} {best.best:.4f}"
    if before is None or before == best.best_step:
        return [text]
    return [
        f"{text}, it was step {before:,}, which later saves delete unless checkpoint.keep_last or "
        "checkpoint.keep_every_steps keep it"
    ]


def _other_rate(run: Run, state: TrainState, trainer: Mapping[str, Any], before: float | None) -> list[str]:
    """Return what there is to say where the rate does not go on from where it was, or nothing is left of it."""
    schedule = run.config.schedule
    if isinstance(schedule, DecaySchedule) and schedule.total_steps and run.learning_rate(state.step + 1) == 0:
        return [
            f"the learning rate is 0 from here on, since schedule.total_steps={schedule.total_steps} is over: nothing "
            "more is learned; raise it"
        ]
    if before is None or math.isclose(before, run.learning_rate(state.step), rel_tol=1e-5):
        return []
    text = f"the learning rate goes on at {run.learning_rate(state.step + 1):.3g}, the last update had {before:.3g}"
    updates, updates_before = run.schedule_updates, trainer.get("schedule_updates")
    if isinstance(schedule, DecaySchedule):
        was = f", over {updates_before:,} before" if updates_before not in (None, updates) else ""
        text += f": {schedule.kind} falls over {updates:,} updates now{was}; schedule.total_steps fixes over how many"
    return [text]


def _order(run: Run) -> dict[str, Any]:
    """Return what decides, with the rows, which of them a position stands for."""
    order = run.plan.order
    by_length = order.facts if isinstance(order, RowsByLength) else {}
    return {"seed": run.plan.seed, "global_batch": run.plan.global_batch, **by_length}


def _check_rows(run: Run, loaded: Loaded) -> None:
    """Refuse to go on with other rows than `loaded` was trained on, or with them in another order.

    Raises:
        ConfigError: the rows would come in another order.
        DataError: they are others, or say other lengths.
    """
    trainer = loaded.trainer
    before, now = trainer["order"], _order(run)
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    if changed - {"lengths"}:
        raise ConfigError(
            f"{loaded.directory} stands in the order of rows of {before}, this run has {now}: "
            "some rows would be seen twice and some never. Set run.seed, data.global_batch and data.sampling as "
            "they were, or start afresh under another run.name"
        )
    for name, rows in own_rows(run.batches.rows, run.validation.rows).items():
        saved = trainer.get("rows", {}).get(name)
        if saved and (different := rows.difference(saved, there="then", here="now")):
            raise DataError(
                f"the {name} rows are not those that {loaded.directory} was trained on: {different}. Put the old "
                "ones back, or train on the new ones under another run.name"
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
    if changed:
        raise DataError(
            f"the lengths of the training rows are not those that {loaded.directory} was trained with (digest "
            f"{before.get('lengths')}, now {now.get('lengths')}), and data.sampling: by_length puts rows in order "
            "by them: some would be seen twice and some never. Have the data say the old lengths, or start afresh "
            "under another run.name"
        )


def resume(run: Run, loaded: Loaded) -> TrainState:
    """Return the run's state as it was when `loaded` was saved. Collective.

    Raises:
        CheckpointError: the checkpoint says what none of ours does.
        ConfigError: the rows would come in another order.
        DataError: the rows are not those that the run was trained on.
    """
    trainer = loaded.trainer
    with run.strategy.raise_on_all_ranks("comparing the data"):
        check_trainer(trainer, loaded.directory, step=loaded.step)
        _check_rows(run, loaded)
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

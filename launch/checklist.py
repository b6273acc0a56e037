"""The design checklist of `harness check`: what an introductory chapter asks of a configuration, and its answers."""

from collections.abc import Iterator

from harness.config.run_config import RunConfig
from harness.config.slots import KnownRows
from harness.config.training import PlateauSchedule


def checklist(config: RunConfig, *, ranks: int | None, rows: KnownRows | None = None) -> list[str]:
    """Return a line for each question, `WARNING: ` before those whose answer does not fit.

    Args:
        ranks: how many there will be, if that is known.
        rows: what is known of the data.
    """
    lines = [*config.model.advice(config, ranks=ranks, rows=rows)]
    lines += [*_patience(config, rows), *_plateau(config, rows), *_average(config, rows)]
    for section in (config.data, config.task):
        lines += section.advice(config, ranks=ranks, rows=rows)
    return lines


def _num_updates(config: RunConfig, rows: KnownRows | None) -> int | None:
    """Return the most updates that the run can have, or None if nothing limits them that is known."""
    run = config.run
    by_epochs = run.max_epochs * rows.updates_per_epoch if run.max_epochs and rows else None
    return min((limit for limit in (run.max_steps, by_epochs) if limit is not None), default=None)


def _num_evaluations(config: RunConfig, rows: KnownRows | None) -> int | None:
    """Return the most evaluations that the run can have, that of its end included; None as of `_num_updates`."""
    run, evaluation = config.run, config.evaluation
    epochs_in_updates = evaluation.every_epochs * rows.updates_per_epoch if evaluation.every_epochs and rows else None
    pairs = [
        (run.max_epochs, evaluation.every_epochs),
        (_num_updates(config, rows), evaluation.every_steps or epochs_in_updates),
    ]
    return min((-(-whole // part) for whole, part in pairs if whole and part), default=None)


def _patience(config: RunConfig, rows: KnownRows | None) -> Iterator[str]:
    stopping = config.early_stopping
    if stopping is None:
        yield "patience: none; the run uses up its budget, and BEST is the lowest val/loss"
        return
    patience, evaluations = stopping.patience_evaluations, _num_evaluations(config, rows)
    # The first evaluation is the best so far, and a run that stops at its last one does not stop early.
    if evaluations is not None and 1 + patience >= evaluations:
        yield (
            f"WARNING: early_stopping.patience_evaluations: {patience} are not used up before the end of a run of "
            f"{evaluations} evaluations, so it never stops early"
        )
    else:
        yield f"patience: {patience} evaluations without a better {stopping.metric}"


def _plateau(config: RunConfig, rows: KnownRows | None) -> Iterator[str]:
    schedule = config.schedule
    if not isinstance(schedule, PlateauSchedule):
        return
    patience, evaluations = schedule.patience_evaluations, _num_evaluations(config, rows)
    if evaluations is not None and 2 + patience >= evaluations:
        yield (
            f"WARNING: schedule.patience_evaluations: {patience} are not exceeded before the end of a run of "
            f"{evaluations} evaluations, so the rate never falls"
        )
    else:
        yield f"plateau: the rate falls after more than {patience} evaluations without a better {schedule.metric}"
    stopping = config.early_stopping
    if stopping and stopping.metric == schedule.metric and stopping.patience_evaluations <= 1 + patience:
        yield (
            "WARNING: schedule.patience_evaluations: the run stops early before the rate falls; use less than "
            f"early_stopping.patience_evaluations, {stopping.patience_evaluations}, by two or more"
        )


def _average(config: RunConfig, rows: KnownRows | None) -> Iterator[str]:
    if config.ema is None:
        return
    looked_back_on, updates = round(1 / (1 - config.ema.decay)), _num_updates(config, rows)
    if updates is not None and looked_back_on > updates / 2:
        yield (
            f"WARNING: ema.decay: {config.ema.decay:g} looks back on {looked_back_on:,} updates, most of the run's "
            f"{updates:,}, so its beginning counts too; use {1 - 10 / max(updates, 20):.2g} or so"
        )
    else:
        yield f"average: the weights of the last {looked_back_on:,} updates or so are what is evaluated and exported"

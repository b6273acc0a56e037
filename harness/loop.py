"""The training loop: the screen to read first. Every rank runs every line."""

from typing import Any

import torch
from torch import Tensor

from harness.interval import Interval
from harness.rows.batches import Batch
from harness.rows.rows import evenly_spread
from harness.run import Run
from harness.saving import finish_saving, save
from harness.scores import Scores
from harness.state import FitResult, TrainState, UpdateReport
from harness.strategy.graph import zero_of
from harness.tasks.base import LOSS


def fit(run: Run, state: TrainState) -> FitResult:
    """Train from `state` until there is a reason to stop. Collective: every rank must call this."""
    reason = run.reason_to_stop(state)
    while reason is None:
        interval = Interval(run, state)
        for position in interval.positions:
            interval.count(train_step(run, position, interval.learning_rate()))
        interval.close()  # the only collective and host read besides those of the updates themselves
        if run.agenda.evaluation_is_due(state):
            state.metrics = evaluate(run, step=state.step)
            state.is_best = run.judge.observe(state.metrics, step=state.step)
            state.evaluated_step = state.step
            run.observers.evaluated(state, run.judge.standings)
        reason = run.reason_to_stop(state)
        if reason or run.agenda.save_is_due(state):
            save(run, state)  # waits for a copy of the state; close() hears when it is written
    finish_saving(run, state)
    return FitResult(reason, state.step, state.metrics)


def train_step(run: Run, position: int, learning_rate: Tensor) -> UpdateReport:
    """Make the update at `position` with the mean loss over every target on every rank. Collective; reads nothing.

    Args:
        position: attempted updates before this one; it decides which rows are seen.
        learning_rate: () on the device.
    """
    strategy = run.strategy
    micro_batches = run.batches.at(position)
    weight = weight_of_global_batch(run, position, micro_batches)
    run.stopwatch.start(position)  # in one update an interval; it reads nothing either
    parts = []
    for index, batch in enumerate(micro_batches, start=1):
        is_last = index == len(micro_batches)
        with strategy.accumulate(is_last=is_last):
            terms = {name: total / weight for name, total in loss_sums(run, batch).items()}
            if is_last:
                run.stopwatch.note_gradients_of(terms[LOSS])
            strategy.backward(terms[LOSS])
        parts.append({name: term.detach() for name, term in terms.items()})
    # Gradients are now the sum over micro-batches and ranks, whole and unclipped; update() measures, clips and applies.
    run.stopwatch.note()
    gradient = strategy.update(learning_rate, position=position)
    run.stopwatch.note()
    terms = {name: sum((part[name] for part in parts[1:]), start=term) for name, term in parts[0].items()}
    return UpdateReport(terms, gradient)


def weight_of_global_batch(run: Run, position: int, micro_batches: list[Batch]) -> Tensor | int:
    """Return what the sum of the loss over every target on every rank is divided by. Collective with class weights."""
    if not run.task.is_weighted:
        return run.plan.rows_at(position) * run.task.targets_per_row
    mine = [torch.as_tensor(run.task.weight_sum(batch)) * (not batch.is_padding) for batch in micro_batches]
    return run.strategy.sum(torch.stack(mine)).sum()


def loss_sums(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Return the () sum of the loss, and of what else is told, over the targets of a batch; 0 for a row that only keeps
    the other ranks company."""
    task, model = run.task, run.strategy.model
    if model.training == batch.is_padding:  # such a row leaves no trace in BatchNorm, and is not changed at random,
        model.train(not batch.is_padding)  # also where its forward pass is made again within the backward pass
    outputs = task.forward(run.strategy.forward, batch.data)
    if batch.is_padding:
        return dict.fromkeys(task.terms, zero_of(outputs))
    sums = task.loss_sums(outputs, batch)
    penalty = run.strategy.penalty()  # of experts that are unevenly loaded
    return sums if penalty is None else {**sums, LOSS: sums[LOSS] + penalty * task.weight_sum(batch)}


@torch.no_grad()
def evaluate(run: Run, *, step: int) -> dict[str, Any]:
    """Return the validation scores over the rows of all ranks, each seen once. Collective."""
    strategy = run.strategy
    strategy.share_buffers()
    strategy.model.eval()
    shown_rows = evenly_spread(run.config.tracking.sample_table_rows, run.validation.num_rows)
    scores = Scores(run.task, device=strategy.device, shown_rows=shown_rows, first_row=run.validation.first_row)
    with strategy.averaged():
        for batch in run.validation:
            outputs = run.task.forward(strategy.predict, batch.data)
            if not batch.is_padding:
                scores.update(outputs, batch)
    if examples := scores.examples(strategy.gather_objects):
        run.observers.happened("samples", step=step, **examples)
    strategy.release()
    strategy.model.train()
    result: dict[str, Any] = strategy.broadcast(scores.compute(strategy.gather))
    if (answer := scores.only_answer()) is not None:
        run.observers.happened("one answer", step=step, answer=answer)
    return result

"""An interval: the updates between two times that reports are reduced over ranks, read to the host and written.

Inside it nothing is read from the device. Updates that were skipped for a non-finite gradient are learned of at its
end; until then the rate follows the applied updates by a count on the device.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from harness.ballot import Ballot, shares
from harness.doctor.incidents import ranks_with_nonfinite_gradient, rows_with_nonfinite_loss, weighs_nothing
from harness.errors import NonFiniteError
from harness.run import Run
from harness.saving import record_save_result
from harness.state import TrainState, UpdateReport
from harness.stopping import StopSignals
from harness.strategy.loss_scale import LEAST
from harness.tasks.base import LOSS


class Interval:
    """The next few updates of a run, and what they reported."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._run, self._state = run, state
        length = run.agenda.updates_in_interval(state)
        self.positions = range(state.position, state.position + length)
        device = run.strategy.device
        # The fused optimizers take a float32 rate on CUDA; on the CPU float64 is exact.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._rates = [run.learning_rate(state.step + update) for update in range(1, length + 1)]
        self._rates_on_device = run.strategy.tensor(self._rates, dtype=dtype)  # (length,)
        self._applied = run.strategy.tensor(0)  # () updates applied since the interval began
        self._reports: list[UpdateReport] = []
        self._started = time.perf_counter()
        self._seconds_waited = run.batches.seconds_waited
        run.stopwatch.position = self.positions[length // 2]

    def learning_rate(self) -> Tensor:
        """Return the () rate of the next update on the device: it moves on only with applied updates."""
        return self._rates_on_device.take(self._applied)

    def count(self, report: UpdateReport) -> None:
        """Take note of an attempted update."""
        self._reports.append(report)
        self._applied += report.gradient.applied

    def close(self) -> None:
        """Reduce the reports over ranks, read them once, write them, and vote on stopping. Collective.

        Raises:
            NonFiniteError: too many updates in a row were not applied.
        """
        run, state = self._run, self._state
        ballots, terms, gradients = self._read()
        stop_vote = max(int(ballot.stop_vote) for ballot in ballots)
        if stop_vote and not state.stop_signal:
            state.stop_signal = StopSignals.REASONS[stop_vote - 1]
        run.agenda.updates_until_vote = int(ballots[0].updates_in_a_second)
        seconds = (time.perf_counter() - self._started) / len(self._reports)
        run.agenda.seconds_per_update = seconds
        of_interval = self._of_interval(ballots, seconds=seconds)
        width = len(gradients) // len(self._reports)
        rates = iter(self._rates)
        rate = next(rates)
        try:
            for index, report in enumerate(self._reports):
                norm, coefficient, *scale = gradients[index * width : (index + 1) * width]
                figures = {"grad_norm": norm, "clip_coefficient": coefficient, "learning_rate": rate}
                figures |= {"loss_scale": scale[0]} if scale else {}
                figures |= of_interval if report is self._reports[-1] else {}
                first = index * len(report.terms)
                parts = {name: [row[first + place] for row in terms] for place, name in enumerate(report.terms)}
                if self._write_line(report, parts, figures, seconds=seconds):
                    rate = next(rates, math.nan)
        finally:
            run.observers.settled()  # also of the updates that led to giving up
        if all(ballot.is_written for ballot in ballots):
            record_save_result(run, state, run.checkpoints.advance())

    def _of_interval(self, ballots: list[Ballot], *, seconds: float) -> dict[str, float]:
        """Return what is known of the interval as a whole, by the ballots; its last line tells it."""
        run, plan = self._run, self._run.plan
        num_samples = plan.samples_before(self.positions.stop) - plan.samples_before(self.positions.start)
        samples_per_second = num_samples / (seconds * len(self._reports))
        memory_bytes = int(max(ballot.memory_bytes for ballot in ballots))
        figures = {"samples_per_second": samples_per_second, "memory_bytes": memory_bytes}
        if run.task.counts_tokens:
            figures["tokens_per_second"] = samples_per_second * run.task.targets_per_row
        if run.share_of_peak_per_row is not None:
            figures["mfu"] = samples_per_second * run.share_of_peak_per_row
        return {**figures, **shares(ballots)}

    def _read(self) -> tuple[list[Ballot], list[list[float]], list[float]]:
        """Return ballot and terms of the loss of every rank, and norm, coefficient and scale of every update."""
        strategy = self._run.strategy
        seconds = time.perf_counter() - self._started  # as the next interval will take, more or less
        vote = self._run.signals.vote(seconds_needed=seconds + self._state.save_seconds)
        is_written = self._run.checkpoints.vote()
        waited = (self._run.batches.seconds_waited - self._seconds_waited) / (time.perf_counter() - self._started)
        compute, reduction = self._run.stopwatch.parts()
        ballot = Ballot(
            stop_vote=vote,
            updates_in_a_second=self._run.agenda.updates_in_a_second(),
            is_written=is_written,
            memory_bytes=strategy.peak_memory_bytes(),
            data_wait=waited,
            compute=compute,
            reduction=reduction,
        )
        terms = torch.stack([term for report in self._reports for term in report.terms.values()])
        votes = strategy.tensor(ballot, dtype=torch.float64)
        mine = torch.cat([votes, terms])  # (ballot + updates x terms,) in float64, which holds every float32
        gradients = [report.gradient for report in self._reports]
        figures = [x for norm in gradients for x in (norm.total, norm.coefficient, norm.loss_scale) if x is not None]
        replicated = torch.stack(figures)
        numbers = torch.cat([strategy.gather(mine).flatten(), replicated]).tolist()
        width = len(mine)
        rows = [numbers[rank * width : (rank + 1) * width] for rank in range(strategy.world_size)]
        ballots = [Ballot(*row[: len(ballot)]) for row in rows]
        return ballots, [row[len(ballot) :] for row in rows], numbers[strategy.world_size * width :]

    def _write_line(
        self, report: UpdateReport, terms: dict[str, list[float]], figures: dict[str, float], *, seconds: float
    ) -> bool:
        """Count one update and tell of it; return whether it was applied.

        Args:
            terms: the parts of each, one a rank.
        """
        run, state, parts = self._run, self._state, terms[LOSS]
        step, position = state.step + 1, state.position
        applied = math.isfinite(figures["grad_norm"])  # what was not finite, the optimizer has skipped
        line: dict[str, Any] = {
            "event": "update",
            "step": step,
            **{name: math.fsum(of_ranks) for name, of_ranks in terms.items()},
            **figures,
            **({"num_targets": run.plan.rows_at(position) * per_row} if (per_row := run.task.targets_per_row) else {}),
            "samples_seen": run.plan.samples_before(position + 1),
            "applied": applied,
            "seconds": seconds,
        }
        run.observers.updated(line)
        state.position += 1
        if not applied:
            scale = figures.get("loss_scale", LEAST)
            if scale > LEAST and all(map(math.isfinite, parts)):  # too large for fp16, and halved now
                run.observers.happened("overflow", step=step, position=position, loss_scale=scale)
                return False
            state.nonfinite_in_a_row += 1
            self._note_nonfinite(report, parts, step=step, position=position)
            return False
        state.step, state.nonfinite_in_a_row = step, 0
        every = run.config.diagnostics.every_steps
        if every and step % every == 0:
            norms = dict(zip(run.strategy.parameter_names, report.gradient.per_parameter.tolist(), strict=True))
            run.observers.happened("gradients", step=step, norms=norms)
        return True

    def _note_nonfinite(self, report: UpdateReport, parts: list[float], *, step: int, position: int) -> None:
        run, limit = self._run, self._run.config.run.max_nonfinite_updates
        norms = report.gradient.per_parameter
        overflowed = bool(norms.isfinite().all())  # every parameter's norm is finite, that of all together is not
        worst = norms.argmax() if overflowed else norms.isfinite().to(torch.uint8).argmin()
        parameter = run.strategy.parameter_names[int(worst)]
        ranks = [rank for rank, loss in enumerate(parts) if not math.isfinite(loss)]
        run.observers.happened("nonfinite", step=step, position=position, ranks=ranks, parameter=parameter)
        if self._state.nonfinite_in_a_row < limit:
            return
        what, config = f"loss is {math.fsum(parts)}", run.config
        advice = (
            f"Lower optim.peak_lr (now {config.optim.peak_lr:g}), lengthen schedule.warmup_steps (now "
            f"{config.schedule.warmup_steps}), or clip (clip.kind is {config.clip.kind}); or look at the rows of that "
            "update"
        )
        culprit = f"the norm of the gradient overflowed, largest in {parameter}"
        if not overflowed:
            culprit = f"first non-finite gradient in {parameter}"
        if not ranks:
            what = "every rank's loss is finite, the gradient is not"
            ranks = ranks_with_nonfinite_gradient(run.strategy, run.task, run.batches.at(position))
        elif weighs_nothing(run.strategy, run.task, run.batches.at(position)):
            culprit = "the weights of all its targets are 0, so there is nothing to take the mean of"
            advice = "Look at what `weights` returns for the rows of that update"
        elif rows := rows_with_nonfinite_loss(run.strategy, run.task, run.batches.at(position)):
            shown = ", ".join(f"{row:,}" for row in run.batches.numbers(rows[:4]))
            culprit += f", and the loss of training row{'s' * (len(rows) > 1)} {shown}{', ...' * (len(rows) > 4)}"
        where = f"on rank {', '.join(map(str, ranks))} of {run.strategy.world_size}" if ranks else "on no single rank"
        raise NonFiniteError(
            f"{what} {where} at update {step:,} (attempt {position + 1:,}), the last of {limit} in a row; "
            f"{culprit}. None of the {limit} was applied. {advice}"
        )

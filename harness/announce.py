"""What a run says when it starts: notices, what it promises, and what it is made of."""

from __future__ import annotations

import platform
import socket
from collections.abc import Sequence

from harness.ranks.group import Ranks
from harness.record.provenance import git_state, slurm_job, versions
from harness.run import Run


def announce_start(run: Run, ranks: Ranks, *, notices: Sequence[str], command: str, step: int) -> None:
    """Tell the observers that a run starts. Collective.

    Args:
        notices: what is worth a word before it.
        command: that starts it again.
        step: applied updates that it goes on from.
    """
    config, plan, strategy = run.config, run.plan, run.strategy
    hosts = ranks.gather_objects(socket.gethostname())
    for text in (*notices, *_of_the_batch(run), *ranks.notices, *strategy.notices):
        run.observers.happened("notice", text=text)
    promises = [promise.as_data() for promise in run.promises]
    run.observers.happened("promises", promises=promises, seconds=run.seconds_looked)
    run.observers.happened(
        "started",
        step=step,
        command=command,
        world_size=ranks.world_size,
        strategy=config.strategy.kind,
        device=str(ranks.device),
        precision=config.strategy.precision,
        num_parameters=strategy.num_parameters,
        num_trained_parameters=strategy.num_trained,
        host=hosts[0],
        hosts=sorted(set(hosts)),
        python=platform.python_version(),
        versions=versions() if ranks.rank == 0 else {},
        git=git_state() if ranks.rank == 0 else None,
        slurm=slurm_job(),
    )
    run.observers.happened(
        "notice",
        text=f"{f'resuming after update {step:,}' if step else 'starting'}: {config.run.name}, {config.model.kind} "
        f"with {_parameters(run)}, {config.strategy.kind} on {ranks.world_size} rank{'s' * (ranks.world_size > 1)} "
        f"({ranks.device.type}); {plan.num_rows:,} training rows, {plan.steps_per_epoch:,} updates an epoch, "
        f"{run.agenda.total_updates:,} in all",
    )


def _of_the_batch(run: Run) -> list[str]:
    plan = run.plan
    if plan.global_batch <= plan.num_rows:
        return []
    text = f"data.global_batch: {plan.global_batch:,} are more than the {plan.num_rows:,} training rows"
    return [f"{text}; every update takes them all"]


def _parameters(run: Run) -> str:
    num_parameters, num_trained = run.strategy.num_parameters, run.strategy.num_trained
    trained = f" ({num_trained:,} of them trained)" if num_trained < num_parameters else ""
    return f"{num_parameters:,} parameters{trained}"

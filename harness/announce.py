"""What a run says when it starts: notices, what it promises, and what it is made of."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Sequence

from harness.ranks.group import Ranks
from harness.record.provenance import git_state, slurm_job, versions
from harness.rows.dataset import own_rows
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
    of_workers = _of_workers(run, ranks_here=hosts.count(hosts[0]))
    for text in (*notices, *_of_the_batch(run), *of_workers, *ranks.notices, *strategy.notices):
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


def _of_workers(run: Run, *, ranks_here: int) -> list[str]:
    """Return what there is to say of the processes that read rows.

    Args:
        ranks_here: ranks on the machine of rank zero.
    """
    own = own_rows(run.batches.rows, run.validation.rows)
    workers = max((rows.workers for rows in own.values()), default=0)
    if workers == 0:
        return []
    found, processes, cores = [], workers * ranks_here, len(os.sched_getaffinity(0))
    if processes + ranks_here > cores:
        found.append(
            f"data.workers: {workers} for each of {ranks_here} rank{'s' * (ranks_here > 1)} here {_are(processes)} "
            f"that read{'s' * (processes == 1)} rows (and as many for evaluations) beside {ranks_here} that "
            f"compute{'s' * (ranks_here == 1)}, on {cores} core{'s' * (cores > 1)}"
        )
    if held := sorted({path for rows in own.values() for path in rows.opened.names()}):
        names = " and ".join(sorted({rows.name for rows in own.values()}))
        found.append(
            f"data: {names} holds {held[0]}{f' and {len(held) - 1} more' * (len(held) > 1)}, which a fork does not "
            "copy, so each worker makes its own"
        )
    return found


def _are(processes: int) -> str:
    return "is 1 process" if processes == 1 else f"are {processes} processes"


def _parameters(run: Run) -> str:
    num_parameters, num_trained = run.strategy.num_parameters, run.strategy.num_trained
    trained = f" ({num_trained:,} of them trained)" if num_trained < num_parameters else ""
    return f"{num_parameters:,} parameters{trained}"

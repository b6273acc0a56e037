"""Mixtures of experts over ranks: nobody waits for an expert without tokens, and the penalty is a mean."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from harness.rows.order import BatchPlan
from tests.distributed.ranks import run_standing_ranks
from tests.distributed.scenarios import Spec, Trace, harness_trace
from tests.distributed.test_reference import assert_ranks_agree, assert_same

STRATEGIES = ["ddp", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero1", "zero2", "zero3"))]
# 100 experts for 24 tokens a micro-batch: most get none, on every rank others.
SPEC = Spec(network="gpt_many_experts", optimizer="sgd", rows=64, micro_batch=4, updates=2, max_norm=None)


@cache
def by_hand(spec: Spec) -> Trace:
    """Train in one process: the mean over all tokens, and over micro-batches of the penalty of each."""
    assert spec.micro_batch is not None
    model, columns = spec.model(), spec.columns()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if (p.dim() >= 2) is decays], "weight_decay": 0.1 * decays}
            for decays in (True, False)
        ],
        lr=1e-3,
        momentum=0.9,
    )
    plan = BatchPlan(num_rows=spec.rows, global_batch=spec.global_batch, world_size=1, micro_batch=None, seed=3)
    trace = Trace([], [], [], [], {})
    for position in range(spec.updates):
        batches = torch.from_numpy(plan.sample_ids(position, 0)).split(spec.micro_batch)
        loss = torch.zeros(())
        for ids in batches:
            logits = model(columns.inputs[ids].long())
            cross_entropy = nn.functional.cross_entropy(logits.flatten(0, 1), columns.targets[ids].long().flatten())
            loss = loss + (cross_entropy + model.penalty()) / len(batches)
        optimizer.zero_grad()
        loss.backward()
        trace.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        trace.norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        trace.coefficients.append(1.0)
        trace.losses.append(loss.item())
        optimizer.step()
    trace.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return trace


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_number_of_ranks_changes_nothing_if_the_micro_batch_stays(strategy: str, world_size: int) -> None:
    traces = run_standing_ranks(world_size, harness_trace, replace(SPEC, strategy=strategy), deadline_seconds=120)
    assert_ranks_agree(traces)
    assert_same(traces[0], by_hand(SPEC), gradient=1e-6, norm=1e-5, parameter=1e-5)
    up = traces[0].gradients[0]["blocks.0.feed_forward.up"]
    assert 0 < sum(bool(gradient.any()) for gradient in up) < len(up), "some experts got tokens, some got none"


def test_without_the_penalty_the_micro_batch_changes_nothing_either() -> None:
    spec = replace(SPEC, network="gpt_experts")
    whole, cut = (run_standing_ranks(2, harness_trace, replace(spec, micro_batch=size))[0] for size in (None, 2))
    assert_same(cut, whole, gradient=1e-6, norm=1e-5, parameter=1e-5)


def test_a_rank_without_rows_keeps_the_others_company() -> None:
    spec = replace(SPEC, rows=17, micro_batch=None, updates=3)  # the second batch has one row for two ranks
    traces = run_standing_ranks(2, harness_trace, spec)
    assert_ranks_agree(traces)

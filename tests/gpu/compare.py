"""Checks that an update is that of plain PyTorch, in every precision and under every strategy."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from harness.catalogue.gpt.network import Attention
from harness.run import Run
from harness.state import TrainState
from tests.gpu.large import Gpt, running
from tests.gpu.ranks import run_ranks
from tests.gpu.small import Job, Trace, by_hand, by_harness, device, make_updates

Figures = dict[str, Any]
EXACT, ROUNDED, AUTOCAST_ROUNDED = 1e-11, 2e-4, 2e-3
"""How far a weight may be off: in fp64; in fp32, where sums over ranks come in another order; in bf16 and fp16. The
weights themselves are about 0.1, and 7 updates move one by up to 0.05; Adam enlarges the rounding of tiny gradients."""


def compare(found: Trace, wanted: Trace, *, tolerance: float) -> float:
    """Return the largest difference between the weights of two runs; refuse more than the tolerance."""
    difference = found.largest_difference(wanted)
    assert difference <= tolerance, f"a weight is off by {difference:.3g}, at most {tolerance:g} is rounding"
    assert len(found.losses) == len(wanted.losses), f"{len(found.losses)} updates, {len(wanted.losses)} by hand"
    for index, (mine, other) in enumerate(zip(found.losses, wanted.losses, strict=True)):
        assert abs(mine - other) <= max(tolerance, 1e-9), f"loss {index + 1} is {mine}, by hand {other}"
    return difference


def must_learn(trace: Trace, job: Job) -> None:
    """Refuse a run that has not moved its weights: it would agree with any other that has not."""
    first = {name: tensor for name, tensor in job.model().state_dict().items() if name in trace.weights}
    moved = Trace([], [], [], first).largest_difference(trace)
    assert moved > 1e-3, f"no weight has moved by more than {moved:.3g}"


def one_rank() -> Figures:
    """Compare one rank with plain PyTorch on the same device."""
    figures: Figures = {"device": str(device())}
    for network in ("mlp", "gpt"):
        for precision, tolerance in (("fp64", EXACT), ("fp32", ROUNDED)):
            job = Job(network=network, precision=precision, micro_batch=5 if network == "mlp" else None)
            wanted = by_hand(job)
            must_learn(wanted, job)
            figures[f"{network}_{precision}"] = compare(by_harness(job), wanted, tolerance=tolerance)
    return figures


def rank_of(values: dict[str, Any], folder: str) -> dict[str, Any]:
    """Be one rank of a job; return what it did, and what it says of the process group."""
    told: dict[str, Any] = {}

    def look(run: Run) -> None:
        told["device"] = str(run.strategy.device)
        told["optimizer_on"] = sorted({str(t.device) for t in _moments(run)})

    trace = by_harness(Job(**values), look, folder=folder)
    backend = torch.distributed.get_backend_config() if torch.distributed.is_initialized() else "none"
    return {**vars(trace), **told, "backend": str(backend)}


def _moments(run: Run) -> list[Tensor]:
    states = run.strategy.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim()]


def two_ranks(job: Job, *, tolerance: float) -> Figures:
    """Compare two ranks, on one device where there is no more than one, with plain PyTorch on the whole batch."""
    wanted = by_hand(job)
    must_learn(wanted, job)
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(2, "tests.gpu.compare:rank_of", vars(job), folder)
    traces = [Trace(*(rank[name] for name in ("losses", "norms", "scales", "weights"))) for rank in ranks]
    assert traces[0].largest_difference(traces[1]) == 0.0, "the ranks have other weights"
    difference = compare(traces[0], wanted, tolerance=tolerance)
    places = sorted({rank["device"] for rank in ranks})
    moments = sorted({place for rank in ranks for place in rank["optimizer_on"]})
    return {"difference": difference, "devices": places, "moments_on": moments, "backend": ranks[0]["backend"]}


def two_ranks_ddp() -> Figures:
    """Compare ddp on two ranks, with accumulation and a ragged last batch."""
    figures = two_ranks(Job(precision="fp64", micro_batch=3), tolerance=EXACT)
    if torch.cuda.device_count() == 1:
        assert "nccl" not in figures["backend"], "two ranks share the GPU, which NCCL refuses"
    return figures


def zero1() -> Figures:
    """Compare ZeRO-1 on two ranks."""
    return two_ranks(Job(strategy="zero1"), tolerance=ROUNDED)


def zero2() -> Figures:
    """Compare ZeRO-2 on two ranks, with accumulation."""
    return two_ranks(Job(strategy="zero2", micro_batch=4), tolerance=ROUNDED)


def zero3() -> Figures:
    """Compare ZeRO-3 on two ranks."""
    return two_ranks(Job(strategy="zero3"), tolerance=ROUNDED)


def offload() -> Figures:
    """Compare ZeRO-2 and 3 with the optimizer, and under ZeRO-3 the weights, in the host's memory."""
    figures: Figures = {}
    for strategy in ("zero2", "zero3"):
        found = two_ranks(Job(strategy=strategy, offload=True), tolerance=ROUNDED)
        assert found["moments_on"] == ["cpu"], f"{strategy} has moments on {found['moments_on']}"
        figures[strategy] = found["difference"]
    return figures


@contextmanager
def _types_of_linear_outputs(seen: set[torch.dtype]) -> Iterator[None]:
    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        is_counted = isinstance(module, nn.Linear) and torch.is_grad_enabled()  # without: the look at the start
        if is_counted and outputs.device.type == device().type:  # operations are counted on meta
            seen.add(outputs.dtype)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def bf16() -> Figures:
    """Compare bf16 with torch's autocast, for both networks."""
    figures: Figures = {}
    for network in ("mlp", "gpt"):
        job, seen = Job(network=network, precision="bf16"), set[torch.dtype]()
        with _types_of_linear_outputs(seen):
            found = by_harness(job)
        assert seen == {torch.bfloat16}, f"matrix products of {network} came out in {seen}"
        assert {w.dtype for w in found.weights.values()} == {torch.float32}, "the weights are not fp32"
        figures[network] = compare(found, by_hand(job), tolerance=AUTOCAST_ROUNDED)
    return figures


def fp16() -> Figures:
    """Compare fp16 with torch's autocast and GradScaler: the same skips, the same scales."""
    job, seen = Job(precision="fp16", updates=12), set[torch.dtype]()
    with _types_of_linear_outputs(seen):
        found = by_harness(job)
    wanted = by_hand(job)
    assert seen == {torch.float16}, f"matrix products came out in {seen}"
    changes = {after / before for before, after in pairwise(wanted.scales)}
    assert {0.5, 2.0} <= changes, f"the scale went by {changes}: nothing is shown of skips and growth"
    assert found.scales == wanted.scales, f"scales {found.scales}, torch has {wanted.scales}"
    difference = compare(found, wanted, tolerance=AUTOCAST_ROUNDED)
    skipped = sum(not math.isfinite(norm) for norm in wanted.norms)
    return {"difference": difference, "updates_skipped": skipped}


def activation_checkpointing() -> Figures:
    """Compare a gpt whose blocks are computed again, dropout included, with one that keeps all activations."""
    calls = {False: 0, True: 0}
    traces = {}
    for again in (False, True):

        def count(module: nn.Module, inputs: Any, again: bool = again) -> None:
            is_counted = isinstance(module, Attention) and module.training
            calls[again] += is_counted and inputs[0].device.type == device().type  # operations are counted on meta

        handle = nn.modules.module.register_module_forward_pre_hook(count)
        traces[again] = by_harness(Job(network="gpt", dropout=0.1, activation_checkpointing=again))
        handle.remove()
    updates = len(traces[True].losses)
    more = calls[True] - calls[False]  # the look at the start runs them as often either way
    assert more > 0, f"blocks ran {calls[True]} times, without it {calls[False]}"
    assert more % updates == 0, f"blocks ran {more} times more in {updates} updates"
    figures: Figures = {"difference": compare(traces[True], traces[False], tolerance=ROUNDED)}
    if device().type == "cuda":
        bytes_used = {again: _peak_of_deep(again) for again in (False, True)}
        figures["peak_share"] = bytes_used[True] / bytes_used[False]
        assert figures["peak_share"] < 0.7, f"it takes {figures['peak_share']:.2f} of the memory"
    return figures


def _peak_of_deep(again: bool) -> int:
    gpt = Gpt(layers=12, width=256, heads=4, block=512, num_tokens=512, rows=16, activation_checkpointing=again)
    gc.collect()  # what ran before
    torch.cuda.reset_peak_memory_stats()
    with running(gpt) as run:
        make_updates(run, TrainState(), until=2)
        return torch.cuda.max_memory_allocated()


def ema() -> Figures:
    """Compare the average with its sum, sum_k decay^(n - k) w_k / sum_k decay^(n - k), and with what is evaluated."""
    decay, kept, averages = 0.8, list[dict[str, Tensor]](), dict[str, Tensor]()

    def look(run: Run) -> None:
        kept.append({name: p.detach().double().clone() for name, p in run.strategy.module.named_parameters()})
        assert run.strategy.average is not None, "no average is kept"
        values = zip(run.strategy.parameter_names, run.strategy.average.values, strict=True)
        averages.update({name: value.double().clone() for name, value in values})
        with run.strategy.averaged():
            shown = dict(run.strategy.module.named_parameters())
            assert all(torch.equal(shown[name].double(), averages[name]) for name in shown), "another one is evaluated"

    by_harness(Job(ema_decay=decay), look)
    factors = [decay ** (len(kept) - k) for k in range(1, len(kept) + 1)]
    wanted = {
        name: sum(f * weights[name] for f, weights in zip(factors, kept, strict=True)) / sum(factors)
        for name in kept[0]
    }
    difference = max((averages[name] - wanted[name]).abs().max().item() for name in wanted)
    away = max((averages[name] - kept[-1][name]).abs().max().item() for name in wanted)
    assert difference <= 1e-6, f"the average is off by {difference:.3g}"
    assert away > 1e-4, "the average is the last weights"
    return {"difference": difference, "updates": len(kept)}

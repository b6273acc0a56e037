"""Checks that measure: speed, memory, host reads, gaps between kernels, the stall of a save, copies to the device."""

from __future__ import annotations

import tempfile
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from harness.catalogue.gpt.section import GptModel
from harness.checkpoint.store import CheckpointStore
from harness.interval import Interval
from harness.loop import train_step
from harness.ranks.join import leave_ranks
from harness.rows import batches
from harness.rows.batches import TrainingBatches
from harness.rows.order import BatchPlan
from harness.rows.rows import Columns
from harness.run import Run
from harness.state import TrainState
from harness.watch.peak_flops import peak_flops
from tests.gpt_sizes import forward_flops_per_token
from tests.gpu.large import GPT_350M, Gpt, running
from tests.gpu.small import Job, assembled, device, make_updates

Figures = dict[str, Any]
WANTED_MFU = 0.40
"""Of the GPT of 350 million parameters in bf16; to become 0.50 with torch.compile."""
MOST_IDLE = 0.10
"""Share of the time that no kernel may run in."""
BYTES_A_ROW = 3 * 2**30
"""More than the activations of a row of GPT_350M take in bf16."""


def that_fits() -> Gpt:
    """Return the GPT of 350 million parameters with as many rows an update as there is memory for, 32 at most."""
    free, _ = torch.cuda.mem_get_info()
    rows = (free - 20 * GPT_350M.num_parameters) // BYTES_A_ROW
    assert rows >= 1, f"{free / 2**30:.1f} GiB of the GPU are free, too few for a GPT of 350 million parameters"
    return replace(GPT_350M, rows=2 ** min(5, int(rows).bit_length() - 1))


def throughput() -> Figures:
    """Measure tokens a second and MFU as the ledger has them, and compare them with arithmetic of our own."""
    gpt = that_fits()
    with running(gpt) as run:
        assert run.strategy.num_parameters == gpt.num_parameters, "another network was built"
        began = time.perf_counter()
        state = TrainState()
        lines = make_updates(run, state, until=10)
        told = [line for line in make_updates(run, state, until=40) if "tokens_per_second" in line]
    tokens_per_second = median(line["tokens_per_second"] for line in told)
    first, last = lines[0]["loss"], told[-1]["loss"]
    assert last < first - 0.1, f"the loss went from {first} to {last}"
    figures = {
        "tokens_per_second": tokens_per_second,
        "rows": gpt.rows,
        "seconds": time.perf_counter() - began,
        "loss": last,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "mfu": None,
    }
    config = GptModel.model_validate(gpt.model_config)
    per_token = 3 * forward_flops_per_token(config, context=gpt.block, num_tokens=gpt.num_tokens)
    figures["tflops"] = tokens_per_second * per_token / 1e12
    if run.share_of_peak_per_row is None:
        return {**figures, "note": f"the peak of {torch.cuda.get_device_name()} is not known"}
    mfu = figures["mfu"] = median(line["mfu"] for line in told)
    peak = peak_flops(torch.cuda.get_device_name(), precision="bf16", allows_tf32=False)
    counted = run.share_of_peak_per_row * (peak or 0.0) / gpt.block
    assert abs(counted / per_token - 1) < 0.02, f"{counted:.4g} operations a token were counted, {per_token:.4g} are"
    assert mfu >= WANTED_MFU, f"MFU is {mfu:.3f}, wanted {WANTED_MFU} ({tokens_per_second:,.0f} tokens a second)"
    return figures


def kernel_gaps() -> Figures:
    """Measure in which share of an interval no kernel runs, by the profiler."""
    with running(that_fits()) as run:
        state = TrainState()
        make_updates(run, state, until=10)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            make_updates(run, state, until=state.step + 5)
            torch.cuda.synchronize()
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profile.events() or ()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
    assert len(spans) > 1000, f"the profiler saw {len(spans)} kernels in five updates"
    idle, longest = gaps(spans)
    figures = {"idle_share": idle, "longest_gap_ms": longest / 1e3, "kernels_an_update": len(spans) / 5}
    assert idle <= MOST_IDLE, f"no kernel runs in {idle:.1%} of the time, at most {MOST_IDLE:.0%} is wanted"
    return figures


def gaps(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the share of the time, from the first begin to the last end, that no span covers, and the longest gap."""
    ordered = sorted(spans)
    first = covered = ordered[0][0]
    idle = longest = 0.0
    for begin, end in ordered:
        gap = max(0.0, begin - covered)
        idle, longest, covered = idle + gap, max(longest, gap), max(covered, end)
    return idle / max(1e-9, covered - first), longest


def peak_memory() -> Figures:
    """Compare the bytes that an update holds at most, and that stay after it, with P weights: 16 P and 12 P."""
    gpt = Gpt(layers=12, width=768, heads=12, block=64, rows=1, precision="fp32")
    num_bytes = gpt.num_parameters * 4
    with running(gpt) as run:
        state = TrainState()
        make_updates(run, state, until=2)
        torch.cuda.reset_peak_memory_stats()
        lines = make_updates(run, state, until=4)
        stays, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    figures = {
        "parameters": gpt.num_parameters,
        "stays_in_weights": stays / num_bytes,
        "peak_in_weights": peak / num_bytes,
    }
    assert 3.0 <= figures["stays_in_weights"] <= 3.15, f"weights and two moments are 3, {figures} stays"
    assert 4.0 <= figures["peak_in_weights"] <= 4.6, f"with gradients it is 4 and a little for activations: {figures}"
    assert lines[-1]["memory_bytes"] == peak, f"the ledger says {lines[-1]['memory_bytes']:,}, torch {peak:,}"
    return figures


# What may be read to the host in an update: SkippingOptimizer reads once; DeepSpeed reads its norm, and we the rate.
READS_ALLOWED = {"adamw": 0, "sgd": 0, "adafactor": 1, "muon": 1}


def host_reads() -> Figures:
    """Count in how many places an update waits for the device, by torch's own alarm."""
    jobs = {f"{optimizer} {precision}": Job(optimizer=optimizer, precision=precision, updates=1000, rows=2048)
            for optimizer, precision in (("adamw", "fp32"), ("adamw", "bf16"), ("adamw", "fp16"), ("sgd", "fp32"),
                                         ("adafactor", "fp32"), ("muon", "fp32"))}  # fmt: skip
    jobs["ema"] = Job(ema_decay=0.9, updates=1000, rows=2048)
    jobs["gpt"] = Job(network="gpt", precision="bf16", updates=1000, rows=2048)
    figures: Figures = {}
    for name, job in jobs.items():
        with tempfile.TemporaryDirectory() as folder:
            reads, places = _reads_an_update(job, Path(folder))
        figures[name] = reads
        allowed = READS_ALLOWED[job.optimizer]
        assert reads <= allowed, f"{name}: an update waits {reads:g} times, {allowed} allowed: {places[:3]}"
    with tempfile.TemporaryDirectory() as folder:  # measured only: the engine's own reads are not ours to forbid
        figures["zero2"] = _reads_an_update(Job(strategy="zero2", updates=1000, rows=2048), Path(folder))[0]
    leave_ranks()
    return figures


def _reads_an_update(job: Job, folder: Path) -> tuple[float, list[str]]:
    run = assembled(job, folder)
    run.config = run.config.model_copy(
        update={"tracking": run.config.tracking.model_copy(update={"log_every_steps": 10})}
    )
    run.agenda.config = run.config
    run.agenda.updates_until_vote, run.agenda.seconds_per_update = 1000, 1e-6
    state = TrainState()
    for _ in range(2):  # the first interval is a warm-up
        interval = Interval(run, state)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for position in interval.positions:
                    interval.count(train_step(run, position, interval.learning_rate()))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        interval.close()
    run.checkpoints.close()
    places = [f"{found.filename}:{found.lineno}" for found in caught if "called a synchronizing" in str(found.message)]
    assert len(interval.positions) == 10, f"the interval has {len(interval.positions)} updates"
    return len(places) / len(interval.positions), places


def save() -> Figures:
    """Save beside the training: what is written is the state of that moment, from page-locked memory, and quickly."""
    on_gpu = device().type == "cuda"
    gpt = Gpt(layers=12, width=768, heads=12, block=64, rows=1) if on_gpu else SMALL
    with running(gpt) as run:
        state = TrainState()
        make_updates(run, state, until=2)
        stalls, at_disk = [], []
        # The first one takes the memory that all share, and its disk answers when the weights are others.
        for is_held in (True, False):
            began = time.perf_counter()
            kept, blocked, seconds = _save_and_train_on(run, state, is_held=is_held)
            stalls.append(blocked)
            at_disk.append(seconds)
            loaded = run.checkpoints.directory.steps()[0]
            assert loaded.name == f"step-{kept.pop('step'):08d}", f"the newest is {loaded.name}"
            _compare_with_disk(run.checkpoints, loaded, kept)
        buffers = list(run.checkpoints._snapshot._buffers.values())
        if on_gpu:
            assert all(buffer.is_pinned() for buffer in buffers), "the copies are not in page-locked memory"
        num_bytes = sum(buffer.nbytes for buffer in buffers)
        figures = {"stall_first_ms": 1e3 * stalls[0], "stall_ms": 1e3 * stalls[1], "on_disk_s": at_disk[1]}
        figures |= {"state_mb": num_bytes / 1e6, "took_s": time.perf_counter() - began}
        if on_gpu:  # PCIe 3 x16 carries 12 GB/s; a stall of ten times that would be a copy through pageable memory
            figures["gb_per_second"] = num_bytes / 1e9 / stalls[1]
            assert figures["gb_per_second"] > 1.2, f"the copy to the host makes {figures['gb_per_second']:.2f} GB/s"
    return figures


SMALL = Gpt(layers=2, width=64, heads=2, block=16, num_tokens=512, rows=2, precision="fp32")


def _save_and_train_on(run: Run, state: TrainState, *, is_held: bool) -> tuple[dict[str, Any], float, float]:
    """Begin a save, go on training while it is written, and return what the state was, the stall and the seconds."""
    kept: dict[str, Any] = {key: tensor.detach().clone() for key, tensor in run.strategy.state()}
    if device().type == "cuda":
        torch.cuda.synchronize()
    step = kept["step"] = state.step
    trainer = {"step": step, "optimizer": run.strategy.optimizer_settings()}
    released = threading.Event()
    if is_held:
        run.checkpoints._thread.submit(released.wait, 60)
    began = time.perf_counter()
    run.checkpoints.begin(step, trainer, is_best=False)
    blocked = time.perf_counter() - began
    for position in range(state.position, state.position + 3):
        train_step(run, position, run.strategy.tensor(1e-3, dtype=torch.float32))
    released.set()
    result = run.checkpoints.finish()
    state.position, state.step = state.position + 3, state.step + 3
    assert result is not None, "nothing was saved"
    assert result.problem is None, f"the save failed: {result.problem}"
    return kept, blocked, result.seconds


def _compare_with_disk(store: CheckpointStore, directory: Path, kept: dict[str, Tensor]) -> None:
    from harness.checkpoint.tensors import tensor_digest
    from harness.record.manifest import read_manifest

    saved = dict(read_manifest(directory).tensors)
    assert saved.keys() == kept.keys(), "the checkpoint has other tensors"
    different = [key for key in kept if tensor_digest(kept[key].cpu()) != saved[key]]
    assert not different, f"{len(different)} tensors were saved as training left them later, such as {different[0]}"


def copies_ahead() -> Figures:
    """Take batches from the host's memory while the device is busy: the host waits for nothing, the rows are right."""
    rows, width, batch = 4096, 4096, 256
    inputs = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, width).contiguous()
    plan = BatchPlan(num_rows=rows, global_batch=batch, world_size=1, micro_batch=None, seed=0)
    resident, batches.RESIDENT_BYTES = batches.RESIDENT_BYTES, 0
    try:
        taken = TrainingBatches(
            Columns(inputs, torch.arange(rows)), plan, rank=0, device=torch.device("cuda", 0), dtype=torch.float32
        )
    finally:
        batches.RESIDENT_BYTES = resident
    for _ in range(2):  # the first time takes the memory that all share
        torch.cuda.synchronize()
        busy = _sleep(0.2)
        began = time.perf_counter()
        found = [taken.at(position)[0] for position in range(1, 7)]
        seconds = time.perf_counter() - began
        was_busy = not busy.query()
        torch.cuda.synchronize()
    for position, batch in enumerate(found, start=1):
        wanted = torch.from_numpy(plan.sample_ids(position, 0))
        assert torch.equal(batch.data["targets"].cpu(), wanted), f"batch {position} has other targets"
        assert torch.equal(batch.data["inputs"][:, -1].cpu(), wanted.float()), f"batch {position} has other inputs"
    figures = {"host_ms_a_batch": 1e3 * seconds / len(found), "mb_a_batch": 4 * batch * width / 1e6}
    assert was_busy, f"the host waited for the device: {figures}"
    return figures


def _sleep(seconds: float) -> Any:
    """Keep the device busy; return the event of its end."""
    clock_khz = 2_000_000  # more than any GPU's, so that it sleeps longer rather than shorter
    torch.cuda._sleep(int(seconds * clock_khz * 1e3))
    event = torch.cuda.Event()
    event.record()
    return event

"""Which charts tell of one run or of several, and what is in each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from harness.report.accounting import wall_time
from harness.report.read import Record, number
from harness.report.shapes import Chart, ConfusionMatrix, HeatMap, LineChart, Mark, Series, ShareChart

MAX_POINTS = 300
"""A line of more has a point for each of so many groups of updates: their mean, in a band from least to most."""

PARTS = {
    "data_wait": ("waiting for data", 1),
    "compute": ("computing", 0),
    "reduction": ("reduction over ranks", 3),
    "rest": ("rest", 4),
}
"""Of an update's time, as the ledger calls them: label and number of the colour."""


def charts(records: Sequence[Record]) -> Iterator[Chart]:
    """Yield the charts of these runs, what matters most first; none of figures that no run has."""
    yield from _losses(records)
    yield from _scores(records)
    for record in records:
        for name, counts in record.matrices.items():
            title = f"{name}, last" + (f": {record.name}" if len(records) > 1 else "")
            yield ConfusionMatrix(f"{name.replace('/', '-')}-{record.slug}", title, counts)
    yield from _column(records, "learning_rate", "Learning rate", from_zero=True)
    yield from _column(records, "grad_norm", "Gradient norm before clipping", is_log=True, note=_clipped(records))
    yield from _column(records, "clip_coefficient", "Clip coefficient", note="1: not clipped", from_zero=True)
    yield from _heat_maps(records)
    unit, throughput = throughput_of(records)
    yield from _figure(records, "throughput", f"{unit} a second, while updating", throughput, from_zero=True)
    yield from _column(records, "mfu", "Share of the devices' peak that is used (MFU)", from_zero=True)
    yield from _parts_of_an_update(records)
    yield from _figure(
        records,
        "memory",
        "Memory, GiB, largest over ranks",
        lambda r: r.updates["memory_bytes"] / 2**30,
        from_zero=True,
    )
    yield from _times(records)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return at most MAX_POINTS of a curve: x, mean, least and most of each group; NaN counts only where all are.

    Args:
        x, y: (N,).
    """
    edges = np.linspace(0, len(y), MAX_POINTS + 1).astype(int)
    groups = [slice(a, b) for a, b in pairwise(edges)]
    kept = [y[group][np.isfinite(y[group])] for group in groups]
    rows = [(k.mean(), k.min(), k.max()) if len(k) else (np.nan,) * 3 for k in kept]
    mean, low, high = np.array(rows).T
    return np.array([x[group].mean() for group in groups]), mean, low, high


def throughput_of(records: Sequence[Record]) -> tuple[str, Callable[[Record], np.ndarray]]:
    """Return what the runs count, Tokens if all of them do, and the (N,) throughput of each update of one."""
    if all(np.isfinite(record.updates["tokens_per_second"]).any() for record in records):
        return "Tokens", lambda record: record.updates["tokens_per_second"]
    return "Samples", samples_per_second


def samples_per_second(record: Record) -> np.ndarray:
    """Return the (N,) throughput of each update over all ranks, as told or else from what the run had seen."""
    told, seen = record.updates["samples_per_second"], record.updates["samples_seen"]
    if np.isfinite(told).any() or not len(seen):
        return told
    throughput: np.ndarray = np.diff(seen, prepend=0.0) / np.maximum(record.updates["seconds"], 1e-9)
    return throughput


def _curve(record: Record, y: np.ndarray, *, label: str, color: int) -> Series:
    is_known = np.isfinite(y)  # some figures are told once an interval
    x, y = record.updates["step"][is_known], y[is_known]
    if len(x) <= 2 * MAX_POINTS:
        return Series(label, x, y, color, is_marked=len(x) <= 3)  # a single point is no line
    x, mean, low, high = thin(x, y)
    return Series(label, x, mean, color, low, high)


def _figure(
    records: Sequence[Record],
    slug: str,
    title: str,
    values: Callable[[Record], np.ndarray],
    *,
    note: str = "",
    is_log: bool = False,
    from_zero: bool = False,
) -> Iterator[LineChart]:
    series = []
    for color, record in enumerate(records):
        y = values(record)
        if np.isfinite(y).any():
            series.append(_curve(record, y, label=record.name, color=color))
    if series:
        is_log = is_log and all(np.nanmin(one.y) > 0 for one in series)
        yield LineChart(slug, title, series, note, _restarts(records), is_log=is_log, from_zero=from_zero)


def _column(records: Sequence[Record], name: str, title: str, **options: bool | str) -> Iterator[LineChart]:
    slug = name.replace("_", "-")
    return _figure(records, slug, title, lambda record: record.updates[name], **options)  # type: ignore[arg-type]


def _parts_of_an_update(records: Sequence[Record]) -> Iterator[LineChart]:
    """Yield one chart with every part of one run, or the wait for data of several."""
    if len(records) > 1:
        yield from _column(records, "data_wait_fraction", "Share of an update spent waiting for data", from_zero=True)
        return
    (record,) = records
    series = [
        _curve(record, record.updates[f"{part}_fraction"], label=label, color=color)
        for part, (label, color) in PARTS.items()
        if np.isfinite(record.updates[f"{part}_fraction"]).any()
    ]
    if series:
        yield LineChart("update-parts", "Where an update's time goes", series, "", _restarts(records), from_zero=True)


def _losses(records: Sequence[Record]) -> Iterator[LineChart]:
    for chart in _figure(records, "loss", "Loss", lambda record: record.updates["loss"], is_log=True):
        values = np.concatenate([series.y for series in chart.series])
        spread = np.nanmax(values) / max(np.nanmin(values), 1e-12)
        series, marks, note = list(chart.series), list(chart.marks), "training"
        if len(records) == 1:
            series = [dataclasses.replace(s, label="training") for s in series]
            marks += _skipped(records[0])
            if scores := _score_series(records[0], "val/loss", color=1, label="validation"):
                series.append(scores)
                marks += _best(records[0], "val/loss", color=1)
            note = ""
        yield LineChart("loss", "Loss", series, note, marks, is_log=chart.is_log and spread > 20)


def _scores(records: Sequence[Record]) -> Iterator[LineChart]:
    names = dict.fromkeys(name for record in records for _, metrics in record.evaluations for name in metrics)
    for name in names:
        if name == "val/loss" and len(records) == 1 and len(records[0].updates["step"]):
            continue  # it is in the chart of losses
        series, marks = [], _restarts(records)
        for color, record in enumerate(records):
            if scores := _score_series(record, name, color=color, label=record.name):
                series.append(scores)
                marks += _best(record, name, color=color)
        if series:
            yield LineChart(name.replace("/", "-"), name, series, "", marks)


def _score_series(record: Record, metric: str, *, color: int, label: str) -> Series | None:
    points = [(step, metrics[metric]) for step, metrics in record.evaluations if metric in metrics]
    if not np.isfinite([value for _, value in points]).any():
        return None
    x, y = np.array(points, dtype=float).T
    return Series(label, x, y, color, is_marked=len(x) <= 60)


def _best(record: Record, metric: str, *, color: int) -> list[Mark]:
    values = {step: metrics.get(metric) for step, metrics in record.evaluations}
    best = values.get(record.best.best_step) if record.best.best_step is not None else None
    return [Mark(float(record.best.best_step or 0), best, color)] if best is not None and np.isfinite(best) else []


def _restarts(records: Sequence[Record]) -> list[Mark]:
    return [Mark(step) for record in records for step in record.restarts]


def _skipped(record: Record) -> list[Mark]:
    steps = np.unique(record.updates["step"][record.updates["applied"] == 0])
    return [Mark(float(step), is_bad=True) for step in steps[:50]]


def _clipped(records: Sequence[Record]) -> str:
    shares = []
    for record in records:
        coefficient = record.updates["clip_coefficient"]
        if np.isfinite(coefficient).any():
            shares.append(f"{record.name} " * (len(records) > 1) + f"{(coefficient < 1).mean():.0%}")
    return f"clipped: {', '.join(shares)} of the updates" if shares else ""


def _heat_maps(records: Sequence[Record]) -> Iterator[HeatMap]:
    for record in records:
        norms: dict[int, dict[str, float]] = {}
        for event in record.events:
            if event["event"] == "started":  # what was after this step is made again
                norms = {step: layers for step, layers in norms.items() if step <= event["step"]}
            elif event["event"] == "gradients" and isinstance(event.get("norms"), dict):
                norms[event["step"]] = _by_layer(event["norms"])
        steps = sorted(norms)
        if len(steps) < 2:
            continue
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).astype(int))]
        layers = list(dict.fromkeys(layer for step in steps for layer in norms[step]))
        values = np.array([[norms[step].get(layer, np.nan) for step in steps] for layer in layers])
        if (values > 0).any():
            title = "Gradient norm of each layer" + (f": {record.name}" if len(records) > 1 else "")
            yield HeatMap(f"gradients-{record.slug}", title, steps, layers, values, "input at the top, output below")


def _by_layer(norms: dict[str, Any]) -> dict[str, float]:
    """Return the 2-norm of each layer from those of its parameters, in the network's order."""
    layers: dict[str, float] = {}
    for name, norm in norms.items():
        layer = name.rpartition(".")[0] or name
        layers[layer] = math.hypot(layers.get(layer, 0.0), number(norm))
    return layers


def _times(records: Sequence[Record]) -> Iterator[ShareChart]:
    times = [(record.name, time) for record in records if (time := wall_time(record)) and time.total]
    if times:
        parts = {
            "updates that count": [time.useful / time.total for _, time in times],
            "made again": [time.repeated / time.total for _, time in times],
            "evaluating, saving": [time.around / time.total for _, time in times],
            "starting, stopped": [time.stopped / time.total for _, time in times],
        }
        yield ShareChart("wall-time", "Where the time went", [name for name, _ in times], parts, "of the wall time")

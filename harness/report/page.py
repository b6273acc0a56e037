"""The page: one HTML file about one run or several, with everything in it, that asks the network for nothing."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from harness.record.json_lines import Line
from harness.record.run_status import duration
from harness.report.accounting import wall_time
from harness.report.charts import charts, throughput_of
from harness.report.draw import svg
from harness.report.read import Record
from harness.report.shapes import SERIES, Chart

MAX_INCIDENTS = 100
_QUIET = ("gradients", "samples", "one answer", "saved", "verdict", "promises")
"""Events that are drawn, counted, or have a table of their own."""
ABSENT = "\N{EN DASH}"
_REASONS = {"budget": "the budget is spent", "early_stopping": "no better evaluation within the patience"}


class Row(NamedTuple):
    """One incident."""

    time: str
    text: str
    kind: str
    """bad, notable or plain."""


def page(records: Sequence[Record], drawn: Sequence[Chart]) -> str:
    """Return the HTML of a report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    figures = [
        {"title": chart.title, "note": chart.note, "legend": chart.legend, "svg": svg(chart, salt=str(index))}
        for index, chart in enumerate(drawn)
    ]
    about = [_about(record) for record in records]
    text = environment.get_template("page.html.j2").render(
        title=" · ".join(record.name for record in records),
        runs=about,
        results=dict.fromkeys(name for record in about for name, _, _ in record["tiles"]),
        figures=figures,
        differing=differing(records) if len(records) > 1 else [],
        num_colors=len(SERIES),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return re.sub(r"\n\s*\n+", "\n", text)


def draw(records: Sequence[Record]) -> list[Chart]:
    """Return the charts of these runs."""
    return list(charts(records))


def differing(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return every setting that is not the same in all runs, besides their names, with the value in each, or a dash."""
    paths = dict.fromkeys(path for record in records for path in record.settings)
    rows = [(path, [_value(record.settings.get(path, ABSENT)) for record in records]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1 and path != "run.name"]


def _about(record: Record) -> dict[str, Any]:
    incidents = list(_incidents(record))
    return {
        "name": record.name,
        "state": record.status.state,
        "summary": _summary(record),
        "tiles": list(_tiles(record, num_bad=sum(row.kind == "bad" for row in incidents))),
        "ignored": record.ignored,
        "incidents": incidents[:MAX_INCIDENTS],
        "num_more": max(0, len(incidents) - MAX_INCIDENTS),
        "verdicts": [_details(event) for event in record.events if event["event"] == "verdict"],
        "promises": _promises(record),
        "settings": [(path, _value(value), path in record.changed) for path, value in record.settings.items()],
        "samples": _samples(record),
        "commands": list(_commands(record)),
        "provenance": list(_provenance(record)),
        "directory": str(record.status.directory),
    }


def _summary(record: Record) -> str:
    status, steps = record.status, record.updates["step"]
    step = int(steps[-1]) if status.step is None and len(steps) else status.step or 0
    reason = _REASONS.get(status.reason or "", status.reason or "")
    after = f"after {step:,} updates" if step != 1 else "after 1 update"
    restarts = len(record.restarts)
    again = f", started {restarts + 1} times" if restarts else ""
    start = record.starts[-1] if record.starts else {}
    ranks = start.get("world_size")
    where = f", {start.get('strategy')} on {ranks} rank{'s' if ranks != 1 else ''}" if start else ""
    if not len(steps):
        after = "before its first update"
    code = f" (exit code {status.code})" if status.code is not None and status.state == "failed" else ""
    return f"{status.state}{code} {after}{again}{where}{f': {reason}' if reason else ''}"


def _tiles(record: Record, *, num_bad: int) -> Iterator[tuple[str, str, str]]:
    """Yield the key figures: name, value, and what belongs to the value."""
    best = record.best
    if best.best is not None:
        missed = record.standings.missed
        yield f"best {best.metric}", f"{best.best:.4g}", f"at {best.best_step:,}{f'; {missed}' if missed else ''}"
    if best.best_step != record.last_evaluated:
        for name, value in record.standings.scores.items():
            if name != best.metric:
                yield f"{name} of the best", f"{value:.4g}", f"at {best.best_step:,}"
    for name, value in record.final_metrics.items():
        yield f"final {name}", f"{value:.4g}", ""
    unit, throughput = throughput_of([record])
    if np.isfinite(values := throughput(record)).any():
        yield f"{unit.lower()} a second", f"{np.nanmedian(values):,.0f}", "median"
    if np.isfinite(mfu := record.updates["mfu"]).any():
        yield "MFU", f"{np.nanmedian(mfu):.1%}", "median"
    if (time := wall_time(record)) and time.total:
        yield "wall time", duration(time.total), ""
        yield "goodput", f"{time.goodput:.0%}", ""
    memory = record.updates["memory_bytes"]
    if np.isfinite(memory).any():
        yield "memory", f"{np.nanmax(memory) / 2**30:,.2f} GiB", "most of any rank"
    for start in record.starts[-1:]:
        if "num_parameters" in start:
            yield "parameters", f"{start['num_parameters']:,}", ""
    yield "incidents", str(num_bad), ""


def _incidents(record: Record) -> Iterator[Row]:
    num_starts = 0
    for event in record.events:
        kind, text = event["event"], _details(event)
        if kind in _QUIET:
            continue
        if kind == "started":
            num_starts += 1
            text = f"started {'again ' if num_starts > 1 else ''}after update {event['step']:,} on {event.get('host')}"
        elif kind == "cut back":
            text = f"{event.get('updates')} updates ({event['seconds']:.2g} s) were lost and are made again"
        elif kind == "nonfinite":
            text = f"update {event.get('step')} was not applied: the gradient is not finite in {event.get('parameter')}"
        elif kind == "overflow":
            text = f"update {event['step']} was not applied: the gradient overflowed fp16, whose loss scale is halved"
        elif kind == "notice":
            text = str(event.get("text"))
        else:
            text = f"{kind}: {text}" if text else kind
        is_bad = kind in ("nonfinite", "cut back", "save failed") or kind.endswith("failed") or "quarantine/" in text
        is_plain = kind in ("notice", "ended") or (kind == "started" and num_starts == 1)
        yield Row(event["time"][:19].replace("T", " "), text, "bad" if is_bad else "plain" if is_plain else "notable")


def _samples(record: Record) -> dict[str, Any] | None:
    event = record.samples
    if event is None:
        return None
    rows = [[_value(value) for value in row] for row in event["rows"] if isinstance(row, list)]
    columns = [str(name) for name in event["columns"]]
    are_labels = {"target", "prediction", "probability"} <= set(columns)
    wrong = [are_labels and len({*row[columns.index("target") :][:2]}) == 2 for row in rows]
    return {"step": event["step"], "columns": columns, "rows": list(zip(rows, wrong, strict=True))}


def _promises(record: Record) -> list[tuple[str, str, str]]:
    """Return name, verdict and reason of what the last launch promised."""
    found = record.identity.get("promises")
    rows = [promise for promise in found if isinstance(promise, dict)] if isinstance(found, list) else []
    return [(_value(row.get("name")), _value(row.get("verdict")), _value(row.get("reason") or "")) for row in rows]


def _details(event: Line) -> str:
    return ", ".join(
        f"{key} {_value(value)}" for key, value in event.items() if key not in ("event", "time") and value is not None
    )


def _commands(record: Record) -> Iterator[tuple[str, str]]:
    start = record.starts[-1] if record.starts else {}
    if "command" in start:
        yield "was started with", str(start["command"])
    config = record.status.directory / "config.yaml"
    words = [
        "harness",
        "launch",
        str(config),
        "--gpus",
        str(start.get("world_size", 1)),
        f"run.name={record.own_name}-again",
        *_use(record),
    ]
    yield "to run it again, with the settings it had", shlex.join(words)
    yield "to see the whole of it again", shlex.join(["harness", "report", str(record.status.directory)])


def _use(record: Record) -> Iterator[str]:
    """Say again which code a run's configuration brought: of a stored one it is not followed."""
    files = [str(used.get("file")) for used in _list(record.identity.get("use")) if isinstance(used, dict)]
    names = [
        next((file for file in files if Path(file).parts[-len(Path(name).parts) :] == Path(name).parts), name)
        for name in map(str, _list(record.settings.get("use")))
    ]
    if names:
        yield f"use={json.dumps(names)}"


def _list(found: object) -> list[object]:
    return found if isinstance(found, list) else []


def _provenance(record: Record) -> Iterator[tuple[str, str]]:
    start = record.starts[-1] if record.starts else {}
    yield "id", str(record.identity.get("id", "unknown"))
    yield "created", str(record.identity.get("created", "unknown"))
    for key in ("hosts", "slurm", "device", "precision", "git", "python", "versions"):
        if start.get(key) is not None:
            yield key, _value(start[key])


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    return str(value)

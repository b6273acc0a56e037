"""Turns charts into SVG that takes the page's colours, and into PNG.

matplotlib, because its charts need no script: the page is small, prints, and opens in any browser in ten years.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.report.shapes import BAD, GRID, INK, MUTED, SERIES, Chart

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BAD: "bad", **{c: f"series-{i}" for i, c in enumerate(SERIES)}}
"""Colours of the light page, and the CSS variable that stands for each in the SVG."""
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
WIDTH_INCHES = 4.4  # 317 px: on a telephone the letters are about as large as drawn


def svg(chart: Chart, *, salt: str = "") -> str:
    """Return the chart as an <svg> element whose colours are CSS variables.

    Args:
        salt: makes its ids differ from those of the page's other charts.
    """
    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": f"{chart.slug}{salt}"}):
        _figure(chart).savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    heading = rf'<svg viewBox="\1" role="img" aria-label="{html.escape(chart.title)}">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', heading, text, count=1)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return text


def png(chart: Chart, path: Path) -> None:
    """Write the chart, with its title and legend, on white."""
    with mpl.rc_context(_STYLE):
        figure = _figure(chart)
        figure.suptitle(chart.title, x=0.02, ha="left", fontsize=10)
        if chart.legend:
            handles = [Line2D([], [], color=SERIES[color % len(SERIES)]) for _, color in chart.legend]
            figure.legend(handles, [label for label, _ in chart.legend], loc="outside lower left", ncols=2, fontsize=8)
        figure.savefig(path, format="png", dpi=200)


def _figure(chart: Chart) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, chart.height_inches), layout="constrained")
    chart.draw(figure.add_subplot())
    return figure

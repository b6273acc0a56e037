"""The kinds of charts of a report: what each holds, and how it is drawn into axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

INK, MUTED, GRID, BAD = "#1b1f24", "#59626d", "#d9dde3", "#c4232b"
SERIES = ("#1f6fb4", "#c95a08", "#17845a", "#a83f8a", "#85690a", "#04808c")


@dataclass(frozen=True)
class Series:
    """One line; `low` and `high` bound a band around it."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    is_marked: bool = False
    """Has a dot at each point, for the few points of evaluations."""


@dataclass(frozen=True)
class Mark:
    """A moment of a run: a star at (x, y), or a dotted line at x where there is no y."""

    x: float
    y: float | None = None
    color: int | None = None
    """None is ink for a line; a line of BAD is for an update that was not applied."""
    is_bad: bool = False


@dataclass(frozen=True)
class LineChart:
    """Curves over the step."""

    slug: str
    title: str
    series: Sequence[Series]
    note: str = ""
    marks: Sequence[Mark] = ()
    is_log: bool = False
    from_zero: bool = False
    height_inches: float = 2.4

    @property
    def legend(self) -> list[tuple[str, int]]:
        """Labels with the number of their colour; empty where there is nothing to tell apart."""
        return [(series.label, series.color) for series in self.series] if len(self.series) > 1 else []

    def draw(self, axes: Axes) -> None:
        """Draw into axes."""
        for index, series in enumerate(self.series):
            width = 1.3 + 1.2 * (1 - (index + 1) / len(self.series))  # so that runs that agree are seen to agree
            color = SERIES[series.color % len(SERIES)]
            dashes = ("-", "--", ":")[series.color // len(SERIES) % 3]
            if series.low is not None and series.high is not None:
                axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.25, linewidth=0)
            marker = "o" if series.is_marked else None
            axes.plot(series.x, series.y, dashes, color=color, linewidth=width, marker=marker, markersize=3)
        for mark in self.marks:
            if mark.y is None:
                axes.axvline(mark.x, color=BAD if mark.is_bad else MUTED, linewidth=0.9, linestyle=":", zorder=1)
            else:
                color = SERIES[(mark.color or 0) % len(SERIES)]
                axes.plot([mark.x], [mark.y], "*", color=color, markersize=11, markeredgewidth=0, zorder=4)
        if self.is_log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0), numticks=7))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        elif self.from_zero:
            axes.set_ylim(0, 1.05 * max(axes.dataLim.ymax, 0) or None)
        if not self.is_log and 10_000 <= axes.get_ylim()[1] < 1e15:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _over_updates(axes)
        axes.margins(x=0.02)


@dataclass(frozen=True)
class HeatMap:
    """One colour for each row at each step, on a logarithmic scale."""

    slug: str
    title: str
    steps: Sequence[int]
    rows: Sequence[str]
    """Their names, from the input's to the output's."""
    values: np.ndarray
    """(rows, steps); what is not above 0 stays blank."""
    note: str = ""
    legend: Sequence[tuple[str, int]] = ()

    @property
    def height_inches(self) -> float:
        """As high as its rows need, within limits."""
        return float(np.clip(0.9 + 0.17 * len(self.rows), 1.7, 5.0))

    def draw(self, axes: Axes) -> None:
        """Draw into axes."""
        shown = np.ma.masked_where(~(self.values > 0), self.values)
        steps = np.asarray(self.steps, dtype=float)
        middles = (steps[1:] + steps[:-1]) / 2
        edges = np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
        mesh = axes.pcolormesh(
            edges, np.arange(len(self.rows) + 1), shown, norm=LogNorm(), cmap="viridis", rasterized=True
        )
        axes.invert_yaxis()
        axes.grid(False)
        every = max(1, -(-len(self.rows) // 26))
        shown_rows = [_short(name) for name in self.rows[::every]]
        axes.set_yticks(np.arange(0, len(self.rows), every) + 0.5, shown_rows)
        axes.tick_params(left=False)
        _over_updates(axes)
        bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        bar.ax.yaxis.set_major_formatter("{x:g}")
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.tick_params(length=0)


@dataclass(frozen=True)
class ShareChart:
    """One bar for each row, divided into parts of a whole."""

    slug: str
    title: str
    rows: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    """For each part the share of every row, 0 to 1."""
    note: str = ""
    COLORS = (2, 1, 0, 4)

    @property
    def legend(self) -> list[tuple[str, int]]:
        """Every part with its colour, and with its share where there is one bar."""
        shares = [f" {values[0]:.0%}" if len(self.rows) == 1 else "" for values in self.parts.values()]
        return [
            (f"{name}{share}", self.COLORS[i]) for i, (name, share) in enumerate(zip(self.parts, shares, strict=True))
        ]

    @property
    def height_inches(self) -> float:
        """As high as its bars need."""
        return 0.7 + 0.32 * len(self.rows)

    def draw(self, axes: Axes) -> None:
        """Draw into axes."""
        left = np.zeros(len(self.rows))
        for index, values in enumerate(self.parts.values()):
            axes.barh(np.arange(len(self.rows)), values, left=left, color=SERIES[self.COLORS[index]], height=0.7)
            left += np.asarray(values)
        axes.set_yticks(np.arange(len(self.rows)), list(map(_short, self.rows)) if len(self.rows) > 1 else [""])
        axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.grid(False)
        axes.tick_params(left=False)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


@dataclass(frozen=True)
class ConfusionMatrix:
    """How many rows of each true class were taken for each class; colours are shares of the true class."""

    slug: str
    title: str
    counts: np.ndarray
    """(true classes, predicted classes)."""
    note: str = "down: true class, across: predicted"
    legend: Sequence[tuple[str, int]] = ()
    MAX_WRITTEN = 12
    """Of more classes the counts are too small to read."""

    @property
    def height_inches(self) -> float:
        """High enough for its classes, within limits."""
        return float(np.clip(0.8 + 0.24 * len(self.counts), 2.0, 4.0))

    def draw(self, axes: Axes) -> None:
        """Draw into axes."""
        classes = np.arange(len(self.counts))
        shares = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        image = np.empty((*shares.shape, 4))  # a colour that lets the page shine through, light or dark
        image[..., :3], image[..., 3] = to_rgb(SERIES[0]), np.nan_to_num(shares)
        axes.imshow(image, aspect="auto")
        axes.grid(False)
        axes.tick_params(length=0)
        every = max(1, -(-len(classes) // self.MAX_WRITTEN))
        axes.set_xticks(classes[::every])
        axes.set_yticks(classes[::every])
        if every > 1:
            return
        for (row, column), count in np.ndenumerate(self.counts):
            if count:
                text, color = EngFormatter(places=0, sep="")(count), "#ffffff" if shares[row, column] > 0.5 else INK
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7.5)


Chart = LineChart | HeatMap | ShareChart | ConfusionMatrix


def _short(name: str) -> str:
    """Return the end of a name, which leaves the axes room."""
    return name if len(name) <= 18 else f"…{name[-17:]}"


def _over_updates(axes: Axes) -> None:
    axes.set_xlabel("update")
    low, high = axes.get_xlim()
    if high - low < 2:  # of a single update
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if high >= 10_000 else "{x:,.0f}")

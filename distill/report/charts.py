"""Small SVG line charts: a series, the band of known-good runs, and dots where it leaves the band.

The page's stylesheet colours them (classes `line`, `dot`, `band`, `grid`, `out`), so that the same
chart serves light and dark mode. docs/decisions/0010 compares them with matplotlib's SVG.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from distill.report.curves import Band

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20  # margins, which hold the tick labels
BAND_ROOM = 3.0  # how far the axis follows a band, in units of the line's range
MAX_POINTS = 240  # of a line; a longer series is thinned
TICKS = 4  # the most grid lines


class Point(NamedTuple):
    step: int
    value: float


class Edge(NamedTuple):
    """The band at one step."""

    step: int
    low: float
    high: float


class Axes(NamedTuple):
    """The range of steps and values, and their coordinates in the chart."""

    first: int
    last: int
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value, low, high = min(max(value, self.low), self.high), self.low, self.high
        if self.log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        """At most TICKS round values inside the range."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if not self.log:
            return self.inside(MaxNLocator(TICKS - 1, steps=[1, 2, 5, 10]))
        values = self.inside(LogLocator(subs=(1.0, 3.0)))
        return values if len(values) <= TICKS else self.inside(LogLocator(numticks=TICKS))

    def inside(self, locator: Any) -> list[float]:
        values = locator.tick_values(self.low, self.high).tolist()
        return [v for v in values if self.low <= v <= self.high]


def chart(title: str, series: Mapping[int, float], band: Band | None = None) -> str:
    """A line chart of step -> value with its band behind it, as an <svg> element.

    Values that are not finite are left out. The axis is logarithmic if all of it is positive and
    spans more than a factor of 20.

    Returns:
        An empty text if no value is finite.
    """
    points = thinned([Point(s, v) for s, v in sorted(series.items()) if math.isfinite(v)])
    if not points:
        return ""
    edges = edges_of(points, band)
    axes = axes_of(points, edges)
    elements = [*frame(axes), *curve(points, edges, axes)]
    label = f"{title}: {short(points[0].value)} at first, {short(points[-1].value)} at the end"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(elements)}</svg>"
    )


def edges_of(points: list[Point], band: Band | None) -> list[Edge]:
    """The band up to the last point; cut at 0 if no point is negative."""
    edges = [
        Edge(step, *bounds)
        for step in (band.steps if band else ())
        if step <= points[-1].step and (bounds := band.at(step)) is not None  # pyright: ignore
    ]
    if min(p.value for p in points) >= 0:
        edges = [Edge(step, max(low, 0.0), high) for step, low, high in edges]
    return edges


def axes_of(points: list[Point], edges: list[Edge]) -> Axes:
    """Axes that show all points, and the band as far as it does not flatten the line."""
    low, high = min(p.value for p in points), max(p.value for p in points)
    first = points[0].step
    if edges:
        span = BAND_ROOM * (high - low or abs(high) or 1.0)
        low = min(low, max(min(e.low for e in edges), low - span))
        high = max(high, min(max(e.high for e in edges), high + span))
        first = min(first, *(e.step for e in edges))
    log = low > 0 and high / low > 20
    return Axes(first, points[-1].step, *padded(low, high, log), log)


def frame(axes: Axes) -> Iterator[str]:
    """Grid lines with their values, and the first and the last step."""
    for value in axes.ticks():
        y = axes.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield text(LEFT - 5, y + 3, short(value), "end")
    if axes.first < axes.last:
        yield text(LEFT, HEIGHT - 5, f"{axes.first:,}", "start")
    yield text(WIDTH - RIGHT, HEIGHT - 5, f"step {axes.last:,}", "end")


def curve(points: list[Point], edges: list[Edge], axes: Axes) -> Iterator[str]:
    """The band, the line on it, and a dot at each point outside the band."""
    x, y = axes.x, axes.y
    if len(edges) > 1:
        upper = [f"{x(e.step):.1f},{y(e.high):.1f}" for e in edges]
        lower = [f"{x(e.step):.1f},{y(e.low):.1f}" for e in reversed(edges)]
        yield f'<polygon class="band" points="{" ".join(upper + lower)}"/>'
    path = " ".join(f"{x(p.step):.1f},{y(p.value):.1f}" for p in points)
    yield f'<polyline class="line" points="{path}"/>'
    if len(points) == 1:  # a line of one point is invisible
        step, value = points[0]
        yield f'<circle class="dot" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>'
    bounds = {step: (low, high) for step, low, high in edges}
    for p in points:
        low, high = bounds.get(p.step, (-math.inf, math.inf))
        if not low <= p.value <= high:
            yield f'<circle class="out" cx="{x(p.step):.1f}" cy="{y(p.value):.1f}" r="2.5"/>'


def thinned(points: list[Point]) -> list[Point]:
    """About MAX_POINTS of the points at equal intervals, and the last one."""
    every = max(1, -(-len(points) // MAX_POINTS))
    return points[::every] + (points[-1:] if (len(points) - 1) % every else [])


def padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """The ends of an axis that leaves a little room below `low` and above `high`."""
    if log:
        return low / 1.1, high * 1.1
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room if low < 0 or low - room > 0 else min(low, 0.0), high + room


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def short(value: float) -> str:
    """A value with at most three significant digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"

"""Small line charts as SVG: a series, the band that it should keep to, and where it left it.

They take their colours from the page that they stand in (classes `line`, `band`, `grid`, `out`), so
that one drawing serves light and dark, and they scale with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import NamedTuple

from distill.report.curves import Band

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20  # margins, for the numbers at the axes
ROOM = 3.0  # of the line's own range, for its band on either side
POINTS = 240  # a longer series is thinned: a screen shows no more


class Point(NamedTuple):
    step: int
    value: float


class Axes(NamedTuple):
    """From steps and values to places in the picture."""

    first: int
    last: int
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / max(self.last - self.first, 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value, low, high = min(max(value, self.low), self.high), self.low, self.high
        if self.log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


Edge = tuple[int, float, float]  # a step, and the band's lower and upper end there


def chart(title: str, series: Mapping[int, float], band: Band | None = None) -> str:
    """A line chart of step -> value with its band behind it, as an <svg> element.

    Values that are not finite are left out. The axis is logarithmic where all of it is positive and
    it spans more than a factor of twenty.
    """
    points = thinned([Point(s, v) for s, v in sorted(series.items()) if math.isfinite(v)])
    if not points:
        return ""
    edges = edges_of(points, band)
    axes = axes_of(points, edges)
    parts = [*frame(axes), *curve(points, edges, axes)]
    label = f"{title}: {short(points[0].value)} at first, {short(points[-1].value)} at the end"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def edges_of(points: list[Point], band: Band | None) -> list[Edge]:
    """The band up to the last point; not below zero where the points are not, as norms are."""
    edges = [
        (step, *bounds)
        for step in (band.steps if band else ())
        if step <= points[-1].step and (bounds := band.at(step)) is not None  # pyright: ignore
    ]
    if min(p.value for p in points) >= 0:
        edges = [(step, max(bottom, 0.0), top) for step, bottom, top in edges]
    return edges


def axes_of(points: list[Point], edges: list[Edge]) -> Axes:
    """Axes that show all points, and what is near them of the band, which must not squeeze them."""
    low, high = min(p.value for p in points), max(p.value for p in points)
    first = points[0].step
    if edges:
        span = ROOM * (high - low or abs(high) or 1.0)
        low = min(low, max(min(e[1] for e in edges), low - span))
        high = max(high, min(max(e[2] for e in edges), high + span))
        first = min(first, *(e[0] for e in edges))
    log = low > 0 and high / low > 20
    return Axes(first, points[-1].step, *padded(low, high, log), log)


def frame(axes: Axes) -> Iterator[str]:
    """Three lines with their values, and the first and the last step."""
    low, high = axes.low, axes.high
    for value in (low, math.sqrt(low * high) if axes.log else (low + high) / 2, high):
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" {at(axes.y(value))}/>'
        yield text(LEFT - 5, axes.y(value) + 3, short(value), "end")
    yield text(LEFT, HEIGHT - 5, f"{axes.first:,}", "start")
    yield text(WIDTH - RIGHT, HEIGHT - 5, f"step {axes.last:,}", "end")


def curve(points: list[Point], edges: list[Edge], axes: Axes) -> Iterator[str]:
    """The band, the line on it, and a dot where the line is outside."""
    x, y = axes.x, axes.y
    if len(edges) > 1:
        there = [f"{x(s):.1f},{y(hi):.1f}" for s, _, hi in edges]
        back = [f"{x(s):.1f},{y(lo):.1f}" for s, lo, _ in reversed(edges)]
        yield f'<polygon class="band" points="{" ".join(there + back)}"/>'
    path = " ".join(f"{x(p.step):.1f},{y(p.value):.1f}" for p in points)
    yield f'<polyline class="line" points="{path}"/>'
    if len(points) == 1:
        yield f'<circle class="band" cx="{LEFT}" cy="{y(points[0].value):.1f}" r="3"/>'
    bounds = {step: (lo, hi) for step, lo, hi in edges}
    for p in points:
        lo, hi = bounds.get(p.step, (-math.inf, math.inf))
        if not lo <= p.value <= hi:
            yield f'<circle class="out" cx="{x(p.step):.1f}" cy="{y(p.value):.1f}" r="2.5"/>'


def thinned(points: list[Point]) -> list[Point]:
    """At most about POINTS of them, the last among them."""
    every = max(1, -(-len(points) // POINTS))
    return points[::every] + (points[-1:] if (len(points) - 1) % every else [])


def padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """The ends of an axis on which low to high has a little room."""
    if log:
        return low / 1.1, high * 1.1
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room if low < 0 or low - room > 0 else min(low, 0.0), high + room


def at(y: float) -> str:
    return f'y1="{y:.1f}" y2="{y:.1f}"'


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def short(value: float) -> str:
    """Three digits at most, as few as say it."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"

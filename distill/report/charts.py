"""Small line charts as SVG: a series, the band that it should keep to, and where it left it.

They take their colours from the page that they stand in (classes `line`, `band`, `grid`, `out`), so
that one drawing serves light and dark, and they scale with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def chart(title: str, series: Mapping[int, float], band: Band | None = None) -> str:
    """A line chart of step -> value with its band behind it, as an <svg> element.

    Values that are not finite are left out. The axis is logarithmic where all of it is positive and
    it spans more than a factor of twenty.
    """
    points = thinned([Point(s, v) for s, v in sorted(series.items()) if math.isfinite(v)])
    if not points:
        return ""
    last = points[-1].step
    edges = [
        (step, *bounds)
        for step in (band.steps if band else ())
        if step <= last and (bounds := band.at(step)) is not None  # pyright: ignore
    ]
    # the band must not squeeze the line: only its part near the line's own range is shown
    low, high = min(p.value for p in points), max(p.value for p in points)
    if edges:
        if low >= 0:  # as norms are, and no band of them goes below
            edges = [(step, max(bottom, 0.0), top) for step, bottom, top in edges]
        span = ROOM * (high - low or abs(high) or 1.0)
        low = min(low, max(min(e[1] for e in edges), low - span))
        high = max(high, min(max(e[2] for e in edges), high + span))
    log = low > 0 and high / low > 20
    low, high = padded(low, high, log)
    first = min(points[0].step, *(e[0] for e in edges)) if edges else points[0].step

    def x(step: float) -> float:
        return LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        value = min(max(value, low), high)
        share = (
            math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        )
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in (low, math.sqrt(low * high) if log else (low + high) / 2, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" {at(y(value))}/>')
        parts.append(text(LEFT - 5, y(value) + 3, short(value), "end"))
    parts.append(text(LEFT, HEIGHT - 5, f"{first:,}", "start"))
    parts.append(text(WIDTH - RIGHT, HEIGHT - 5, f"step {last:,}", "end"))
    if len(edges) > 1:
        there = [f"{x(s):.1f},{y(hi):.1f}" for s, _, hi in edges]
        back = [f"{x(s):.1f},{y(lo):.1f}" for s, lo, _ in reversed(edges)]
        parts.append(f'<polygon class="band" points="{" ".join(there + back)}"/>')
    path = " ".join(f"{x(p.step):.1f},{y(p.value):.1f}" for p in points)
    parts.append(f'<polyline class="line" points="{path}"/>')
    if len(points) == 1:
        parts.append(f'<circle class="band" cx="{LEFT}" cy="{y(points[0].value):.1f}" r="3"/>')
    bounds_at = {step: (lo, hi) for step, lo, hi in edges}
    for p in points:
        lo, hi = bounds_at.get(p.step, (-math.inf, math.inf))
        if not lo <= p.value <= hi:
            parts.append(
                f'<circle class="out" cx="{x(p.step):.1f}" cy="{y(p.value):.1f}" r="2.5"/>'
            )
    label = f"{title}: {short(points[0].value)} at first, {short(points[-1].value)} at the end"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


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

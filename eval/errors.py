"""The error of metrics and protocols."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MetricError(ValueError):
    """Invalid input to a metric or protocol; the message is one line that names the remedy."""


def unknown(kind: str, name: str, known: Iterable[str]) -> MetricError:
    """The error for an unknown name; it suggests the nearest known name, or lists all."""
    known = sorted(known)
    close = get_close_matches(name, known, 1, 0.6)
    remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return MetricError(f"{kind} {name!r} is unknown; {remedy}")

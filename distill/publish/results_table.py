"""A run's figures as rows of a table: their names, their order, and which of them is best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from eval import catalogue

SPREAD = "± is the standard deviation over seeds"


class Row(NamedTuple):
    """One sampler's figures.

    ours: Whether it is the student.
    evaluations: Of a network, for one picture.
    """

    name: str
    ours: bool
    figures: Mapping[str, Any]
    evaluations: float


def rows_of(metrics: Mapping[str, Any]) -> list[Row]:
    """The student's step counts, the teacher at its full steps, and at few, where measured."""
    rows = [
        Row(f"student, {steps_of([k])}", True, v, v.get("evaluations", int(k)))
        for k, v in metrics["student"].items()
    ]
    taught = [full] if (full := metrics.get("teacher")) else []
    taught += metrics.get("teacher_few", {}).values()
    for v in taught:
        k = v["steps"]
        name = f"teacher, {k} {v['solver']} step{'s' * (k != 1)}"
        rows.append(Row(name, False, v, v.get("evaluations", v["steps"])))
    return rows


def steps_of(counts: Iterable[Any]) -> str:
    """1 step; 1, 2 or 4 steps."""
    *most, last = map(str, sorted(map(int, counts)))
    return f"{', '.join(most)} or {last} steps" if most else f"{last} step{'s' * (last != '1')}"


def advised(counts: Iterable[int], summary: Mapping[str, Any]) -> int:
    """The step count to use a student in: what measured best, or the most where none was."""
    found = best(summary.get("metrics"))
    return max(counts) if found is None else int(found)


def many(n: int, noun: str) -> str:
    """1 seed; 3 seeds."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def best(metrics: Mapping[str, Any] | None) -> str | None:
    """The student's step count with the best of the first figure; None where none was measured."""
    found = (metrics or {}).get("student", {})
    measured = [k for row in found.values() for k in catalogue.columns(row)]
    key = next((k for k in measured if all(k in row for row in found.values())), None)
    if key is None:
        return None
    sign = 1 if catalogue.lower_is_better(key) else -1
    return min(found, key=lambda k: sign * found[k][key])

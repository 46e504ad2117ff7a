"""A run's metrics as table rows: column heads, row names, and the best step count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from eval import catalogue
from teachers.errors import plural

SPREAD = "± is the standard deviation over seeds"


class Row(NamedTuple):
    """The metrics of one sampler.

    Attributes:
        is_student: False for the teacher.
        evaluations: Network evaluations for one image.
    """

    name: str
    is_student: bool
    figures: Mapping[str, Any]
    evaluations: float


def rows_of(metrics: Mapping[str, Any]) -> list[Row]:
    """A row for each of the student's step counts, then the teacher's: its full steps, then few."""
    rows = [
        Row(f"student, {steps_of([k])}", True, v, v.get("evaluations", int(k)))
        for k, v in metrics["student"].items()
    ]
    teacher_rows = [full] if (full := metrics.get("teacher")) else []
    teacher_rows += metrics.get("teacher_few", {}).values()
    for v in teacher_rows:
        k = v["steps"]
        name = f"teacher, {k} {v['solver']} {plural(k, 'step')}"
        rows.append(Row(name, False, v, v.get("evaluations", v["steps"])))
    return rows


def steps_of(counts: Iterable[Any]) -> str:
    """ "1 step", or "1, 2 or 4 steps"."""
    *others, last = map(str, sorted(map(int, counts)))
    return f"{', '.join(others)} or {last} steps" if others else f"{last} step{'s' * (last != '1')}"


def advised(counts: Iterable[int], summary: Mapping[str, Any]) -> int:
    """The recommended step count: the best one measured, or the largest if none was measured."""
    steps = best(summary.get("metrics"))
    return max(counts) if steps is None else int(steps)


def many(n: int, noun: str) -> str:
    """ "1 seed", or "3 seeds"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def best(metrics: Mapping[str, Any] | None) -> str | None:
    """The student's step count with the best of the first figure; None where none was measured."""
    rows = (metrics or {}).get("student", {})
    measured = [k for row in rows.values() for k in catalogue.columns(row)]
    key = next((k for k in measured if all(k in row for row in rows.values())), None)
    if key is None:
        return None
    sign = 1 if catalogue.lower_is_better(key) else -1
    return min(rows, key=lambda k: sign * rows[k][key])

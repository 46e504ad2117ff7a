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
    steps = best(summary.get("metrics"), summary.get("held_out"))
    return max(counts) if steps is None else int(steps)


def many(n: int, noun: str) -> str:
    """ "1 seed", or "3 seeds"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def best(
    metrics: Mapping[str, Any] | None, held_out: Mapping[str, bool] | None = None
) -> str | None:
    """The student's step count with the best of the headline figure; None where there is none."""
    rows = (metrics or {}).get("student", {})
    if (key := headline_figure(metrics, held_out)) is None:
        return None
    sign = 1 if catalogue.lower_is_better(key) else -1
    return min(rows, key=lambda k: sign * rows[k][key])


def headline_figure(
    metrics: Mapping[str, Any] | None, held_out: Mapping[str, bool] | None = None
) -> str | None:
    """The first figure of all the student's rows that is held out; None where there is none.

    Args:
        held_out: As summaries have it; figures that are not in it are held out.
    """
    rows = (metrics or {}).get("student", {})
    measured = [k for row in rows.values() for k in catalogue.columns(row)]
    held = [k for k in measured if (held_out or {}).get(k, True)]
    return next((k for k in held if all(k in row for row in rows.values())), None)


def not_held_out(summary: Mapping[str, Any]) -> str:
    """What is not held out from training, in one sentence; empty where all is."""
    held_out, used = summary.get("held_out", {}), summary.get("used_networks", ())
    lost = [catalogue.label(key) for key, is_held in held_out.items() if not is_held]
    if not lost:
        return ""
    verb, networks = "is" if len(lost) == 1 else "are", ", ".join(sorted(used))
    return (
        f"Not held out, since training used the network that reads them ({networks}), {verb} "
        f"{', '.join(lost)}."
    )

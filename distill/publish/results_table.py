"""A run's figures as rows of a table: their names, their order, and which of them is best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from teachers.text import plural

# Metrics by the heads that tables give them; the first that a protocol has orders rows.
FIGURES = {
    "fd": "Fréchet distance",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "accuracy": "label accuracy",
    "caption_accuracy": "caption accuracy",
    "clip_score": "CLIP score",
}
LOWER = {"fd", "fid"}  # those of which less is better
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
        name = f"teacher, {k} {v['solver']} {plural(k, 'step')}"
        rows.append(Row(name, False, v, v.get("evaluations", v["steps"])))
    return rows


def steps_of(counts: Iterable[Any]) -> str:
    """1 step; 1, 2 or 4 steps."""
    *most, last = map(str, sorted(map(int, counts)))
    return f"{', '.join(most)} or {last} steps" if most else f"{last} {plural(int(last), 'step')}"


def advised(counts: Iterable[int], summary: Mapping[str, Any]) -> int:
    """The step count to use a student in: what measured best, or the most where none was."""
    found = best(summary.get("metrics"))
    return max(counts) if found is None else int(found)


def many(n: int, noun: str) -> str:
    """1 seed; 3 seeds."""
    return f"{n:,} {plural(n, noun)}"


def best(metrics: Mapping[str, Any] | None) -> str | None:
    """The student's step count with the best of the first figure; None where none was measured."""
    found = (metrics or {}).get("student", {})
    key = next((k for k in FIGURES if all(k in row for row in found.values())), None)
    if not found or key is None:
        return None
    return min(found, key=lambda k: found[k][key] if key in LOWER else -found[k][key])

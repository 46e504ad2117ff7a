"""What a tuning kept and gained, as a card and a page show it; docs/tuning.md has the meanings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.publish.results_table import many, steps_of
from teachers.errors import intact
from teachers.storage.files import read_json

FILE = "tune.json"  # in the run of a tuned student
HEADS = ("steps kept", "worth the teacher's steps", "concept gained", "gained by the teacher")


class Tuning(NamedTuple):
    """A sentence on how the student was tuned, and a row of cells for each step count."""

    sentence: str
    rows: list[tuple[str, list[str]]]


def tuning_of(run: Path) -> Tuning | None:
    """The figures of a tuned student's run; None for a student that was not tuned.

    Raises:
        UserError: the file of the figures is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return None
    figures = read_json(path, str(path))
    with intact(path):
        most = int(figures["teacher_steps"])
        sentence = (
            f"Tuned on {many(int(figures['pictures']), 'picture')} (method {figures['method']}). "
            f"Steps kept: 1 is as good as the tuned teacher in {most} steps, 0 as if never "
            "distilled. Concept gained: the share of the distance to the pictures that is gone."
        )
        students = figures["students"]
        rows = [(steps_of([int(k)]), cells(row, most)) for k, row in students.items()]
    return Tuning(sentence, rows)


def cells(row: Mapping[str, Any], most: int) -> list[str]:
    """The figures at one step count, in the order of HEADS."""
    equal, gained = row["teacher_equivalent_steps"], row["concept_gained"]
    worth = f"more than {most}" if equal is None else str(int(equal))
    return [
        number(row["steps_kept"]), worth, number(gained["student"]), number(gained["teacher"])
    ]  # fmt: skip


def number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"

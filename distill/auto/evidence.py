"""What this project measured: rows of its benches and recipes, and how they rank.

The rows are in evidence.json, which `benchmarks/tables.py` makes of docs/results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eval import catalogue

FILE = Path(__file__).with_suffix(".json")
KINDS = {"digits": "labels", "shapes": "text", "analytic:gaussian": "none"}  # of each bench's model


@dataclass(frozen=True)
class Evidence:
    """A recipe, with keys to change, that was trained and measured at one number of steps.

    Args:
        model: The teacher, such as "digits".
        name: Of the bench's row, or the recipe.
        recipe: The shipped recipe; None where `changes` hold all keys.
        steps: Of sampling.
        trained: Steps of training.
        evaluations, seconds: What the training took.
        seeds: Of training.
        figures: By metric, the mean and its spread.
        source: The results that it is from.
        ranked_by: The metric that ranks this model's students.
    """

    model: str
    name: str
    recipe: str | None
    changes: Mapping[str, Any]
    objective: str
    steps: int
    trained: int
    evaluations: int
    seconds: int
    seeds: int
    figures: Mapping[str, Sequence[float]]
    source: str
    ranked_by: str

    def text(self) -> str:
        """The figure by which it ranks, such as "FD 0.176 ± 0.013"."""
        return figure_text(self.ranked_by, *self.figures[self.ranked_by])

    def loss(self, key: str) -> float:
        """A figure with the sign that is better where it is lower."""
        value = self.figures[key][0]
        return -value if catalogue.CATALOGUE[key].better == "higher" else value


def figure_text(key: str, mean: float, spread: float) -> str:
    """A figure and its spread; shares of captions in per cent."""
    if key == "accuracy":
        return f"{100 * mean:.1f} ± {100 * spread:.1f} % right"
    return f"{catalogue.short(key)} {mean:.3g} ± {spread:.2g}"


@cache
def rows(path: Path = FILE) -> tuple[Evidence, ...]:
    """All rows of the file."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    ranked = tree["ranked_by"]
    return tuple(
        Evidence(**{k: v for k, v in row.items() if k != "from"}, source=row["from"],
                 ranked_by=ranked[row["model"]])
        for row in tree["rows"]
    )  # fmt: skip


def best(found: Iterable[Evidence]) -> list[Evidence]:
    """The best row first, then those that differ from it by no more than its spread.

    A row's own spread does not count: one that trains well or badly by its seed is no tie.

    Of these ties the one of fewest steps of sampling comes first; then a recipe as it is shipped,
    then the one of lower distance, and then the one that took fewer evaluations.
    """
    found = list(found)
    if not found:
        return []
    key = found[0].ranked_by
    top = min(found, key=lambda row: row.loss(key))

    def is_tie(row: Evidence) -> bool:
        return row.loss(key) - top.loss(key) <= top.figures[key][1]

    ties = [row for row in found if is_tie(row)]

    def order(row: Evidence) -> tuple[int, bool, float, int]:
        return row.steps, bool(row.changes), row.figures["fd"][0], row.evaluations

    return sorted(ties, key=order)


def of_model(model: str, steps: int | None = None) -> list[Evidence]:
    """The rows of a model, at one number of steps or at all."""
    return [row for row in rows() if row.model == model and steps in (None, row.steps)]


def of_kind(kind: str) -> str:
    """The bench's model whose prompts are of this kind: "text", "labels" or "none"."""
    known = {v: k for k, v in KINDS.items() if k != "analytic:gaussian"}
    return known.get(kind, "digits")

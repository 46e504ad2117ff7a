"""Training curves, and their bands over known-good runs of the same recipe.

A reference holds the lowest and the highest value of each series at each logged step, over a few
runs of one recipe with different seeds. A run is compared with the reference of its own recipe;
only the seed, `eval` keys and what no weight depends on may differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distill.config.compare import differences
from distill.config.recipe import SHIPPED, Recipe, read_yaml
from distill.config.renamed import current_names
from teachers.errors import UserError, nearest

REFERENCES = SHIPPED / "curves"
MARGIN = 0.5  # a band is wider than its few runs by this factor of its larger end
LEFT_OUT = ("/lr",)  # series that the recipe fixes
MACHINE = ("speed/", "memory/")  # series of the machine, not of the run
# What reading and using damaged JSON raises.
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

Series = dict[str, dict[int, float]]  # name -> step -> value


@dataclass(frozen=True)
class Band:
    """The lowest and highest value of one series over the reference runs, at each of `steps`."""

    steps: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def at(self, step: int) -> tuple[float, float] | None:
        """The bounds at a step, with the margin; None if the reference has no such step."""
        if step not in self.steps:
            return None
        i = self.steps.index(step)
        low, high = self.low[i], self.high[i]
        margin = MARGIN * max(abs(low), abs(high))
        return low - margin, high + margin


@dataclass(frozen=True)
class Reference:
    """The known-good runs of a recipe."""

    recipe: str
    runs: int
    bands: Mapping[str, Band]


@dataclass(frozen=True)
class Deviation:
    """A series outside its band: its first such step, and the one where it is farthest outside."""

    series: str
    first: int
    worst: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        side = self.high if self.value > self.high else self.low
        ratio = f"{self.value / side:.2g}× the reference" if side * self.value > 0 else (
            f"{self.value:.3g} against {self.low:.3g} to {self.high:.3g}"
        )  # fmt: skip
        since = f", outside since step {self.first}" if self.first < self.worst else ""
        return f"{self.series}: {ratio} at step {self.worst}{since}"


def series(run: Path) -> Series:
    """The logged series of a run by name and step; of a step logged twice, the last value counts.

    Raises:
        UserError: the run has no metrics.jsonl, or it is damaged.
    """
    path = run / "metrics.jsonl"
    series: Series = {}
    try:
        lines = [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        for line in lines:
            step = int(line["step"])
            for name, value in line.items():
                if name in ("step", "seconds") or name.endswith(LEFT_OUT):
                    continue
                if name.startswith(MACHINE):
                    continue
                series.setdefault(name, {})[step] = float(value)
    except FileNotFoundError:
        raise UserError(f"{run}: no metrics.jsonl there; give the folder of a run") from None
    except (OSError, *DAMAGED):
        raise UserError(
            f"{path}: damaged: not one JSON object a line; give another run's folder"
        ) from None
    return series


def recipe_tree(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run.

    Raises:
        UserError: it is missing or damaged; a file that was cut off lacks `train.seed`.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run}: no recipe.yaml there; give the folder of a run")
    tree = current_names(read_yaml(path), quiet=True)
    if not isinstance(train := tree.get("train"), dict) or "seed" not in train:
        raise UserError(f"{path}: damaged; it lacks train.seed; give another run's folder")
    return tree


def record(runs: Sequence[Path], name: str) -> dict[str, Any]:
    """Make a reference from runs of one recipe, as JSON for `recipes/curves`.

    Raises:
        UserError: the runs have different recipes, or no logged step in common.
    """
    trees = [recipe_tree(run) for run in runs]
    for run, tree in zip(runs, trees, strict=True):
        if key := next(changes(trees[0], tree), None):
            raise UserError(f"{run}: {key} differs from {runs[0]}; give runs of one recipe")
    runs_series = [series(run) for run in runs]
    bands = {}
    for key in runs_series[0]:
        shared = sorted(set.intersection(*(set(one.get(key, {})) for one in runs_series)))
        if shared:
            values = [[one[key][step] for one in runs_series] for step in shared]
            bands[key] = {
                "steps": shared,
                "low": [significant(min(v)) for v in values],
                "high": [significant(max(v)) for v in values],
            }
    if not bands:
        raise UserError(f"{runs[0]}: these runs have no logged step in common; give others")
    return {"recipe": name, "runs": len(runs), "bands": bands}


def significant(value: float) -> float:
    """The value rounded to four significant digits."""
    return float(f"{value:.4g}")


def references() -> dict[str, Path]:
    """The shipped references, by the names of their recipes."""
    files = sorted(REFERENCES.rglob("*.json"))
    return {p.relative_to(REFERENCES).with_suffix("").as_posix(): p for p in files}


def read(path: Path) -> Reference:
    """Read a reference from its file.

    Raises:
        UserError: the file cannot be read or is no reference.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        bands = {
            k: Band(tuple(v["steps"]), tuple(v["low"]), tuple(v["high"]))
            for k, v in tree["bands"].items()
        }
        return Reference(tree["recipe"], tree["runs"], bands)
    except OSError as error:
        raise UserError(
            f"reference {path}: cannot be read ({error.strerror}); give another file"
        ) from None
    except DAMAGED:
        raise UserError(
            f"reference {path}: damaged, or not a reference; give another file"
        ) from None


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """The keys in which two recipes differ and on which curves depend."""
    for key, _, _ in differences(a, b):
        if key != "train.seed" and not key.startswith("eval."):
            yield key


def match(tree: Mapping[str, Any]) -> Reference | None:
    """The shipped reference of this recipe; None if no shipped recipe equals it."""
    for name, path in references().items():
        if next(changes(shipped_tree(name), tree), None) is None:
            return read(path)
    return None


@cache  # a page is made before training as well as after it
def shipped_tree(name: str) -> dict[str, Any]:
    """The shipped recipe of that name, with all defaults written out."""
    return Recipe.load(name).tree()


def reference_for(run: Path, name: str | None) -> Reference:
    """The reference to compare a run with.

    Args:
        name: A shipped reference, a file or another run's folder; None for the shipped reference of
            the run's recipe.

    Raises:
        UserError: there is no such reference.
    """
    if name is None:
        if (reference := match(recipe_tree(run))) is None:
            raise UserError(
                f"{run}: no shipped reference is of its recipe; name one "
                f"({', '.join(references())}), or the folder of a good run"
            )
        return reference
    if name in (known := references()):
        return read(known[name])
    path = Path(name)
    if path.is_dir():
        tree = record([path], str(path))
        bands = {k: Band(*(tuple(v[s]) for s in v)) for k, v in tree["bands"].items()}
        return Reference(str(path), 1, bands)
    if path.is_file():
        return read(path)
    raise UserError(f"reference {name!r}: unknown; {nearest(name, known)}")


def deviations(run: Series, reference: Reference) -> list[Deviation]:
    """The series that leave their bands, the earliest first."""
    deviations = []
    for name, band in reference.bands.items():
        outside = []
        for step, value in sorted(run.get(name, {}).items()):
            bounds = band.at(step)
            if bounds is not None and not bounds[0] <= value <= bounds[1]:
                i = band.steps.index(step)
                distance = max(bounds[0] - value, value - bounds[1])
                outside.append((distance, step, value, band.low[i], band.high[i]))
        if outside:
            _, worst, value, low, high = max(outside)
            deviations.append(Deviation(name, min(o[1] for o in outside), worst, value, low, high))
    return sorted(deviations, key=lambda d: d.first)


def shared_steps(run: Series, reference: Reference) -> int:
    """How many logged steps of the run the reference has too."""
    steps = {s for name, b in reference.bands.items() for s in b.steps if s in run.get(name, {})}
    return len(steps)

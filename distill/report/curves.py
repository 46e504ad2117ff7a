"""Training curves, and the bands that known-good runs of the same recipe keep to.

A reference is a few runs of one recipe, with different seeds, in compact form: at each logged step
the lowest and the highest value of each series. A run is compared with the one whose recipe is its
own but for what no weight depends on, its seed and where its data lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config.compare import differences
from distill.config.recipe import SHIPPED, Recipe, read_yaml
from distill.config.renamed import current_names
from teachers.errors import UserError, nearest

REFERENCES = SHIPPED / "curves"
WIDER = 1.5  # a band reaches this factor beyond what its few seeds showed
LEFT_OUT = ("/lr",)  # what the recipe itself fixes
# What JSON that is not what it should be raises, as it is read and as it is used.
NOT_THESE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

Series = dict[str, dict[int, float]]  # name -> step -> value


@dataclass(frozen=True)
class Band:
    """Where one series of the reference runs lay, at each of `steps`."""

    steps: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def at(self, step: int) -> tuple[float, float] | None:
        """The lowest and highest value that is in order at a step; None where there is none."""
        if step not in self.steps:
            return None
        i = self.steps.index(step)
        low, high = self.low[i], self.high[i]
        slack = (WIDER - 1) * max(abs(low), abs(high))
        return low - slack, high + slack


@dataclass(frozen=True)
class Reference:
    """The known-good runs of a recipe."""

    recipe: str
    runs: int
    bands: Mapping[str, Band]


@dataclass(frozen=True)
class Deviation:
    """Where a series first left its band, and where it was farthest outside."""

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
    """The logged series of a run, by name and step; a step logged twice counts as it was last.

    Raises:
        UserError: the run has no metrics.jsonl, or it is damaged.
    """
    path = run / "metrics.jsonl"
    found: Series = {}
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
                found.setdefault(name, {})[step] = float(value)
    except FileNotFoundError:
        raise UserError(f"{run}: no metrics.jsonl there; give the folder of a run") from None
    except (OSError, *NOT_THESE):
        raise UserError(f"{path}: damaged; it holds a line of JSON for each logged step") from None
    return found


def recipe_tree(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run.

    Raises:
        UserError: there is none, or it is damaged: one that was cut off ends before `train.seed`.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run}: no recipe.yaml there; give the folder of a run")
    tree = current_names(read_yaml(path), quiet=True)
    if not isinstance(train := tree.get("train"), dict) or "seed" not in train:
        raise UserError(f"{path}: damaged: it lacks train.seed")
    return tree


def record(runs: Sequence[Path], name: str) -> dict[str, Any]:
    """The reference that these runs of one recipe make, as it is kept in `recipes/curves`.

    Raises:
        UserError: they are of different recipes, or share no logged step.
    """
    trees = [recipe_tree(run) for run in runs]
    for run, tree in zip(runs, trees, strict=True):
        if key := next(changes(trees[0], tree), None):
            raise UserError(f"{run}: {key} differs from {runs[0]}; a reference is of one recipe")
    logged = [series(run) for run in runs]
    bands = {}
    for key in logged[0]:
        shared = sorted(set.intersection(*(set(one.get(key, {})) for one in logged)))
        if shared:
            values = [[one[key][step] for one in logged] for step in shared]
            bands[key] = {
                "steps": shared,
                "low": [significant(min(v)) for v in values],
                "high": [significant(max(v)) for v in values],
            }
    if not bands:
        raise UserError(f"{runs[0]}: these runs share no logged step")
    return {"recipe": name, "runs": len(runs), "bands": bands}


def significant(value: float) -> float:
    """Four digits, which is more than a curve needs."""
    return float(f"{value:.4g}")


def references() -> dict[str, Path]:
    """The references that are shipped, by their recipes' names."""
    files = sorted(REFERENCES.rglob("*.json"))
    return {p.relative_to(REFERENCES).with_suffix("").as_posix(): p for p in files}


def read(path: Path) -> Reference:
    """A reference from its file.

    Raises:
        UserError: it is not one.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        bands = {
            k: Band(tuple(v["steps"]), tuple(v["low"]), tuple(v["high"]))
            for k, v in tree["bands"].items()
        }
        return Reference(tree["recipe"], tree["runs"], bands)
    except OSError as error:
        raise UserError(f"reference {path}: {error.strerror}") from None
    except NOT_THESE:
        raise UserError(f"reference {path}: damaged, or not one") from None


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """The keys in which two recipes differ that a curve depends on."""
    for key, _, _ in differences(a, b):
        if key != "train.seed" and not key.startswith("eval."):
            yield key


def match(tree: Mapping[str, Any]) -> Reference | None:
    """The shipped reference of the shipped recipe that this one is, if there is one."""
    for name, path in references().items():
        if next(changes(Recipe.load(name).tree(), tree), None) is None:
            return read(path)
    return None


def reference_for(run: Path, name: str | None) -> Reference:
    """The reference of a shipped name, a file, or another run's folder; by default the run's own.

    Raises:
        UserError: there is none.
    """
    if name is None:
        if (found := match(recipe_tree(run))) is None:
            raise UserError(
                f"{run}: no reference is of its recipe (there are {', '.join(references())}); "
                "name a good run's folder to compare it with"
            )
        return found
    if name in (known := references()):
        return read(known[name])
    path = Path(name)
    if path.is_dir():
        made = record([path], str(path))
        bands = {k: Band(*(tuple(v[s]) for s in v)) for k, v in made["bands"].items()}
        return Reference(str(path), 1, bands)
    if path.is_file():
        return read(path)
    raise UserError(f"reference {name!r} is unknown: {nearest(name, known)}")


def deviations(found: Series, reference: Reference) -> list[Deviation]:
    """Where the series leave their bands, the earliest first."""
    left = []
    for name, band in reference.bands.items():
        outside = []
        for step, value in sorted(found.get(name, {}).items()):
            bounds = band.at(step)
            if bounds is not None and not bounds[0] <= value <= bounds[1]:
                i = band.steps.index(step)
                distance = max(bounds[0] - value, value - bounds[1])
                outside.append((distance, step, value, band.low[i], band.high[i]))
        if outside:
            _, worst, value, low, high = max(outside)
            left.append(Deviation(name, min(o[1] for o in outside), worst, value, low, high))
    return sorted(left, key=lambda d: d.first)


def shared_steps(found: Series, reference: Reference) -> int:
    """How many steps of the run the reference speaks of."""
    steps = {s for name, b in reference.bands.items() for s in b.steps if s in found.get(name, {})}
    return len(steps)

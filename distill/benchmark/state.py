"""The files of a benchmark's folder, read and checked when it is run again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distill.training.run_folder import LOCK
from eval import catalogue
from teachers.errors import UserError

STATE = "state.json"
FOLDERS = ("recipes", "runs", "logs")
FILES = ("leaderboard.json", "leaderboard.md", "runs.json", "quality-steps.png",
         "quality-cost.png", "diversity.png", "cost.png")  # fmt: skip
COSTS = ("steps", "network_evaluations", "wall_s", "peak_memory_gb")


def check_folder(out: Path) -> None:
    """Refuse a folder that is no benchmark's, or in which a file's or folder's place is taken.

    Raises:
        UserError: naming the folder.
    """
    try:
        names = {p.name for p in out.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give another folder") from None
    ours = LOCK in names and "recipe.yaml" not in names
    if not ours and any(not name.startswith(".") for name in names):
        raise UserError(f"--out {out}: it exists and is not a benchmark; give a new folder")
    for name in names.intersection(FOLDERS):
        if not (out / name).is_dir():
            raise UserError(f"--out {out}: {name} should be a folder; move it away")
    for name in names.intersection(FILES):
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {name} should be a file; move it away")


def table(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the benchmark's.

    Raises:
        UserError: it is damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise damaged(path)
    return tree


def damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged; delete it, and run again")


def states(path: Path) -> dict[str, dict[str, Any]]:
    """By run, the hash of its row and why it failed.

    Raises:
        UserError: the file is damaged.
    """
    tree = table(path)
    for state in tree.values():
        if not isinstance(state, dict) or state.keys() != {"row", "failed"}:
            raise damaged(path)
        if not isinstance(state["row"], str) or not isinstance(state["failed"], str | None):
            raise damaged(path)
    return tree


def measured(figures: Any) -> bool:
    """Whether a protocol's figures have a distance, and it and its spread are finite numbers."""
    if not isinstance(figures, dict):
        return False
    keys = [k for k in catalogue.columns(figures) if catalogue.lower_is_better(k)]
    distances = [figures[k] for k in keys]
    spread = figures.get("spread", {})  # what was computed in closed form has none
    if not distances or not isinstance(spread, dict):
        return False
    return all(isinstance(v, float) and math.isfinite(v) for v in (*distances, *spread.values()))


def whole(summary: dict[str, Any]) -> bool:
    """Whether a run's summary has every figure that a leaderboard shows."""
    costs, metrics = [summary.get(k) for k in COSTS], summary["metrics"]
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in costs):
        return False
    student = metrics.get("student") if isinstance(metrics, dict) else None
    if not isinstance(student, dict) or not student:
        return False
    return all(k.isdecimal() and measured(v) for k, v in student.items())

"""What a benchmark keeps in its folder, read back by its next call: sound, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distill.training.run_folder import LOCK
from teachers.errors import UserError

STATE = "state.json"
FOLDERS = ("recipes", "runs", "logs")
FILES = ("leaderboard.json", "leaderboard.md", "quality-steps.png", "quality-cost.png",
         "diversity.png", "cost.png")  # fmt: skip
DISTANCES = ("fd", "fid")  # every protocol has one of them, and it orders students
COSTS = ("steps", "network_evaluations", "wall_s", "peak_memory_gb")


def check_folder(out: Path) -> None:
    """Refuse a folder of something else, or one in which something is in a benchmark's way.

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
        raise UserError(f"--out {out} exists and is not a benchmark; give a new folder")
    for name in names.intersection(FOLDERS):
        if not (out / name).is_dir():
            raise UserError(f"--out {out}: {name} should be a folder; move it away")
    for name in names.intersection(FILES):
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {name} should be a file; move it away")


def table(path: Path) -> dict[str, Any]:
    """A JSON object that a benchmark keeps.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise damaged(path)
    return found


def damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged; delete it, and what it kept is found out again")


def states(path: Path) -> dict[str, dict[str, Any]]:
    """By run, which row it is of and why it failed.

    Raises:
        UserError: it is damaged.
    """
    found = table(path)
    for known in found.values():
        if not isinstance(known, dict) or known.keys() != {"row", "failed"}:
            raise damaged(path)
        if not isinstance(known["row"], str) or not isinstance(known["failed"], str | None):
            raise damaged(path)
    return found


def measured(figures: Any) -> bool:
    """Whether a protocol's figures have a distance, and it and its spread are numbers."""
    if not isinstance(figures, dict):
        return False
    found = {k: figures[k] for k in DISTANCES if k in figures}
    spread = figures.get("spread", {})  # what was computed in closed form has none
    if not found or not isinstance(spread, dict):
        return False
    return all(
        isinstance(v, float) and math.isfinite(v) for v in (*found.values(), *spread.values())
    )


def whole(summary: dict[str, Any]) -> bool:
    """Whether a run's summary has what a leaderboard shows of it."""
    costs, metrics = [summary.get(k) for k in COSTS], summary["metrics"]
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in costs):
        return False
    student = metrics.get("student") if isinstance(metrics, dict) else None
    if not isinstance(student, dict) or not student:
        return False
    return all(k.isdecimal() and measured(v) for k, v in student.items())

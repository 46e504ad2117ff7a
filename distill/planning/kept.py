"""Plans that were made on this machine, kept for the runs of the same recipe.

A plan takes up to a minute, so a run makes none of its own: it reads what `distill plan` has kept.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import distill
from distill.config.recipe import Recipe
from distill.files import stamps, write
from distill.planning.plan import Plan
from teachers.storage.files import home

FREE = ("eval", "export")  # sections of a recipe that change no step
FREE_KEYS = ("steps", "hours", "seed", "log_every", "save_every", "sample_every", "keep",
             "trackers")  # fmt: skip


def place_of(recipe: Recipe) -> Path:
    """The file of a recipe's plan, in the folder of all caches."""
    tree = {k: v for k, v in recipe.tree().items() if k not in FREE}
    tree["train"] = {k: v for k, v in tree["train"].items() if k not in FREE_KEYS}
    files = stamps(recipe.teacher.source)
    text = json.dumps([distill.__version__, tree, files], sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return home(recipe.data.cache, "data.cache") / "plans" / f"{name}.json"


def keep(recipe: Recipe, plan: Plan) -> None:
    """Write a plan's peak where runs of the recipe find it; a folder that refuses it costs none."""
    place = place_of(recipe)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write(place, json.dumps({"peak_gb": plan.peak}) + "\n")
    except OSError:
        return


def peak_gb(recipe: Recipe) -> float | None:
    """The planned peak in training, in GB; None if no plan was made."""
    try:
        return float(json.loads(place_of(recipe).read_text(encoding="utf-8"))["peak_gb"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

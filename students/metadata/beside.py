"""What lies beside a student's own weights, whose header says nothing: fewstep.json, config.json.

A student's folder is loaded by diffusers, so its weight files have no header of ours. The file
beside them has the student's steps and times.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from teachers.errors import UserError
from teachers.storage.files import read_json

SIDECAR = "fewstep.json"  # of a diffusers folder, beside the folders of its parts
NETWORKS = ("unet", "transformer")  # folders of a diffusers folder that hold its network
SAMPLER = "sampler.py"  # beside model.safetensors, in the folder of a network of the user's own
Facts = dict[str, Any]


def facts_beside(path: Path) -> tuple[Facts, str]:
    """What the student's folder says of its network's file, and the name of the file that does.

    Empty for files that are not the network of a student of ours.

    Raises:
        UserError: the file beside it is damaged.
    """
    path = path.absolute()
    file = path.parent.parent / SIDECAR
    if path.parent.name in NETWORKS and file.is_file():
        return of_pipeline(read_json(file, str(file)), file), SIDECAR
    file = path.parent / "config.json"
    if path.name == "model.safetensors" and (path.parent / SAMPLER).is_file() and file.is_file():
        return of_own_network(read_json(file, str(file)), file), "config.json"
    return {}, ""


def of_pipeline(tree: Facts, file: Path) -> Facts:
    """The facts of a diffusers folder's sidecar."""
    counts, times = numbers(tree, "steps", file), numbers(tree, "times", file)
    recipe, adapters = tree.get("recipe") or {}, tree.get("adapters") or []
    if not isinstance(recipe, dict) or not isinstance(adapters, list):
        raise damaged(file, "recipe")
    objective = recipe.get("objective")
    scheduler = file.parent / "scheduler" / "scheduler_config.json"
    stock = read_json(scheduler, str(scheduler)) if scheduler.is_file() else {}
    return {
        "steps": sorted(counts, reverse=True),
        "sampler": sampler_of(tree),
        "scheduler": stock.get("_class_name"),
        "times": times,
        "cfg": 1.0,
        "base": name_of(str(tree.get("teacher", ""))),
        "contains": adapters,
        "objective": objective.get("name") if isinstance(objective, dict) else None,
    }


def of_own_network(tree: Facts, file: Path) -> Facts:
    """The facts of the config of a network of the user's own."""
    counts, chains = numbers(tree, "steps", file), tree.get("chains")
    try:
        times = [float(place["t"]) for place in chains[str(max(counts))]]  # pyright: ignore
    except (KeyError, TypeError, ValueError):
        raise damaged(file, "chains") from None
    return {
        "steps": sorted(counts, reverse=True),
        "sampler": f"{sampler_of(tree)} (sample() of {SAMPLER})",
        "times": times,
        "base": str(tree.get("teacher", "")),
    }


def sampler_of(tree: Facts) -> str:
    return "LCM: renoise between steps" if tree.get("renoise") else "Euler: the ODE"


def numbers(tree: Facts, key: str, file: Path) -> list[Any]:
    """A list of numbers.

    Raises:
        UserError: there is none.
    """
    values = tree.get(key)
    if not isinstance(values, list) or not values:
        raise damaged(file, key)
    if not all(type(v) in (int, float) for v in values):
        raise damaged(file, key)
    return values


def name_of(source: str) -> str:
    """A teacher as it may be shown: of a path in full its last part."""
    return PurePosixPath(source).name if source.startswith(("/", "~")) else source


def damaged(file: Path, key: str) -> UserError:
    return UserError(f"{file}: {key}: damaged; export the run again")

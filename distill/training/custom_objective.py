"""Objectives in a user's own file: called once before a run starts, and unchanged on resuming."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from copy import copy, deepcopy
from pathlib import Path

from accelerate import Accelerator

from distill.config.recipe import Recipe
from distill.config.schema import TrainSection
from distill.data.stream import Source
from distill.objectives.base import Objective
from distill.objectives.validate import check_loss
from distill.seeds import seed_all
from distill.training.engine import first_batch, shards_here, shards_of
from distill.training.player import Player
from teachers.errors import UserError

COPY = "objective.py"  # in the run's folder: the file when the run started


def file_of(recipe: Recipe) -> Path | None:
    """The file of an objective that is not one of the package's."""
    return Path(inspect.getfile(recipe.kind)) if ":" in recipe.objective["name"] else None


def keep(recipe: Recipe, out: Path) -> None:
    """Copy the objective's file to the run's folder."""
    if (file := file_of(recipe)) is not None:
        shutil.copyfile(file, out / COPY)


def check_same(recipe: Recipe, out: Path) -> None:
    """Refuse to resume with other code than the run was trained with.

    Raises:
        UserError: the objective's file differs from the copy.
    """
    file, saved = file_of(recipe), out / COPY
    if file is None or not saved.exists() or saved.read_bytes() == file.read_bytes():
        return
    raise UserError(
        f"--resume: {file} has changed since the run in {out} began; restore it from {saved}, or "
        "start in another folder"
    )


def rehearse(
    objective: Objective,
    players: Mapping[str, Player],
    source: Source,
    train: TrainSection,
    accelerator: Accelerator,
) -> None:
    """Compute the first turn's loss once, on its first batch, and restore the objective's state.

    Raises:
        UserError: the loss is not a `Loss` to descend. What the user's own code raises passes.
    """
    batch = first_batch(source, train, accelerator)
    first = shards_here(shards_of(train, accelerator.num_processes), accelerator)[0]
    before = deepcopy(objective.state_dict())  # a loss may change it in place
    seed_all(train.seed, "turns", 0, 0)
    turn = next(copy(objective).turns(0))
    moving = [players[name] for name in turn.players]
    try:
        for player in moving:
            player.requires_grad_(True)
        seed_all(train.seed, 0, 0, first)
        with accelerator.autocast():
            loss = turn.loss(batch)
        check_loss(loss, objective)
    finally:
        for player in moving:
            player.requires_grad_(False)
    objective.load_state_dict(before)

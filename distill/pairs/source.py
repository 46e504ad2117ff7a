"""Stored pairs as the data of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config.recipe import Recipe
from distill.data.cache import Cached
from distill.data.encode import device, split
from distill.data.stream import Items, Source
from distill.pairs.folder import ABOUT, NAMES, fill, opened, read_index
from distill.pairs.making import PATH
from distill.pairs.settings import (
    hash_of,
    identity,
    plain,
    prompts_of,
    settings_of,
    teacher_identity,
)
from teachers.errors import UserError, clipped
from teachers.storage.files import home
from teachers.teacher import Teacher

KEY = "data.path"
GIVEN = (
    "count",
    "solver",
    "steps",
    "inverted",
    "images",
    "states",
)  # keys that must agree with the folder
GB = 1e9


class Pairs:
    """The pairs of a recipe whose `data.source` is "pairs", named before they are made.

    Networks that share the teacher's weights change its layers, so the teacher is known by its
    weights as they are here; `source` may follow when such networks are there.

    Args:
        teacher: Unguided, and as it was loaded.

    Raises:
        UserError: the folder holds other pairs than the recipe asks for.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher) -> None:
        self.recipe, self.teacher = recipe, teacher
        self.known = teacher_identity(recipe.teacher, teacher)
        self.folder = folder_of(recipe, teacher, self.known)
        self.index = read_index(self.folder)
        if self.index is not None:
            self._check(self.index)

    def source(self) -> Source:
        """The pairs as training data; missing ones are made first.

        Raises:
            UserError: the folder holds half of them, or they cannot be written.
        """
        recipe, index = self.recipe, self.index
        asked = any(getattr(recipe.data, name) is not None for name in GIVEN)
        begun = (self.folder / ABOUT).exists()
        if recipe.data.path is None or (index is None and (asked or not begun)):
            self.teacher.denoiser.to(device())
            index = fill(self.folder, settings_of(recipe), self.teacher, KEY, self.known)
            self._check(index)
        if index is None:
            raise UserError(
                f"{KEY}: {clipped(str(self.folder))} is not finished; run the distill pairs that "
                "began it again, with the same options"
            )
        source = open_pairs(self.folder, index, recipe)
        if recipe.rewards:
            source.prompts = self._prompts(index)
        return source

    def _prompts(self, index: dict[str, Any]) -> list[Any] | None:
        """The prompt or label of each pair, or None where not all are known.

        They are known where the recipe names what the pairs were made of, and none is inverted.
        """
        settings = settings_of(self.recipe)
        if index.get("inverted") != 0:
            return None
        prompts = prompts_of(settings, self.teacher)
        if index.get("prompts") != hash_of(prompts):
            return None
        places: list[int] = []
        for entry in index["shards"]:
            with opened(self.folder / entry["file"]) as shard:
                places += shard.get_tensor("prompt").tolist()
        return [prompts[place] for place in places]

    def _check(self, index: dict[str, Any]) -> None:
        check_pairs(self.folder, index, self.recipe, self.known)
        check_prompts(self.folder, index, self.recipe, self.teacher)


def folder_of(recipe: Recipe, teacher: Teacher, known: dict[str, Any]) -> Path:
    """The folder that `data.path` names, or else one in the cache that is named by a hash.

    Args:
        known: The teacher's identity.
    """
    if recipe.data.path is not None:
        return home(recipe.data.path, KEY)
    settings = settings_of(recipe)
    settings.check(teacher)
    about = identity(settings, known, prompts_of(settings, teacher))
    text = json.dumps(about, sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return home(recipe.data.cache, "data.cache") / "pairs" / name


def check_pairs(folder: Path, index: dict[str, Any], recipe: Recipe, known: dict[str, Any]) -> None:
    """Refuse pairs of another teacher, guidance or shape, or made in another way than is asked for.

    Args:
        known: The teacher's identity.

    Raises:
        UserError: naming what differs.
    """
    where = f"{KEY}: the pairs in {clipped(str(folder))}"
    for name, value in known.items():
        if name != "teacher" and index.get(name) != value:
            shown = "" if name in ("weights", "levels") else f" {index.get(name)!r}, not {value!r}"
            raise UserError(
                f"{where} are of the teacher {clipped(str(index.get('teacher')))!r} with other "
                f"{name}{shown}; name that teacher, or make pairs of this one"
            )
    for name in GIVEN:
        value = getattr(recipe.data, name)
        value = plain(value) if name == "images" else value
        if value is not None and index.get(name) != value:
            raise UserError(
                f"data.{name}: {value!r}, and the pairs in {clipped(str(folder))} have "
                f"{index.get(name)!r}; remove the key, or give another data.path"
            )


def check_prompts(folder: Path, index: dict[str, Any], recipe: Recipe, teacher: Teacher) -> None:
    """Refuse pairs of other prompts than the recipe names.

    Raises:
        UserError: they have others.
    """
    if recipe.data.prompts is None and recipe.data.where is None:
        return
    settings = settings_of(recipe)
    settings.check(teacher)
    if index.get("prompts") != hash_of(prompts_of(settings, teacher)):
        key = "where" if recipe.data.prompts is None else "prompts"
        raise UserError(
            f"data.{key}: the pairs in {clipped(str(folder))} have other prompts; remove the "
            "key, or give another data.path"
        )


def open_pairs(folder: Path, index: dict[str, Any], recipe: Recipe) -> Source:
    """The pairs, in memory if they fit, else read from memory-mapped files."""
    files = [folder / entry["file"] for entry in index["shards"]]
    names = [*NAMES, *(f"cond.{k}" for k in index["conditions"])]
    names += [PATH] if recipe.kind.needs_states else []
    shape, seed = tuple(index["shape"]), recipe.train.seed
    size = sum(file.stat().st_size for file in files)
    if size > recipe.data.in_memory_gb * GB:
        source: Source = StoredPairs(files, names, shape, seed)
    else:
        parts: list[dict[str, Tensor]] = []
        for file in files:
            with opened(file) as shard:
                parts.append({k: shard.get_tensor(k) for k in names})
        tensors = {k: torch.cat([p[k] for p in parts]) for k in names}
        noise, path = tensors.pop("noise"), tensors.pop(PATH, None)
        x, cond = split(tensors)
        source = Source(shape, x, cond, seed, len(noise), noise, path)
    source.evaluations = int(index["evaluations"])
    return source


class StoredPairs(Cached):
    """Pairs in safetensors files."""

    def take(self, index: Tensor) -> Items:
        tensors = self.rows_of(index)
        noise, path = tensors.pop("noise"), tensors.pop(PATH, None)
        return Items(*split(tensors), noise, path)

"""What pairs are made of and how; all that decides their values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill.config.recipe import Recipe, shipped
from distill.config.schema import PAIRS, PairSolver, Place, TeacherSection, WhereSection
from distill.data.conditions.part import places_of
from distill.data.from_recipe import source_of
from distill.data.prompts import list_prompts
from distill.data.stream import Buckets, Source
from distill.sampling.discriminator import described
from distill.sampling.guided_teacher import guidance_of
from distill.sampling.identity import levels, weights_hash
from eval import shapes
from teachers.errors import UserError, clipped
from teachers.teacher import Teacher

COUNT, SOLVER, STEPS = 8192, "heun", 18  # of pairs, and of the teacher's sampler, by default


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made.

    count: Pairs of noise and the sample that the teacher makes of it.
    solver, steps: Of the guided teacher.
    inverted: Further pairs, of data and the noise that the ODE leads them to.
    images: The data of these, as `data.source` in a recipe.
    prompts: As `data.prompts`.
    seed: Of the noise; pair i depends on the seed and i alone.
    states: How many states of each trajectory are stored, at quadratic times; 0 stores none.
    where: As `data.where`.
    """

    teacher: TeacherSection
    count: int = COUNT
    solver: PairSolver = SOLVER
    steps: int = STEPS
    inverted: int = 0
    images: Place | None = None
    prompts: Place | None = None
    seed: int = 0
    states: int = 0
    where: WhereSection | None = None

    @property
    def total(self) -> int:
        return self.count + self.inverted

    def check(self, teacher: Teacher) -> None:
        """Refuse what cannot be made, before any work.

        Raises:
            UserError: naming the key.
        """
        if teacher.codec.pictures:
            raise UserError(
                f"teacher {clipped(teacher.source)!r}: it takes a picture with each prompt, and "
                "pairs are made from prompts or labels; use an objective that needs no pairs"
            )
        if self.inverted and self.images is None:
            raise UserError("data.images: missing; inverted pairs start at data; name their folder")
        if self.inverted and self.states:
            raise UserError(
                "data.states: inverted pairs have no states of the teacher's sampler; remove one "
                "of the two"
            )
        if self.images is not None and not self.inverted:
            raise UserError("data.images: only inverted pairs start at data; set data.inverted")
        if self.prompts is not None and (teacher.codec.classes or not _reads_text(teacher)):
            raise UserError(
                f"data.prompts: {clipped(teacher.source)!r} takes no prompts; remove it"
            )


def recipe_of(
    source: str, data: Mapping[str, Any], guidance: float | None = None, seed: int | None = None
) -> Recipe:
    """A recipe that learns from pairs of a teacher.

    Args:
        source: The teacher, as `teacher.source`; or the file or name of a recipe, whose teacher and
            pairs are taken.
        data: Keys of the `data` section; None stands for no such key.

    Raises:
        UserError: naming the key.
    """
    tree: dict[str, Any] = {"teacher": {"source": source}, "data": {}, "train": {"steps": 1}}
    if source.endswith(".yaml") or source in shipped():
        recipe = Recipe.load(source)
        tree["teacher"] = recipe.teacher.model_dump(mode="json")
        tree["train"]["seed"] = recipe.train.seed
        if recipe.data.source == PAIRS:
            tree["data"] = recipe.data.model_dump(mode="json", exclude_none=True)
    if guidance is not None:
        tree["teacher"]["guidance"] = guidance
    if seed is not None:
        tree["train"]["seed"] = seed
    tree["data"] |= {"source": PAIRS, **{k: v for k, v in data.items() if v is not None}}
    return Recipe.check({**tree, "objective": {"name": "kd"}}, "pairs")


def settings_of(recipe: Recipe) -> PairSettings:
    """The settings of a recipe whose `data.source` is "pairs"; of others, those of its teacher."""
    data = recipe.data
    given = {k: getattr(data, k) for k in ("count", "solver", "steps", "inverted", "images",
                                            "states")}  # fmt: skip
    settings = PairSettings(
        recipe.teacher, prompts=data.prompts, seed=recipe.train.seed, where=data.where
    )
    return replace(settings, **{k: v for k, v in given.items() if v is not None})


def prompts_of(settings: PairSettings, teacher: Teacher) -> list[Any]:
    """The prompts or labels that pairs have in turn: pair i has the i-th, and so on from the start.

    Raises:
        UserError: the prompts cannot be read.
    """
    every: list[Any] = list(range(teacher.codec.classes)) or [0]
    if _reads_text(teacher):
        every = _texts(settings, teacher)
    return [every[i] for i in places_of(every, settings.where, teacher.codec.classes)]


def _texts(settings: PairSettings, teacher: Teacher) -> list[str]:
    """The prompts of a teacher that reads text."""
    if settings.prompts is None and teacher.source == "shapes":
        return shapes.all_captions()
    listing = list_prompts(settings.prompts or "pack:starter")
    listing.check(listing.bad, listing.total, 0.01)
    return [item.prompt for item in listing.items]


def data_of(settings: PairSettings, teacher: Teacher) -> Source | None:
    """The encoded data of inverted pairs, with their conditions; None if there are none.

    Raises:
        UserError: they cannot be read, or are of several sizes.
    """
    if not settings.inverted:
        return None
    tree = {
        "teacher": settings.teacher.model_dump(),
        "objective": {"name": "ect"},  # one that needs data
        "data": {"source": plain(settings.images), "where": part_of(settings)},
        "train": {"steps": 1, "seed": settings.seed},
    }  # fmt: skip
    source = source_of(Recipe.check(tree, "pairs"), teacher)
    if isinstance(source, Buckets):
        raise UserError("data.images: they are of several sizes, and pairs of one; give one size")
    return source


def hash_of(prompts: list[Any]) -> str:
    """A hash of prompts or labels."""
    return hashlib.blake2b("\n".join(map(str, prompts)).encode(), digest_size=16).hexdigest()


def identity(settings: PairSettings, known: dict[str, Any], prompts: list[Any]) -> dict[str, Any]:
    """Plain data on which the pairs depend; equal for two folders whose pairs are the same.

    Args:
        known: The teacher's, as `teacher_identity`.
    """
    return {
        **known,
        "solver": settings.solver,
        "steps": settings.steps,
        "seed": settings.seed,
        "count": settings.count,
        "inverted": settings.inverted,
        "images": plain(settings.images),
        "prompts": hash_of(prompts),
        "dtype": "float32",
        **({"states": settings.states} if settings.states else {}),
        **({} if settings.where is None else {"where": part_of(settings)}),
    }  # fmt: skip


def part_of(settings: PairSettings) -> dict[str, Any] | None:
    """The part of the conditions that pairs are of, as plain data."""
    return None if settings.where is None else settings.where.model_dump(mode="json")


def plain(place: Place | None) -> Any:
    """A place as plain data."""
    return place if isinstance(place, str | None) else place.model_dump()


def teacher_identity(section: TeacherSection, teacher: Teacher) -> dict[str, Any]:
    """What pairs must share with the run that learns from them."""
    shared = section.share_times
    discriminator = described(section.discriminator)
    return {
        **({} if shared is None else {"share_times": shared.model_dump(mode="json")}),
        **({} if discriminator is None else {"discriminator": discriminator}),
        "teacher": teacher.source or section.source,
        "weights": weights_hash(teacher.denoiser),
        "guidance": guidance_of(section).model_dump(mode="json"),
        "negative_prompt": section.negative_prompt,
        "null_label": teacher.codec.null_label,
        "process": repr(teacher.denoiser.process),
        "levels": levels(teacher),
        "shape": list(teacher.shape),
    }


def _reads_text(teacher: Teacher) -> bool:
    return not teacher.codec.classes and teacher.codec.condition([""]) is not None

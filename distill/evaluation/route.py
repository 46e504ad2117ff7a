"""`distill route`: students of parts of the conditions become one pipeline.

MSD (multi-student distillation), Song et al. 2024 (arXiv:2410.23274).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config.recipe import Recipe
from distill.config.schema import PAIRS, WhereSection
from distill.data.conditions.part import is_inside
from distill.data.from_recipe import every_prompt
from distill.pairs.settings import prompts_of, settings_of
from students.export.folder import (
    SIDECAR,
    brings_source,
    load_student,
    refuse_unfinished,
    student_folder,
)
from students.lora import network_of
from students.routing import folder as routing
from students.routing.folder import Routed
from teachers.errors import UserError, clipped
from teachers.storage.files import home, read_json
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Part:
    """A student, and the part of the conditions that its recipe names.

    Attributes:
        name: As the command line names it.
        facts: Its sidecar.
    """

    name: str
    folder: Path
    facts: dict[str, Any]
    recipe: Recipe
    where: WhereSection


def route(sources: Sequence[str], out: Path) -> Routed:
    """Write the students' folders, the rule and the pipeline to `out`.

    Raises:
        UserError: the folder is not empty, or the students do not go together: of different
            teachers, data or step counts, or with parts that overlap or leave a condition out.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: it exists already; give a new folder")
    parts = [part_at(source) for source in sources]
    check_alike(parts)
    rule = rule_of(parts)
    loaded = [load_student(part.folder) for part in parts]
    check_networks(parts, loaded)
    check_whole(parts, every_condition(parts[0].recipe, loaded[0][1]))
    routed = Routed(loaded, rule)
    first = parts[0].facts
    about = {
        "teacher": first["teacher"],
        "steps": first["steps"],
        "students": [part.name for part in parts],
    }
    if out.is_dir():
        out.rmdir()
    routing.write([part.folder for part in parts], routed, out, about)
    return routed


def part_at(source: str) -> Part:
    """The student of a folder or of a run.

    Raises:
        UserError: it is none, or its recipe names no part.
    """
    refuse_unfinished(home(source))
    folder = student_folder(home(source))
    facts = read_json(folder / SIDECAR, f"student {source!r}")
    recipe = Recipe.check(dict(facts.get("recipe") or {}), f"student {source!r}")
    if recipe.data.where is None:
        raise UserError(
            f"{clipped(source)}: its recipe has no data.where, so it has learned every condition; "
            "give students of parts"
        )
    return Part(source, folder, facts, recipe, recipe.data.where)


def check_alike(parts: Sequence[Part]) -> None:
    """Refuse students of different teachers, step counts, data or pipelines.

    Raises:
        UserError: naming two of them.
    """
    first = parts[0]
    for other in parts[1:]:
        for what, a, b in (
            ("teachers", teacher_in(first), teacher_in(other)),
            ("step counts", first.facts.get("steps"), other.facts.get("steps")),
            ("data", data_in(first), data_in(other)),
            ("pipelines", pipeline_in(first), pipeline_in(other)),
        ):
            if a != b:
                raise UserError(
                    f"{clipped(other.name)}: it and {clipped(first.name)} have different {what}; "
                    "route students that differ in their parts and networks alone"
                )


def teacher_in(part: Part) -> Any:
    """What decides a student's teacher."""
    facts = part.facts
    return [facts.get("teacher"), facts.get("adapters"), part.recipe.teacher.model_dump()]


def data_in(part: Part) -> Any:
    """The data that a student has a part of."""
    keys = ("source", "prompts", "captions", "path", "count", "images", "inverted", "held_out")
    return {key: part.recipe.data.model_dump(mode="json")[key] for key in keys}


def pipeline_in(part: Part) -> Any:
    """The class of a student's pipeline."""
    return read_json(part.folder / "model_index.json", f"student {part.name!r}").get("_class_name")


def rule_of(parts: Sequence[Part]) -> dict[str, Any]:
    """The rule that tells the students' conditions apart.

    Raises:
        UserError: their parts are of both kinds, or two have the same label or word.
    """
    kinds = {"words" if part.where.labels is None else "labels" for part in parts}
    if len(kinds) > 1:
        raise UserError(
            f"{clipped(parts[-1].name)}: some parts are of labels and some of words; give one kind"
        )
    (kind,) = kinds
    seen: dict[Any, str] = {}
    lists = [list(dict.fromkeys(getattr(part.where, kind))) for part in parts]
    for part, names in zip(parts, lists, strict=True):
        for name in names:
            key = name.casefold() if isinstance(name, str) else name
            if (other := seen.setdefault(key, part.name)) != part.name:
                raise UserError(
                    f"{clipped(part.name)}: data.where.{kind}: {name!r} is also of "
                    f"{clipped(other)}; train students of parts that do not overlap"
                )
    return {"by": kind, "parts": lists}


def check_networks(parts: Sequence[Part], loaded: Sequence[Any]) -> None:
    """Refuse students that a pipeline of several cannot load or draw.

    Raises:
        UserError: naming one of them.
    """
    for part, (generator, teacher) in zip(parts, loaded, strict=True):
        where, network = clipped(part.name), network_of(generator.denoiser)
        if teacher.codec.pictures:
            raise UserError(f"{where}: it takes a picture with each prompt; route others")
        if brings_source(generator.denoiser):
            raise UserError(
                f"{where}: its network brings its own source, and diffusers loads none inside a "
                "pipeline of several; route students that stock classes load"
            )
        if generator.renoise and max(generator.counts) > 1 and not getattr(network, "SEEDED", True):
            raise UserError(
                f"{where}: its stock pipeline draws the noise between steps from no generator of "
                "its own, so a picture would depend on the batch; route students of one step"
            )


def every_condition(recipe: Recipe, teacher: Teacher) -> list[Any]:
    """All labels or prompts that the students have parts of."""
    if recipe.data.source == PAIRS:
        whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"where": None})})
        return prompts_of(settings_of(whole), teacher)
    return every_prompt(recipe, teacher)


def check_whole(parts: Sequence[Part], prompts: Sequence[Any]) -> None:
    """Refuse parts that leave a condition out, or of which two have one.

    Raises:
        UserError: naming the condition.
    """
    for prompt in prompts:
        owners = [part.name for part in parts if is_inside(prompt, part.where)]
        if not owners:
            raise UserError(
                f"data.where: no student has learned {clipped(repr(prompt))}; route one of this "
                "part as well"
            )
        if len(owners) > 1:
            raise UserError(
                f"{clipped(owners[1])}: data.where: {clipped(repr(prompt))} is also of "
                f"{clipped(owners[0])}; train students of parts that do not overlap"
            )

"""The student that is tuned: its folder, its recipe, and what cannot be tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config.paths import from_start
from distill.config.recipe import Recipe, override
from distill.config.renamed import current_names
from distill.sampling.student_sampler import conditioning
from students.export.earlier import lora_of, student_folder
from students.export.folder import SIDECAR, load_student
from teachers.errors import UserError, clipped
from teachers.storage.files import read_json

SHARED = ("train.", "eval.")  # sections whose overrides change both runs of a tuning


@dataclass(frozen=True)
class Tunable:
    """A finished student.

    folder: The exported student.
    recipe: Of its run.
    lora: The file of its adapter alone; None of a student with weights of its own.
    """

    folder: Path
    recipe: Recipe
    lora: Path | None


def tunable(source: str, overrides: Sequence[str] = ()) -> Tunable:
    """The student in a run's folder, or in an exported student's.

    Args:
        overrides: KEY=VALUE; those of `train` and `eval` change its recipe, and so all that is
            derived from it.

    Raises:
        UserError: there is none, or it cannot learn from captioned pictures.
    """
    folder = student_folder(source, "STUDENT")
    who = f"STUDENT: {clipped(source)}"
    tree = read_json(folder / SIDECAR, who).get("recipe")
    if not isinstance(tree, dict):
        raise UserError(f"{who}: {SIDECAR} has no recipe; export the run again")
    recipe = Recipe.check(
        override(
            from_start(current_names(tree, quiet=True), folder.parent),
            [v for v in overrides if v.startswith(SHARED)],
        ),
        f"{who}: recipe",
    )
    _, teacher = load_student(folder)
    if (kind := conditioning(teacher)) != "captions":
        raise UserError(
            f"{who}: it takes {kind}, and tune is for students that draw from captions alone; give "
            "a student of a text-to-image model"
        )
    pipe: Any = teacher.codec.pipe  # pyright: ignore[reportAttributeAccessIssue]
    if not hasattr(type(pipe), "load_lora_weights"):
        raise UserError(
            f"{who}: {type(pipe).__name__} loads no LoRA, by which the teacher is tuned; give a "
            "student of a pipeline that does"
        )
    return Tunable(folder, recipe, lora_of(folder))

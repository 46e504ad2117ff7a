"""A tuning from start to end: the teacher's LoRA, the student's run, and what they are worth."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.config.recipe import Recipe
from distill.console import print_line, print_notice
from distill.evaluation.finish import finish, finished
from distill.files import write
from distill.publish.card import draft
from distill.publish.tuning import FILE
from distill.report.page import report
from distill.training import build, run_folder
from distill.tuning.figures import Judged, measured
from distill.tuning.pictures import Lessons, lessons, write_pictures, write_prompts
from distill.tuning.recipes import (
    Places,
    Settings,
    matched,
    student_recipe,
    teacher_recipe,
)
from distill.tuning.student import Tunable, tunable
from eval.catalogue import headline
from teachers.errors import UserError, clipped
from teachers.storage.files import read_json


def tune(
    source: str,
    places: Places,
    settings: Settings,
    neutral: str | None = None,
    samples: int = 200,
    resume: bool = False,
) -> dict[str, Any]:
    """Tune a student, and write the figures into its new run.

    Args:
        source: The student: a run's folder, or an exported student.
        neutral: Prompts that hold the model where it is, as `data.prompts` in a recipe; by default
            those of the student's own run.
        samples: Pictures of each set of prompts that the figures are computed from.
        resume: Continue in the folders that a stopped tuning left.

    Raises:
        UserError: parts do not go together, or the folders hold another run; nothing is written.
    """
    student, learned, first, second = checked(source, places, settings, neutral, resume)
    if not finished(places.teacher):
        write_pictures(places.pictures, learned, student.recipe, settings.seed)
        write_prompts(places.prompts, learned, settings.seed)
        print_line(f"the teacher learns {len(learned.listing.items)} pictures, in {places.teacher}")
        train(first, places.teacher)
    if not finished(places.out):
        print_line(f"the student is tuned ({settings.method}), in {places.out}")
        train(second, places.out)
    if (before := earlier_figures(places.out / FILE, samples)) is not None:
        return before
    print_line("comparing the student with the tuned teacher")
    figures = {
        "method": settings.method,
        "pictures": len(learned.listing.items),
        **measured(judged(student, places, settings, learned, samples)),
        "quality": quality(student, places),
    }
    write(places.out / FILE, json.dumps(figures, indent=2) + "\n")
    write_pages(places.out)
    return figures


def earlier_figures(file: Path, samples: int) -> dict[str, Any] | None:
    """The figures that a finished tuning has left, if they are from as many pictures."""
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return figures if figures.get("samples") == samples else None


def write_pages(run: Path) -> None:
    """Write the student's card and the run's page again, now with the figures of the tuning."""
    try:
        summary = read_json(run / "summary.json", f"run {str(run)!r}")
        write(run / "student" / "README.md", draft(run / "student", summary))
        report(run)
    except UserError as error:
        print_notice(f"card and page are without the figures of the tuning: {error}")


def checked(
    source: str, places: Places, settings: Settings, neutral: str | None, resume: bool
) -> tuple[Tunable, Lessons, Recipe, Recipe]:
    """The student, what it learns from, and the recipes of the two runs; writes nothing.

    Raises:
        UserError: as `tune` does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("WORLD_SIZE: distill tune runs in one process; start it without a launcher")
    student = tunable(source, settings.overrides)
    learned = lessons(str(places.data), neutral, student.recipe)
    first = teacher_recipe(student, places, settings, learned.share)
    second = student_recipe(student, places, settings, learned.share)
    if places.tuned is not None and not finished(places.tuned):
        raise UserError(
            f"--teacher: {clipped(str(places.tuned))} is no finished run of a tuned teacher; give "
            "the folder OUT-teacher of an earlier tuning"
        )
    if settings.method == "anchor" and student.recipe.student.steps == 1:
        raise UserError(
            "--method anchor: a student of one step sees noise alone, from which it cannot learn "
            "your pictures; use --method teacher"
        )
    runs = [(first, places.teacher), (second, places.out)]
    for recipe, out in runs[places.tuned is not None :]:
        run_folder.refuse_live(out)
        begun = (out / "recipe.yaml").exists()
        if resume and begun:
            run_folder.check_same_run(recipe, out)
        elif not resume or out == places.teacher:
            run_folder.check_folder(recipe, out, resume)
    return student, learned, first, second


def train(recipe: Recipe, out: Path) -> None:
    """Train a run to its end, from where it stopped if it was begun."""
    run = build.build(recipe, out, resume=(out / "recipe.yaml").exists())
    run.engine.train()
    finish(run)


def judged(
    student: Tunable, places: Places, settings: Settings, learned: Lessons, samples: int
) -> Judged:
    """What the figures compare. The teacher is the tuned one, whatever the method was."""
    tree = student.recipe.tree()
    tree["players"] = {"student": {}}
    tree = matched(tree, student, places)
    recipe = Recipe.check({**tree, "critic": None}, "distill tune")
    return Judged(recipe, student.folder, places.out, places.teacher, learned, samples)


def quality(student: Tunable, places: Places) -> dict[str, Any]:
    """The protocol's own figures of the student before and after, by step count; on its prompts."""
    return {
        "before": protocol_figures(student.folder.parent),
        "after": protocol_figures(places.out),
    }


def protocol_figures(run: Path) -> dict[str, Any]:
    """A run's headline figure and accuracy at each of its student's step counts."""
    try:
        metrics = json.loads((run / "summary.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        return {}
    rows: Mapping[str, Any] = metrics.get("student", {}) if isinstance(metrics, dict) else {}
    return {
        steps: {k: row[k] for k in (headline(row), "accuracy") if k in row}
        for steps, row in rows.items()
    }

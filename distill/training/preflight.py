"""Before training: the files of a run's end are written once, for the untrained student.

So they fail now and not after hours of training. `students.export.rehearse` does the same for the
student's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from distill.attempts import one_line
from distill.config.recipe import Recipe
from distill.console import print_notice
from distill.publish.card import draft
from students.export import lora_files
from students.export.folder import SIDECAR, sidecar
from students.generator import Generator
from teachers.errors import UserError
from teachers.teacher import Teacher

# What the pages read from the summary.json of a run that is not measured.
UNMEASURED = {"steps": 1, "wall_s": 1.0, "network_evaluations": 1, "metrics": {}}
LOGGED = {"step": 1, "student/loss": 1.0}


def rehearse_end(recipe: Recipe, student: Generator, teacher: Teacher) -> None:
    """Make the LoRA files' keys, the card and the report, and discard them.

    Raises:
        UserError: no LoRA file could be written, or a package is missing.
    """
    if lora_files.possible(student, teacher):
        for name, why in lora_files.rehearse(student, teacher).items():
            print_notice(f"lora/{name} will not be written ({why}); the others will")
    try:
        write_pages(recipe, student, teacher)
    except ImportError as error:
        package = error.name or "a package"
        raise UserError(f"{package}: missing, and a run's pages need it; pip install it") from None
    except Exception as error:  # a page costs no run
        print_notice(f"the run's card or report will fail: {one_line(error)}")


def write_pages(recipe: Recipe, student: Generator, teacher: Teacher) -> None:
    """The card and the report of a run without steps, in a temporary folder."""
    from distill.report.page import render

    pipe: Any = teacher.codec.pipe
    index = {} if pipe is None else {"_class_name": type(pipe).__name__, **dict(pipe.config)}
    with TemporaryDirectory() as scratch:
        run = Path(scratch)
        folder = run / "student"
        folder.mkdir()
        about = sidecar(student, teacher, recipe.tree())
        (folder / SIDECAR).write_text(json.dumps(about), encoding="utf-8")
        (folder / "model_index.json").write_text(json.dumps(index, default=str), encoding="utf-8")
        (run / "recipe.yaml").write_text(
            yaml.safe_dump(recipe.tree(), sort_keys=False), encoding="utf-8"
        )
        (run / "summary.json").write_text(json.dumps(UNMEASURED), encoding="utf-8")
        (run / "metrics.jsonl").write_text(json.dumps(LOGGED) + "\n", encoding="utf-8")
        draft(folder)
        render(run)

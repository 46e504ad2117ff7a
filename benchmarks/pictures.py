"""Draw teacher and students in rows, with the same captions and noise.

    python benchmarks/pictures.py OUT.png RUN:STEPS [RUN:STEPS ...]

The first row is the guided teacher of the first run's recipe, with the solver and step count of its
evaluation. Then come the exported students, each in STEPS steps, and last the teacher in one step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill.config.recipe import Recipe
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import student_samples
from distill.sampling.teacher_sampler import recipe_sampler
from eval import shapes
from students.export.folder import load_student
from teachers.errors import plural

COLUMNS, CELL, GAP = 8, 96, 6  # images in a row; an image's side and the gap between two, in pixels
MARGIN, LINE = 150, 17  # pixels: the width of row names, the height of a line of text
LETTERS = 14  # the most letters in a line of a caption
SEED = 1


def rows(runs: Sequence[tuple[Path, int]], captions: list[str]) -> dict[str, Tensor]:
    """uint8 images (N, 3, H, W) by the row's name; the teacher's are first and last."""
    recipe = Recipe.load(runs[0][0] / "recipe.yaml")
    teacher, steps = load_teacher(recipe.teacher), recipe.eval.teacher_steps
    made = {
        f"teacher, {steps} steps": recipe_sampler(recipe, teacher, steps)(captions, SEED).images
    }
    for folder, k in runs:
        student, codec = load_student(folder)
        made[f"student, {count(k)}"] = student_samples(student.at(k), codec, captions, SEED).images
    made["teacher, 1 step"] = recipe_sampler(recipe, teacher, 1)(captions, SEED).images
    return made


def count(steps: int) -> str:
    return f"{steps} {plural(steps, 'step')}"


def draw(images: dict[str, Tensor], captions: list[str]) -> Image.Image:
    """One picture of all rows, with their names on the left and the captions above."""
    font = ImageFont.load_default(size=14)
    texts = [wrap(c, LETTERS) for c in captions]
    top = LINE * max(map(len, texts)) + GAP
    step = CELL + GAP
    page = Image.new("RGB", (MARGIN + step * len(captions), top + step * len(images)), "white")
    pen = ImageDraw.Draw(page)
    for j, lines in enumerate(texts):
        middle = MARGIN + j * step + CELL // 2
        for i, line in enumerate(lines):
            pen.text((middle, i * LINE), line, "black", font, anchor="ma")
    for i, (name, row) in enumerate(images.items()):
        pen.text((GAP, top + i * step + CELL // 2), name, "black", font, anchor="lm")
        for j, image in enumerate(row):
            cell = Image.fromarray(image.permute(1, 2, 0).numpy())
            page.paste(
                cell.resize((CELL, CELL), Image.Resampling.NEAREST),
                (MARGIN + j * step, top + i * step),
            )
    return page


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    out, *words = sys.argv[1:]
    runs = [(Path(folder), int(k)) for folder, _, k in (word.rpartition(":") for word in words)]
    captions = shapes.captions(COLUMNS, seed=SEED)
    draw(rows(runs, captions), captions).quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()

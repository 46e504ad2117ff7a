"""Draw the teacher and its students side by side: the same captions, the same noise.

    python benchmarks/pictures.py OUT.png RUN:STEPS [RUN:STEPS ...]

The first row is the guided teacher of the first run's recipe, in the steps and by the solver that
it is measured with; then come the runs' exported students in so many steps, and the teacher in one.
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
from distill.sampling.teacher_sampler import own
from eval import shapes
from students.export.folder import load_student
from teachers.text import plural

COLUMNS, CELL, GAP = 8, 96, 6  # pictures in a row; pixels of a side, and between two
MARGIN, LINE, LETTERS = 150, 17, 14  # pixels for the rows' names, of a line; letters in one
SEED = 1


def rows(runs: Sequence[tuple[Path, int]], captions: list[str]) -> dict[str, Tensor]:
    """Names of rows -> uint8 pictures (N, 3, H, W), the teacher's first and last."""
    recipe = Recipe.load(runs[0][0] / "recipe.yaml")
    teacher, steps = load_teacher(recipe.teacher), recipe.eval.teacher_steps
    made = {f"teacher, {steps} steps": own(recipe, teacher, steps)(captions, SEED).images}
    for folder, k in runs:
        student, codec = load_student(folder)
        made[f"student, {count(k)}"] = student_samples(student.at(k), codec, captions, SEED).images
    made["teacher, 1 step"] = own(recipe, teacher, 1)(captions, SEED).images
    return made


def count(steps: int) -> str:
    return f"{steps} {plural(steps, 'step')}"


def picture(made: dict[str, Tensor], captions: list[str]) -> Image.Image:
    """The rows under one another, named on the left, with the captions above."""
    font = ImageFont.load_default(size=14)
    texts = [wrap(c, LETTERS) for c in captions]
    top = LINE * max(map(len, texts)) + GAP
    step = CELL + GAP
    page = Image.new("RGB", (MARGIN + step * len(captions), top + step * len(made)), "white")
    pen = ImageDraw.Draw(page)
    for j, lines in enumerate(texts):
        middle = MARGIN + j * step + CELL // 2
        for i, line in enumerate(lines):
            pen.text((middle, i * LINE), line, "black", font, anchor="ma")
    for i, (name, images) in enumerate(made.items()):
        pen.text((GAP, top + i * step + CELL // 2), name, "black", font, anchor="lm")
        for j, image in enumerate(images):
            cell = Image.fromarray(image.permute(1, 2, 0).numpy())
            page.paste(
                cell.resize((CELL, CELL), Image.Resampling.NEAREST),
                (MARGIN + j * step, top + i * step),
            )
    return page


def main() -> None:
    out, *named = sys.argv[1:]
    runs = [(Path(folder), int(k)) for folder, _, k in (name.rpartition(":") for name in named)]
    captions = shapes.captions(COLUMNS, seed=SEED)
    picture(rows(runs, captions), captions).quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()

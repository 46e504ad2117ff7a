"""`distill tune` on the embedded shapes: a one-step student learns a shape that it does not know.

    python benchmarks/tune_shapes.py draw FOLDER [SEED]
    python benchmarks/tune_shapes.py reader
    python benchmarks/tune_shapes.py measure OUT.json NAME=FOLDER [NAME=FOLDER ...]
    python benchmarks/tune_shapes.py table OUT.json

The new shape is a wedge, a triangle with its apex down. Its word is z, a token that no caption of
the teacher has. `draw` draws 50 of its 90 captions. `reader` measures the
exact reader, given a fifth template, on drawings that nothing was trained on. `measure` reads what
students draw in all their steps: the 50 captions, the 40 others, and the teacher's own 360.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from torchvision.utils import save_image

from distill.config.recipe import Recipe
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import student_samples
from distill.sampling.teacher_sampler import recipe_sampler
from eval.shapes import all_captions, parse, read, reader, scenes
from students.export.folder import load_student
from teachers.catalogue.loading import load

WORD = "z"  # a token without a meaning
PICTURES, SEEDS = 50, 3
OWN = tuple(all_captions())  # the teacher's 360 captions


def wedge(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The share of each pixel that a triangle with its apex down covers, as `_triangle` has it."""
    beyond = (2 * abs(scenes._COLUMN + 0.5 - x) - (y + r - scenes._ROW - 0.5)) / np.sqrt(5)
    return (0.5 - beyond).clip(0, 1) * scenes._overlap(scenes._ROW, y - r, y + r)


@contextmanager
def fifth_shape() -> Iterator[None]:
    """Within it, drawings, captions and the reader have the wedge as a fifth shape."""
    new = {
        "SHAPES": (*scenes.SHAPES, WORD),
        "AREA": np.append(scenes.AREA, 2.0),
        "SINKS": np.append(scenes.SINKS, -1 / 3),
    }
    before = {k: getattr(scenes, k) for k in (*new, "_COVER")}
    for module in (scenes, reader):
        for name, value in new.items():
            setattr(module, name, value)
    scenes._COVER = (*scenes._COVER, wedge)
    scenes._scenes.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(scenes, name, value)
        for name in new:
            setattr(reader, name, before[name])
        scenes._scenes.cache_clear()


def new_captions(seed: int) -> tuple[list[str], list[str]]:
    """The 50 captions that are drawn, and the 40 others."""
    with fifth_shape():
        mine = [c for c in all_captions() if WORD in c]
    random.Random(seed).shuffle(mine)
    return mine[:PICTURES], mine[PICTURES:]


def draw(folder: Path, seed: int) -> None:
    """A picture of each of the 50 captions, and its caption beside it."""
    folder.mkdir(parents=True)
    captions, _ = new_captions(seed)
    with fifth_shape():
        images = scenes.draw(captions, 1000 + seed)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        save_image(image / 255, folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption + "\n")
    (folder.parent / f"{folder.name}-known.txt").write_text("\n".join(OWN) + "\n")


def accuracy(sample: Any, captions: list[str], seeds: int = SEEDS) -> float:
    """The share of pictures that the reader reads as their whole caption."""
    hits = []
    for seed in range(seeds):
        images = sample(captions, seed)
        with fifth_shape():
            hits += [a == parse(c) for a, c in zip(read(images), captions, strict=True)]
    return float(np.mean(hits))


def reader_figures() -> dict[str, float]:
    """Accuracy of the reader of five shapes: on drawings, and on what the autoencoder returns."""
    codec = load("shapes").codec
    known, (learned, others) = list(OWN), new_captions(0)
    new = learned + others

    def drawn(captions: list[str], seed: int) -> Any:
        with fifth_shape():
            return scenes.draw(captions, 5000 + seed)

    def decoded(captions: list[str], seed: int) -> Any:
        back = codec.decode(codec.encode(drawn(captions, seed).float() / 127.5 - 1)).clamp(-1, 1)
        return ((back + 1) * 127.5).round().byte()

    return {
        "drawings, known": accuracy(drawn, known),
        "drawings, new": accuracy(drawn, new),
        "decoded, known": accuracy(decoded, known),
        "decoded, new": accuracy(decoded, new),
    }


def student_figures(folder: Path, seed: int) -> dict[str, float]:
    """Caption accuracy of a student in all its steps."""
    generator, teacher = load_student(folder)
    return figures(lambda c, s: student_samples(generator, teacher, c, s).images, seed)


def teacher_figures(run: Path, seed: int) -> dict[str, float]:
    """Caption accuracy of the guided teacher of a run in its many steps."""
    recipe = Recipe.load(run / "recipe.yaml")
    sampler = recipe_sampler(recipe, load_teacher(recipe.teacher), recipe.eval.teacher_steps)
    return figures(lambda c, s: sampler(c, s).images, seed, 1)


def figures(sample: Any, seed: int, seeds: int = SEEDS) -> dict[str, float]:
    learned, others = new_captions(seed)
    return {
        "known": accuracy(sample, list(OWN), seeds),
        "learned": accuracy(sample, learned, seeds),
        "others": accuracy(sample, others, seeds),
    }


def measure(out: Path, named: list[str]) -> None:
    """Write the figures of students; a name that begins with `teacher` is a run's teacher.

    The number at the end of a name is the seed by which its captions were chosen.
    """
    rows: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    rows.setdefault("reader", reader_figures())
    for word in named:
        name, _, folder = word.partition("=")
        seed = int(name.rpartition("-")[2])
        of = teacher_figures if name.startswith("teacher") else student_figures
        rows[name] = {k: round(v, 4) for k, v in of(Path(folder), seed).items()}
        kept = Path(folder) / "tune.json"
        if kept.exists():
            rows[name] |= {"tune": json.loads(kept.read_text())}
        sys.stdout.write(json.dumps({name: rows[name]}) + "\n")
        sys.stdout.flush()
    out.write_text(json.dumps(rows, indent=2) + "\n")


NAMES = {
    "before": "the student before",
    "teacher": "the teacher with the LoRA, in {steps} steps",
    "tuned": "`--method teacher`",
    "anchor": "`--method anchor`",
    "plain": "`--method plain`",
}


def table(rows: dict[str, Any]) -> str:
    """The table of docs/tuning.md, from the results; means over seeds where there are several."""
    tuned = [v["tune"] for v in rows.values() if "tune" in v]
    count = next((k for v in tuned for k in v["students"]), "1")
    first = "one step" if count == "1" else f"{count} steps"
    lines = [
        f"| {first} | known captions | new, learned | new, others | steps kept | concept gained |",
        "|---|---|---|---|---|---|",
    ]
    for kind, name in NAMES.items():
        some = [v for k, v in rows.items() if k.rpartition("-")[0] == kind]
        if not some:
            continue
        cells = [f"{100 * mean(v[k] for v in some):.1f} %" for k in ("known", "learned", "others")]
        tunes = [v["tune"]["students"][count] for v in some if "tune" in v]
        steps = next((v["teacher_steps"] for v in tuned), "many")
        for value in ("steps_kept", "concept_gained"):
            found = [v[value] for v in tunes]
            found = [v["student"] if isinstance(v, dict) else v for v in found]
            found = [v for v in found if v is not None]  # as good undistilled as the teacher
            cells.append(f"{mean(found):.2f}" if found else "")
        lines.append(f"| {name.format(steps=steps)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    _, command, *words = sys.argv
    if command == "draw":
        draw(Path(words[0]), int(words[1]) if len(words) > 1 else 0)
    elif command == "reader":
        sys.stdout.write(json.dumps(reader_figures(), indent=2) + "\n")
    elif command == "table":
        sys.stdout.write(table(json.loads(Path(words[0]).read_text())))
    else:
        measure(Path(words[0]), words[1:])

"""What rewards do to students of the embedded shapes: the reward, what is right, and variety.

    python benchmarks/rewards.py RUN:STEPS [RUN:STEPS ...]

A student that games its reward has more of it, and fewer captions right or less variety. For each
run, and first for the teacher's network before any training, in the student's own sampler:

reward: the mean log-probability of captions by their classifier, which training may have raised.
right: the share of captions that the exact reader finds in the pixels; no network of a loss.
variety: the root mean square between two images of one caption, as a share of real drawings'.
clipped: the share of colour values at 0 or 255.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.config.recipe import Recipe
from distill.early_stop.scores import spread
from distill.rewards.rewards import caption_certainty
from distill.sampling.student_sampler import student_samples
from eval import shapes
from eval.shapes.reader import read
from eval.shapes.scenes import parse
from students import schedulers
from students.export.folder import load_student
from teachers import load

CAPTIONS, EACH = 240, 3  # captions, and images of each
SEED = 5


def figures(images: Tensor, captions: Sequence[str], drawings: Tensor) -> dict[str, float]:
    """The figures above of images and real drawings of the same captions, uint8 (N, 3, H, W)."""
    with torch.no_grad():
        reward = caption_certainty(images.float() / 127.5 - 1, captions).mean().item()
    right = [scene == parse(c) for scene, c in zip(read(images), captions, strict=True)]
    sets = [x.float().unflatten(0, (CAPTIONS, EACH)) for x in (images, drawings)]
    return {
        "reward": reward,
        "right": sum(right) / len(right),
        "variety": spread(sets[0]) / spread(sets[1]),
        "clipped": ((images == 0) | (images == 255)).float().mean().item(),
    }


def main(arguments: Sequence[str]) -> None:
    captions = [c for c in shapes.captions(CAPTIONS, seed=SEED) for _ in range(EACH)]
    drawings = shapes.draw(captions, seed=SEED)
    for argument in ("untrained", *arguments):
        run, _, steps = argument.rpartition(":")
        if not run:
            first, _, steps = arguments[0].rpartition(":")
            recipe = Recipe.load(Path(first) / "recipe.yaml")
            teacher = load(str(recipe.teacher.source))
            student = schedulers.student(
                teacher, recipe.student.steps, recipe.student.start, recipe.student.renoise
            )
        else:
            student, teacher = load_student(Path(run))
        images = student_samples(student.at(int(steps)), teacher, captions, SEED).images
        found = figures(images, captions, drawings)
        line = ", ".join(f"{k} {v:.3f}" for k, v in found.items())
        sys.stdout.write(f"{argument}: {line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

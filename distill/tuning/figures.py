"""Steps kept: whether a tuned student is still as good in its few steps as its teacher in many.

All distances are between features of pictures of the same prompts, drawn from different noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from distill.config.recipe import Recipe
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import student_samples
from distill.sampling.teacher_sampler import recipe_sampler
from distill.tuning.pictures import Lessons, cycled, own_images
from eval.metrics.base import FeatureMetric, Features
from eval.protocols.measure import protocol
from eval.samples import Samples
from students.export.folder import load_student
from students.generator import Generator
from teachers.teacher import Teacher

POOLED = 8  # side of the pixels that are features where a run has no protocol
EQUIVALENT = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # step counts of the teacher that are tried
SETS = ("concept", "known")


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖ of two sets of features (N, D), (M, D).

    Székely and Rizzo 2013. The estimate is unbiased: without distance it is 0 on average, at any
    number of samples, and it may be negative. Sets of one size are of the same prompts in the same
    order; pairs of one prompt, which are nearer than others, are left out between the sets, as
    there are none within a set.
    """
    a, b = a.double(), b.double()

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    between = torch.cdist(a, b)
    if len(a) == len(b):
        cross = (between.sum() - between.diagonal().sum()) / (len(a) * (len(a) - 1))
    else:
        cross = between.mean()
    return (2 * cross - within(a) - within(b)).item()


def steps_kept(student: float, undistilled: float, floor: float) -> float | None:
    """K = 1 − (student − floor) / (undistilled − floor): 1 as good as the teacher, 0 steps gone.

    Args:
        student: The distance of the tuned student, in its steps, to the tuned teacher in many.
        undistilled: That of the tuned teacher itself in the student's steps, unguided.
        floor: That of the tuned teacher to itself.

    Returns:
        None where the undistilled teacher is as good as in many steps, so that there is nothing
        that could be kept.
    """
    if undistilled <= floor:
        return None
    return 1 - (student - floor) / (undistilled - floor)


def share_gained(before: float, after: float) -> float | None:
    """The share of a distance that is gone; None where there was none."""
    return None if before <= 0 else 1 - after / before


def features_of(recipe: Recipe) -> tuple[str, Features]:
    """The features of a run's protocol, or pooled pixels where it has none; and their name."""
    if recipe.eval.protocol is not None:
        for metric in protocol(recipe.eval.protocol).metrics:
            if isinstance(metric, FeatureMetric):
                return f"those of the protocol {recipe.eval.protocol}", metric.features
    return f"pixels pooled to {POOLED}×{POOLED}", pooled


def pooled(images: Tensor) -> Tensor:
    """Mean colours (N, 3·8·8) in [0, 1] of a grid of parts of uint8 images (N, 3, H, W)."""
    return adaptive_avg_pool2d(images.float() / 255, POOLED).flatten(1)


@dataclass(frozen=True)
class Judged:
    """What is compared.

    recipe: Of the tuned student's match: the teacher with the LoRA that it learned, guided.
    before, after, undistilled: Folders of the student before and after, and of the tuned teacher
        in the student's steps.
    samples: Pictures in each set of prompts.
    """

    recipe: Recipe
    before: Path
    after: Path
    undistilled: Path
    lessons: Lessons
    samples: int

    def prompts(self) -> dict[str, list[str]]:
        """By set: the pictures' captions, and neutral prompts, spread over all of them."""
        neutral = self.lessons.neutral
        stride = max(1, len(neutral) // self.samples)
        return {
            "concept": cycled(self.lessons.captions, self.samples),
            "known": cycled(neutral[::stride], self.samples),
        }


Sets = dict[str, Tensor]  # features (N, D) by set of prompts


def measured(judged: Judged) -> dict[str, Any]:
    """All figures of a tuning, by step count of the student: see docs/tuning.md."""
    name, features = features_of(judged.recipe)
    prompts = judged.prompts()

    def seen(sample: Callable[[list[str], int], Any], seed: int) -> Sets:
        return {k: features(sample(v, seed).images).cpu() for k, v in prompts.items()}

    teacher = load_teacher(judged.recipe.teacher)
    most = judged.recipe.eval.teacher_steps

    def taught(steps: int, seed: int) -> Sets:
        return seen(recipe_sampler(judged.recipe, teacher, steps), seed)

    full, again = taught(most, 0), taught(most, 1)
    few: dict[int, Sets] = {}
    students = {
        "before": load_student(judged.before),
        "after": load_student(judged.after),
        "undistilled": load_student(judged.undistilled),
    }
    size = student_samples(students["after"][0], students["after"][1], prompts["known"][:1], 0)
    pictures = features(own_images(judged.lessons, *size.images.shape[-2:])).cpu()
    rows = {}
    for count in students["after"][0].counts:
        drawn = {
            k: seen(sampler(*student, count), 2)
            for k, student in students.items()
            if count in student[0].counts
        }
        row = compared(drawn, full, again, pictures)

        def distance(steps: int) -> float:
            if steps not in few:
                few[steps] = taught(steps, 2)
            return both(few[steps], full)

        row["teacher_equivalent_steps"] = equivalent_steps(
            row["distances"]["after"], distance, most
        )
        rows[str(count)] = row
    return {"features": name, "samples": judged.samples, "teacher_steps": most, "students": rows}


def sampler(generator: Generator, teacher: Teacher, steps: int) -> Callable[..., Samples]:
    return lambda prompts, seed: student_samples(generator.at(steps), teacher, prompts, seed)


def equivalent_steps(student: float, distance: Callable[[int], float], most: int) -> int | None:
    """The fewest steps in which the teacher is at least as near as the student; None if in none.

    Args:
        student: The student's distance.
        distance: The teacher's, by its steps; asked for rising counts until one suffices.
        most: The greatest count.
    """
    counts = [*takewhile(lambda k: k < most, EQUIVALENT), most]
    return next((k for k in counts if distance(k) <= student), None)


def both(a: Sets, b: Sets) -> float:
    """The distance over both sets of prompts, each a half of the samples."""
    return energy_distance(torch.cat([a[k] for k in SETS]), torch.cat([b[k] for k in SETS]))


def compared(drawn: dict[str, Sets], full: Sets, again: Sets, pictures: Tensor) -> dict[str, Any]:
    """Figures at one step count.

    Args:
        drawn: By student.
        full, again: Of the tuned teacher in many steps, from two noises.
        pictures: Of the user's pictures (N, D).
    """
    floor, distances = both(full, again), {k: both(v, full) for k, v in drawn.items()}
    by_set = {
        k: {n: energy_distance(v[k], full[k]) for n, v in drawn.items()}
        | {"floor": energy_distance(again[k], full[k])}
        for k in SETS
    }
    undistilled = distances.get("undistilled")
    kept = None if undistilled is None else steps_kept(distances["after"], undistilled, floor)
    away = energy_distance(drawn["before"]["concept"], pictures)
    gained = {
        "student": share_gained(away, energy_distance(drawn["after"]["concept"], pictures)),
        "teacher": share_gained(away, energy_distance(full["concept"], pictures)),
    }
    return {
        "steps_kept": kept,
        "concept_gained": gained,
        "distances": {**distances, "floor": floor},
        "by_set": by_set,
    }

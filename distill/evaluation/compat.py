"""`distill compat`: users' LoRA files in a student, against the same files in its teacher.

Student and teacher draw the same prompts from the same noise, with and without each LoRA: the
student at its own steps without guidance, the teacher as its recipe guides and solves it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.console import spinner
from distill.data.encode import device as device_of
from distill.evaluation import style_figures as figures
from distill.evaluation.compat_checks import (
    Comparison,
    Request,
    at_strength,
    precision_of,
    prepared,
    with_files,
)
from distill.sampling.guided_teacher import guidance_of, load_teacher
from distill.sampling.student_sampler import student_samples
from distill.sampling.teacher_sampler import recipe_sampler
from eval.metrics.base import checked
from eval.samples import Samples
from students.export.folder import load_student
from teachers.errors import without_notes

SEED = 0
Pictures = dict[tuple[int, float] | None, Tensor]  # by LoRA and strength; None is without any


def compare(request: Request) -> tuple[dict[str, Any], dict[str, Pictures]]:
    """Draw with all models, and measure.

    Returns:
        The content of compat.json, and the uint8 pictures of "teacher" and "student".

    Raises:
        UserError: something in the request does not fit, before any picture is drawn.
        MetricError: features or the prompt score cannot be computed of these pictures.
    """
    made = prepared(request)
    pictures = {"teacher": drawn(made, teacher_images), "student": drawn(made, student_images)}
    return measured(made, pictures), pictures


# ---- pictures


def drawn(
    made: Comparison, images: Callable[[Comparison, Sequence[Mapping[str, Any]]], Tensor]
) -> Pictures:
    """A model's pictures without LoRA files, and with each one at each strength.

    It is loaded afresh for each, so that only one is in memory, and weights are rounded once.
    """
    who = images.__name__.partition("_")[0]
    pictures: Pictures = {}
    for variant in (None, *made.variants):
        number, strength = variant or (0, 0.0)
        paths = () if variant is None else (made.request.loras[number],)
        name = f" with {made.files[number].path.name} at {strength:g}" if variant else ""
        with spinner(f"{who}{name}: {len(made.prompts)} pictures"), without_notes():
            pictures[variant] = images(made, at_strength(paths, strength))
        gc.collect()
    return pictures


def teacher_images(made: Comparison, adapters: Sequence[Mapping[str, Any]]) -> Tensor:
    """Pictures (N, C, H, W) of the teacher with these LoRA files, guided and solved as usual."""
    recipe = with_files(made.recipe, adapters)
    teacher = load_teacher(recipe.teacher)
    teacher.denoiser.to(device_of())
    sampler = recipe_sampler(recipe, teacher, recipe.eval.teacher_steps)
    return stills(sampler(made.prompts, SEED).images)


def student_images(made: Comparison, adapters: Sequence[Mapping[str, Any]]) -> Tensor:
    """Pictures (N, C, H, W) of the student with these LoRA files."""
    generator, teacher = load_student(
        made.request.student, precision_of(made.recipe), tuple(adapters)
    )
    student = generator.to(device_of()).at(made.steps)
    return stills(student_samples(student, teacher, made.prompts, SEED).images)


def stills(images: Tensor) -> Tensor:
    """Pictures; of videos (N, C, F, H, W), the frames in their middle."""
    return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images


# ---- figures


def measured(made: Comparison, pictures: Mapping[str, Pictures]) -> dict[str, Any]:
    """The content of compat.json."""
    recipe, request = made.recipe, made.request
    features = {
        who: {k: checked(made.features(v)) for k, v in some.items()}
        for who, some in pictures.items()
    }
    rows = [row(made, pictures, features, number, s) for number, s in made.variants]
    scores = scored(made, pictures["teacher"][None])
    return {
        "student": str(request.student),
        "steps": made.steps,
        "teacher": {
            "source": recipe.teacher.source,
            "guidance": guidance_of(recipe.teacher).model_dump(mode="json"),
            "solver": recipe.eval.teacher_solver,
            "steps": recipe.eval.teacher_steps,
        },
        "samples": len(made.prompts),
        "prompts": list(dict.fromkeys(made.prompts)),
        "seed": SEED,
        "features": made.rule,
        "prompt_score": next(iter(scores), None),
        "plain": {who: colours(made, some[None]) for who, some in pictures.items()},
        "rows": rows,
        **figures.summary(rows),
    }


def row(
    made: Comparison,
    pictures: Mapping[str, Pictures],
    features: Mapping[str, Mapping[Any, Tensor]],
    number: int,
    strength: float,
) -> dict[str, Any]:
    """The figures of one LoRA at one strength."""
    file, variant = made.files[number], (number, strength)
    change = {who: figures.shift(some[None], some[variant]) for who, some in features.items()}
    theirs = features["teacher"]
    return {
        "lora": names_of(made.request.loras)[number],
        "file": str(made.request.loras[number]),
        "sha256": file.sha256,
        "pairs": file.count,
        "strength": strength,
        "shift_ratio": figures.shift_ratio(change["student"], change["teacher"]),
        "shift_cosine": figures.cosine(change["student"], change["teacher"]),
        "teacher_halves_cosine": figures.halves_cosine(theirs[None], theirs[variant]),
        **{who: colours(made, some[variant]) for who, some in pictures.items()},
        "same_pixels": {who: bool(torch.equal(some[None], some[variant]))
                        for who, some in pictures.items()},
        "overlap": figures.overlap(file.pairs, made.turbo) if made.turbo else None,
    }  # fmt: skip


def colours(made: Comparison, images: Tensor) -> dict[str, float]:
    """Saturation, clipped pixels and prompt score of pictures."""
    values = {"saturation": figures.saturation(images), "clipped": figures.clipped_share(images)}
    if scores := scored(made, images):
        values["prompt_score"] = next(iter(scores.values()))
    return values


def scored(made: Comparison, images: Tensor) -> dict[str, float]:
    """The prompt score by its key; empty without one."""
    return {} if made.score is None else made.score(Samples(images, made.prompts))


def names_of(paths: Sequence[Path]) -> list[str]:
    """Names of LoRA files in tables: without folder and ending, if they differ so."""
    stems = [p.name.removesuffix(".safetensors") for p in paths]
    return stems if len(set(stems)) == len(stems) else [str(p) for p in paths]

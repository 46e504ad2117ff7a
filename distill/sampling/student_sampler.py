"""Samples of students, and the check that a protocol fits a teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.data.encode import decoder_on, picture_shape
from eval.protocols.measure import Protocol, images_to_samples
from eval.samples import Samples
from students.export.folder import sample_student
from students.generator import Generator
from students.routing.folder import Routed
from teachers.errors import UserError
from teachers.teacher import Teacher

PIXELS = 2**22  # in one call of the networks: four images of 1024×1024
BATCH = 512  # the most images in one call, however small


def check_protocol(measure: Protocol, teacher: Teacher) -> None:
    """Refuse a protocol whose prompts or image size the teacher does not support.

    Raises:
        UserError: it does not support them.
    """
    kind, shape = conditioning(teacher), picture_shape(teacher)
    wanted = f"labels of {measure.classes} classes" if measure.classes else "captions"
    if kind != wanted:
        raise UserError(
            f"protocol {measure.name}: it needs a model of {wanted}, and this teacher takes "
            f"{kind}; choose another protocol"
        )
    side = measure.side
    if shape[0] != measure.channels or (side is not None and shape[1:] != (side, side)):
        size = f"{side}×{side}" if side else "any size"
        raise UserError(
            f"protocol {measure.name}: it needs images of {measure.channels} channels and {size}, "
            f"and the teacher's are {'×'.join(map(str, shape))}; choose another protocol"
        )


def conditioning(teacher: Teacher) -> str:
    """What a teacher is conditioned on: "captions", "labels of 10 classes", "nothing", …"""
    if classes := teacher.codec.classes:
        return f"labels of {classes} classes"
    if teacher.codec.pictures:
        return "a picture with each caption"
    return "nothing" if teacher.codec.condition([""]) is None else "captions"


def timed(make: Any, device: torch.device) -> tuple[torch.Tensor, float]:
    """The result of `make`, and the seconds until the device has it."""
    start = time.perf_counter()
    result = make()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def default_batch(teacher: Teacher) -> int:
    """The number of a teacher's images in one call of the networks, unless another is given."""
    return max(1, min(BATCH, PIXELS // math.prod(picture_shape(teacher)[1:])))


def decode(teacher: Teacher, x: Tensor, batch: int) -> Tensor:
    """Images (N, C, H, W) on the CPU from data x (N, ...), decoded on the device of x."""
    with decoder_on(teacher, x.device):
        return torch.cat([teacher.codec.decode(part).cpu() for part in x.split(batch)])


def student_samples(
    student: Generator,
    teacher: Teacher,
    prompts: Sequence[str],
    seed: int,
    batch: int | None = None,
) -> Samples:
    """A student's images for the prompts, from the noise that a stock pipeline draws for this seed.

    Args:
        batch: Images in one call of the networks; by default as many as their size allows.
    """
    device, batch = next(student.parameters()).device, batch or default_batch(teacher)
    x, seconds = timed(lambda: sample_student(student, teacher, prompts, seed, batch), device)
    return images_to_samples(decode(teacher, x, batch), list(prompts), seconds)


def routed_samples(
    students: Routed, prompts: Sequence[str], seed: int, steps: int, batch: int | None = None
) -> Samples:
    """Routed students' images for the prompts, from the noise that their pipeline draws.

    Args:
        batch: As for `student_samples`.
    """
    teacher = students.experts[0][1]
    device = next(students.experts[0][0].parameters()).device
    batch = batch or default_batch(teacher)
    drawn, seconds = timed(lambda: students.samples(prompts, seed, steps, batch), device)
    made: Any = drawn
    images: list[Any] = [None] * len(prompts)
    for places, x, own in made:
        for place, image in zip(places, decode(own, x, batch), strict=True):
            images[place] = image
    return images_to_samples(torch.stack(images), list(prompts), seconds)


def evaluate_student(
    student: Generator, teacher: Teacher, measure: Protocol, seeds: int
) -> dict[str, Any]:
    """The protocol's figures of a student in all of its steps, with its current weights."""
    return measure(lambda p, seed: student_samples(student, teacher, p, seed), seeds)

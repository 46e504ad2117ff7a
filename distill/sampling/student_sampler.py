"""What is measured: pictures of a teacher's kind, and students by a protocol."""

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
from teachers.errors import UserError
from teachers.teacher import Teacher

PIXELS = 2**22  # of pictures that go through the networks at once: four of 1024×1024
BATCH = 512  # pictures that do, however small


def check_protocol(measure: Protocol, teacher: Teacher) -> None:
    """Refuse a protocol whose prompts the teacher cannot take, before anything is trained."""
    kind, shape = asked_by(teacher), picture_shape(teacher)
    wants = f"labels of {measure.classes} classes" if measure.classes else "captions"
    if kind != wants:
        raise UserError(
            f"protocol {measure.name}: it draws by {wants}, and the teacher by {kind}; leave it "
            "out for other teachers"
        )
    side = measure.side
    if shape[0] != measure.channels or (side is not None and shape[1:] != (side, side)):
        size = f"{side}×{side}" if side else "any size"
        raise UserError(
            f"protocol {measure.name}: its pictures have {measure.channels} channels and {size}, "
            f"the teacher's are {'×'.join(map(str, shape))}; leave it out for other teachers"
        )


def asked_by(teacher: Teacher) -> str:
    """What says which pictures it draws: "captions", "labels of 10 classes", or "nothing"."""
    if classes := teacher.codec.classes:
        return f"labels of {classes} classes"
    return "nothing" if teacher.codec.condition([""]) is None else "captions"


def timed(make: Any, device: torch.device) -> tuple[torch.Tensor, float]:
    """What `make` returns, and the seconds until the device had it."""
    began = time.perf_counter()
    result = make()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began


def at_once(teacher: Teacher) -> int:
    """How many of a teacher's pictures go through the networks at once, where none says more."""
    return max(1, min(BATCH, PIXELS // math.prod(picture_shape(teacher)[1:])))


def decoded(teacher: Teacher, x: Tensor, batch: int) -> Tensor:
    """Pictures (N, C, H, W) on the CPU of data x (N, ...), decoded where those are."""
    with decoder_on(teacher, x.device):
        return torch.cat([teacher.codec.decode(part).cpu() for part in x.split(batch)])


def student_samples(
    student: Generator,
    teacher: Teacher,
    prompts: Sequence[str],
    seed: int,
    batch: int | None = None,
) -> Samples:
    """A student's pictures for the prompts, by the noise that a stock pipeline would draw.

    Args:
        batch: How many go through the networks at once; by default what their size allows.
    """
    device, batch = next(student.parameters()).device, batch or at_once(teacher)
    x, seconds = timed(lambda: sample_student(student, teacher, prompts, seed, batch), device)
    return images_to_samples(decoded(teacher, x, batch), list(prompts), seconds)


def evaluate_student(
    student: Generator, teacher: Teacher, measure: Protocol, seeds: int
) -> dict[str, Any]:
    """A student, run in all of its steps, by the protocol, with the weights that are in place."""
    return measure(lambda p, seed: student_samples(student, teacher, p, seed), seeds)

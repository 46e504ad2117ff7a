"""The first step of a chain learns the teacher's path alone, for variety: DP-DMD.

arXiv:2602.03139, as in LightX2V's code. From the same noise the guided teacher takes `steps` of
`grid` Euler steps, to z at the time s; the student's first step must lead there as well. In a
rectified flow's terms its velocity v must be (noise - z) / (1 - s), an average over [s, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.base import Batch
from distill.objectives.losses import mean_square
from students.generator import Generator
from teachers import conditions
from teachers.denoiser import Denoiser
from teachers.errors import UserError


def check_path(student: Generator, sees: str, path: tuple[int, int]) -> None:
    """Refuse what leaves nothing to match, or a path that does not fit its grid.

    Raises:
        UserError: naming the key.
    """
    if min(student.counts) < 2:
        raise UserError(
            "objective.first_step: it takes the first step from the matching, so a student needs "
            "two at least; raise student.steps, or remove it"
        )
    if sees != "last":
        raise UserError(
            "objective.fake_sees: with first_step no first step is matched; set it to last"
        )
    if path[0] >= path[1]:
        raise UserError(
            f"objective.first_step_path: {path[0]} of {path[1]} steps leave nothing to the "
            "student's later steps; give fewer"
        )


def check_part(size: int, longest: int) -> None:
    """Refuse a part of a batch that has no sample of some step.

    Raises:
        UserError: it has fewer samples than the longest chain has steps.
    """
    if size < longest:
        raise UserError(
            "train.batch: with objective.first_step or split a part needs a sample of each step; "
            "raise it"
        )


def first_step_loss(
    teacher: Denoiser, student: Generator, x: Tensor, batch: Batch, first: int,
    path: tuple[int, int],
) -> tuple[Tensor, Batch]:  # fmt: skip
    """|Δv|² of a rollout's samples of the first step, its mean (), and the batch of the others.

    The first step's samples are the last ones of a batch.

    Args:
        x: The rollout's x̂ (B, ...), with its graph.
        batch: With the unit noise of the rollout.
        first: The place at which the rollout begins.
        path: The teacher's steps, and into how many its grid divides the way from the student's
            first time to 0.
    """
    n = student.remaining(len(x), first)[0]
    later, begun = (
        batch._replace(noise=batch.noise[rows], cond=conditions.rows(batch.cond, rows))
        for rows in (slice(n), slice(n, None))
    )
    process, (steps, grid), z = teacher.process, path, begun.noise
    start = torch.full((len(z),), student.times[0], dtype=torch.float64, device=z.device)
    x_t = begin = z * student.scale(z)
    with torch.no_grad():
        t = start
        for k in range(steps):
            s = process.rounded(start * (1 - (k + 1) / grid))
            x_t = process.step(x_t, teacher(x_t, t.to(z.dtype), begun.cond), t, s)
            t = s
        (alpha, sigma), (alpha_s, sigma_s) = process.at(start, z), process.at(t, z)
        keep = sigma_s / sigma  # of the first state in a step to s; the rest is x̂'s
        target = (x_t - keep * begin) / (alpha_s - alpha * keep)
    flow_time = (sigma / (alpha + sigma)).flatten()
    return (mean_square(x[n:], target) / flow_time.square()).mean(), later

"""The first step of a chain learns the teacher's path alone, for variety: DP-DMD.

arXiv:2602.03139, as in LightX2V's code. From the same noise the guided teacher takes `steps` of
`grid` Euler steps, to z at the time s; the student's first step must lead there as well. In a
rectified flow's terms its velocity v must be (noise - z) / (1 - s), an average over [s, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.losses import mean_square
from students.generator import Generator
from teachers.conditions import Cond
from teachers.denoiser import Denoiser
from teachers.errors import UserError


def check_first_step(student: Generator, sees: str, path: tuple[int, int]) -> None:
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


def first_step_loss(
    teacher: Denoiser, student: Generator, x: Tensor, z: Tensor, cond: Cond, path: tuple[int, int]
) -> Tensor:
    """|Δv|², the mean over dimensions and samples: ().

    Args:
        x: The student's x̂ (B, ...) at its first step, with its graph.
        z: The unit noise (B, ...) of the chain.
        path: The teacher's steps, and into how many its grid divides the way from the student's
            first time to 0.
    """
    process, (steps, grid) = teacher.process, path
    start = torch.full((len(z),), student.times[0], dtype=torch.float64, device=z.device)
    x_t = begin = z * student.scale(z)
    with torch.no_grad():
        t = start
        for k in range(steps):
            s = process.rounded(start * (1 - (k + 1) / grid))
            x_t = process.step(x_t, teacher(x_t, t.to(z.dtype), cond), t, s)
            t = s
        (alpha, sigma), (alpha_s, sigma_s) = process.at(start, z), process.at(t, z)
        keep = sigma_s / sigma  # of the first state in a step to s; the rest is x̂'s
        target = (x_t - keep * begin) / (alpha_s - alpha * keep)
    flow_time = (sigma / (alpha + sigma)).flatten()
    return (mean_square(x, target) / flow_time.square()).mean()

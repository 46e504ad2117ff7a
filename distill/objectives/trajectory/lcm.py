"""Latent consistency: the student's x̂ is the same along the guided teacher's DDIM path.

`LCM` is latent consistency distillation, Luo et al. 2023 (arXiv:2310.04378). t is drawn from a DDIM
grid, and x_r is one step of the guided teacher from x_t to the next lower time r of the grid: the
paper's skipping step, of 20 indices on 50 levels. Guidance mixes x̂, so the step follows the mix of
x̂ and of ε̂. LCM-LoRA (arXiv:2311.05556) is the same objective with an adapter as the student, one
guidance scale and `target_ema: 0`. `path: data` is latent consistency fine-tuning (LCF), which
learns from one's own images alone: x_r has the noise of x_t.

Costs 2 forwards of the student, one of them without gradient, and 1 of the teacher (2 if guided;
0 with `path: data`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from distill.field_types import Fraction, NonNegative, PositiveInt
from distill.objectives.base import Batch
from distill.objectives.consistency.pairwise import Pairwise
from distill.objectives.losses import element_huber
from teachers.errors import UserError


@dataclass(kw_only=True)
class LCM(Pairwise):
    levels: Annotated[PositiveInt, Ge(2)] = 50  # of the DDIM grid, evenly spaced in time
    path: Literal["teacher", "data"] = "teacher"  # of x_r: the teacher's step, or LCF's line
    huber_c: NonNegative | None = 1e-3  # of each element
    target_ema: Fraction = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            covered = self.student.denoiser.process.levels(self.levels)[-1] == 1
        except ValueError:
            covered = False
        if not covered:
            raise UserError(
                f"objective.levels: {self.levels} does not divide the indices of the teacher's "
                "noise; give a number that does, such as 50 or 40 of 1000"
            )

    def sample_times(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Neighbours t > r (B,) of the grid, each pair as likely."""
        grid = self.grid(x)
        cell = torch.randint(len(grid) - 1, (len(x),), device=x.device)
        return grid[cell + 1], grid[cell]

    def grid(self, x: Tensor) -> Tensor:
        """The times of the grid, from 0 up to 1, on the device of x."""
        times = self.student.denoiser.process.levels(self.levels)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.tensor(times, dtype=dtype).to(x.device, non_blocking=True)

    def ode_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """x_r: one DDIM step of the guided teacher, or with LCF on the line to the datum."""
        if self.path == "data":
            return self.student.denoiser.process.noise(batch.data, r, batch.noise)
        return self.teacher.process.step(x_t, self.teacher(x_t, t, batch.cond), t, r)

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(t)

    def distances(self, x: Tensor, target: Tensor) -> Tensor:
        """The distance (B,): the pseudo-Huber distance or the square of each element, averaged."""
        if self.distance == "square":
            return (x - target).square().flatten(1).mean(1)
        return element_huber(x, target, 1e-3 if self.huber_c is None else self.huber_c)

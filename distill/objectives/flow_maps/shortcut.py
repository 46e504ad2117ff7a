"""Shortcut models: one jump must land where two jumps of half its length do.

Frans et al. 2024 (arXiv:2410.12557). Lengths are 1, ½, ¼, … of the range of times, down to two
steps of the finest grid (`levels`), and start on multiples of themselves. Most samples learn the
velocity, as the jump from t to t, from the teacher or, as in the paper, from data (`velocity`). The
rest learn from two half jumps of an average of the student; below the finest length, those are
steps along the velocity.

Written with x̂: the target is the x̂ whose step t → s lands where the two half steps do. On a
rectified flow this is the mean of their two velocities. Costs forwards: 1 of the student with
gradients, the teacher's 1 for samples that learn its velocity, and 2 for those of half jumps.

Differs from the authors' code: times are the process's own (the same on a rectified flow); the
network reads the landing time and not log2 of the length; the teacher's guidance, where there is
any, reaches long jumps through the velocity, as theirs does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from distill.field_types import Fraction, Positive, PositiveInt
from distill.objectives.base import Batch, Loss
from distill.objectives.consistency.pairwise import Pairwise
from distill.objectives.flow_maps.rectified import flow_time
from distill.objectives.losses import mean_square
from teachers import conditions
from teachers.denoiser import Cond
from teachers.errors import UserError


@dataclass(kw_only=True)
class Shortcut(Pairwise):
    velocity: Literal["teacher", "data"] = "teacher"
    # Steps of the finest grid, a power of two; float32 tells no more of them apart.
    levels: Annotated[PositiveInt, Ge(2), Le(1 << 20)] = 128
    bootstrap: Fraction = 0.125  # the share of samples that learn from two half jumps
    clip: Positive | None = None  # of targets and of states between the halves; theirs is 4
    target_ema: Fraction = 0.999

    two_times: ClassVar[bool] = True
    shares: ClassVar[tuple[str, ...]] = ("bootstrap",)
    unused: ClassVar[tuple[str, ...]] = ("distance", "huber_c")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels & (self.levels - 1):
            raise UserError(
                f"objective.levels: {self.levels} is no power of two; set it to "
                f"{1 << (self.levels.bit_length() - 1)}"
            )

    def loss(self, batch: Batch, step: int) -> Loss:
        f, process = self.student.denoiser, self.student.denoiser.process
        t, s = self.sample_times(batch.data)
        x_t = process.noise(batch.data, t, batch.noise)
        rows = slice(self.jumps(batch.data), None)  # those that learn the velocity
        with torch.no_grad():
            target = batch.data.clone()
            if self.velocity == "teacher" and len(x_t[rows]):
                target[rows] = self.teacher(x_t[rows], t[rows], conditions.rows(batch.cond, rows))
            rest = slice(None, rows.start)
            if rows.start:
                cond = conditions.rows(batch.cond, rest)
                target[rest] = self.two_halves(x_t[rest], t[rest], s[rest], cond)
        x = f(x_t, t, batch.cond, s)
        tau = flow_time(process, t).tau.to(x.dtype)
        error = mean_square(x, target) / tau**2  # of the velocity
        return Loss(error.mean(), {"error": error.detach().mean()}, x)

    def jumps(self, x: Tensor) -> int:
        """How many samples of a batch, its first, learn from two half jumps."""
        return round(self.bootstrap * len(x))

    def sample_times(self, x: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Times t ≥ s (B,), apart by a power of two of the finest step; equal for the velocity."""
        size, depth = len(x), self.levels.bit_length() - 1
        jumping = torch.arange(size, device=x.device) < self.jumps(x)
        length = torch.ones(size, dtype=torch.long, device=x.device)
        length = length << torch.randint(1, depth + 1, (size,), device=x.device)  # in finest steps
        length = torch.where(jumping, length, torch.ones_like(length))
        place = (torch.rand(size, device=x.device) * (self.levels // length)).long() + 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = (place * length).to(dtype) / self.levels
        return t, torch.where(jumping, t - length / self.levels, t)

    def two_halves(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """The x̂ whose step t → s lands where the target network's two half steps do."""
        process, middle = self.student.denoiser.process, (t + s) / 2
        finest = t - s < 2.5 / self.levels  # its halves are steps along the velocity
        x = self.target(x_t, t, cond, torch.where(finest, t, middle))
        x_m = self.clipped(process.step(x_t, x, t, middle))
        x = self.target(x_m, middle, cond, torch.where(finest, middle, s))
        x_s = process.step(x_m, x, middle, s)
        return self.clipped(process.end(x_t, x_s, t, s))

    def clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

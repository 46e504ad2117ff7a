"""sCM: consistency in continuous time, whose gradient is the derivative of x̂ along the ODE path.

Lu and Song 2024 (arXiv:2410.11081). The angle θ has tan θ = σ / (α σ_data), so that TrigFlow's
point x_θ = cos θ x + sin θ σ_data ε is any process's x_t, rescaled, and x̂ is the same. TrigFlow's
network is F = (cos θ x_θ - x̂) / (σ_data sin θ). Its loss descends cos θ dx̂/dθ.

| path | dx_t/dt from | network evaluations in a step, in forward passes |
|---|---|---|
| teacher (sCD) | the teacher's x̂ | teacher 1, value and derivative 2, backward pass 2 |
| data (sCT) | the datum | value and derivative 2, backward pass 2 |

The value of the differentiation is the one whose gradient is taken. `derivative: stacked` adds 2
for the second half of its batch.

Differs from the paper: the network keeps the teacher's own time input, log σ for EDM. The factors
cos θ and sin θ make the derivative finite at both ends with any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from distill.field_types import Fraction, NonNegative, NonNegativeInt, Positive
from distill.objectives.base import Auxiliary, Batch, Learns, Loss, Objective, Turn
from distill.objectives.noise_levels import LogNormal, Times
from distill.objectives.tangent import tangent
from teachers.conditions import tiled
from teachers.process import Process, expand

SMALL = 1e-4  # of sin θ, below which it is a divisor no more


class Weighting(Auxiliary):
    """w(θ), which learns -log E|g|²/d: the loss has then the same size at all times.

    Linear in cosines and sines of multiples of θ, and zero at first.
    """

    def __init__(self, waves: int = 32) -> None:
        super().__init__()
        self.out = nn.Linear(2 * waves, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, angle: Tensor) -> Tensor:
        """(B,), of angles (B,)."""
        counts = torch.arange(self.out.in_features // 2, device=angle.device)
        waves = angle.to(self.out.weight.dtype)[:, None] * counts
        return self.out(torch.cat([waves.cos(), waves.sin()], 1))[:, 0]


@dataclass(kw_only=True)
class ContinuousConsistency(Objective):
    weighting: Weighting
    path: Literal["teacher", "data"] = "teacher"
    times: Times = LogNormal(-1.0, 1.4)
    sigma_data: Positive = 0.5  # of the data
    # "discrete" takes x̂ at two angles of the path.
    derivative: Literal["forward", "difference", "stacked", "discrete"] = "forward"
    derivative_step: Positive = 1e-3  # of all but "forward"; an angle for "discrete"
    # |g| / (|g| + norm_floor), with the norm of a whole sample or its root mean square; or g in ±1
    norm: Literal["whole", "rms", "clip"] = "whole"
    norm_floor: NonNegative = 0.1
    tangent_warmup: NonNegativeInt = 10_000  # steps until the derivative counts in full
    tangent_share: Fraction = 1.0  # that it counts then; below 1 the teacher's x̂ pulls, as AYF's
    prior: bool = False  # a further factor 1 / (σ_data tan θ), which some codes have

    learns: ClassVar[Learns] = "all-times"
    differentiates_time: ClassVar[bool] = True

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("student", "weighting"), partial(self.loss, step=step))

    def loss(self, batch: Batch, step: int) -> Loss:
        process = self.student.denoiser.process
        t = self.times.sample(batch.data, process)
        x_t = process.noise(batch.data, t, batch.noise)
        end = batch.data
        if self.path == "teacher":
            with torch.no_grad():
                end = self.teacher(x_t, t, batch.cond)
        x, slope = self.differentiated(x_t, t, end, batch)
        angle = self.angle(t.double())
        sin, cos = (expand(v, x).to(x.dtype) for v in (angle.sin().clamp(min=SMALL), angle.cos()))
        g = self.direction(x.detach(), slope, end, sin, cos, step)
        gap = (x.detach() - x) / (self.sigma_data * sin) - self.normalised(g)  # F - sg F - g
        weight = self.weighting(angle)
        value = weight.exp() * gap.square().flatten(1).mean(1) - weight
        if self.prior:
            value = value * (cos / sin).flatten() / self.sigma_data
        logs = {"tangent": g.flatten(1).norm(dim=1).mean(), "weight": weight.detach().mean()}
        return Loss(value.mean(), logs, x)

    def angle(self, t: Tensor) -> Tensor:
        """θ in [0, π/2] at times t (B,)."""
        alpha, sigma = self.student.denoiser.process.scales(t)
        return torch.atan2(sigma / self.sigma_data, alpha)

    def differentiated(
        self, x_t: Tensor, t: Tensor, end: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """x̂ with its graph, and cos θ dx̂/dθ along the path whose denoised end is `end`."""
        f, process = self.student.denoiser, self.student.denoiser.process
        t64 = t.double()
        angle, speed = torch.func.jvp(self.angle, (t64,), (torch.ones_like(t64),))[:2]
        if self.derivative == "discrete":
            r = self.earlier(angle, process).to(t.dtype)
            x = f(x_t, t, batch.cond)
            x_r = process.step(x_t, end, t, r)
            with torch.no_grad():
                before = torch.where(expand(r == 0, x), x_r, f(x_r, r, batch.cond))
            rate = angle.cos() / (angle - self.angle(r.double())).sin().clamp(min=1e-9)
            return x, (x.detach() - before) * expand(rate, x).to(x.dtype)
        rate = (angle.cos() / speed).to(t.dtype)  # cos θ dt/dθ
        move = process.velocity(x_t, end, t) * expand(rate, x_t)
        call = lambda x_t, t: f(x_t, t, tiled(batch.cond, len(t)))  # noqa: E731
        how, step = self.derivative, self.derivative_step
        return tangent(call, (x_t, t), (move, rate), how, step, graph=True)

    def earlier(self, angle: Tensor, process: Process) -> Tensor:
        """The times `derivative_step` before these angles, or 0."""
        before = (angle - self.derivative_step).clamp(min=0)
        return process.time(before.tan() * self.sigma_data).clamp(min=0)

    def direction(
        self, x: Tensor, slope: Tensor, end: Tensor, sin: Tensor, cos: Tensor, step: int
    ) -> Tensor:
        """g (B, ...), before it is normalised, in the units of σ_data F.

        It is -cos² θ (σ_data F - dx_θ/dθ) - r cos θ sin θ (x_θ + σ_data dF/dθ), where r grows from
        0 to 1 in `tangent_warmup` steps; with r = 1 it is cos θ dx̂/dθ.
        """
        r = self.tangent_share * min(1.0, (step + 1) / (self.tangent_warmup + 1))
        return r * slope + (1 - r) * cos**2 / sin * (x - end)

    def normalised(self, g: Tensor) -> Tensor:
        """g (B, ...) divided by its own norm, or clipped."""
        if self.norm == "clip":
            return g.clamp(-1, 1)
        size = torch.linalg.vector_norm(g.flatten(1), dim=1)
        if self.norm == "rms":
            size = size / g[0].numel() ** 0.5
        return g / (expand(size, g) + self.norm_floor)

"""Lagrangian self-matching: where the student lands, it moves as the teacher's path does there.

Boffi et al. 2024 (arXiv:2406.07507), the Lagrangian loss of flow maps, from noise alone. Let x_s be
the student's landing at s from x_t. As s falls, x_s must follow the teacher's velocity at x_s. In
the rectified flow's times τ of t and σ of s, and written with x̂, that is

    x̂(x_t, t, s) = D(x_s, s) + σ (1 - σ/τ) ∂x̂/∂σ

of the teacher's denoiser D, and the loss is the error of it with the right-hand side held fixed.
x_s is the student's own, so there are no data, no fake score and no critic. At s = t it is
D(x_t, t), from where the derivative carries it down to 0.

x_t are noise and, of a student of several steps, what its own chain comes to. s is between t and
the next time of the ODE's chain, or 0 where x̂ is renoised.

Costs, besides the chain, 1 forward of the teacher and 2 of the student, one with gradients.

Differs from the paper: gradients reach the student at x̂ alone, neither through the derivative nor
through the teacher at x_s, and each sample is weighted by its error as MeanFlow's are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import Fraction, NonNegative, Positive
from distill.objectives.base import Batch, Loss, Objective
from distill.objectives.flow_maps.rectified import flow_time
from distill.objectives.tangent import How, tangent
from students.generator import Generator
from teachers import conditions
from teachers.process import expand


@dataclass(kw_only=True)
class Lagrangian(Objective):
    equal: Fraction = 0.25  # the share of samples with s = t, which learn the denoiser
    power: NonNegative = 1.0  # p of the weight 1 / (|error|² + offset)^p
    offset: Positive = 0.01
    derivative: How = "forward"
    derivative_step: Positive = 1e-3  # of differences, in the process's t

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "never"
    two_times: ClassVar[bool] = True

    def loss(self, batch: Batch, step: int) -> Loss:
        student, first = self.student.sample_chain()
        with torch.no_grad():
            x_t = student.inputs(batch.noise, batch.cond, first)
        t = student.ends(batch.noise, first)
        s = self.landings(student, batch.noise, first)
        x, error = self.error(x_t, t, s, batch)
        tau = expand(flow_time(student.denoiser.process, t).tau, x).to(x.dtype)
        square = ((x - x.detach() - error) / tau).square().flatten(1).sum(1)
        value = ((square.detach() + self.offset) ** -self.power * square).mean()
        return Loss(value, {"error": square.detach().mean()}, x)

    def landings(self, student: Generator, noise: Tensor, first: int) -> Tensor:
        """Times s (B,) between those of a rollout's last steps and their landings; some equal t."""
        t = student.ends(noise, first)
        low = torch.zeros_like(t) if student.renoise else student.landings(noise, first)
        s = low + (t - low) * torch.rand_like(t)
        return torch.where(torch.rand_like(t) < self.equal, t, s)

    def error(self, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x̂ (B, ...) with its graph, and what it lacks to obey the identity."""
        f, process, cond = self.student.denoiser, self.student.denoiser.process, batch.cond
        along = torch.zeros_like(x_t), torch.zeros_like(t), torch.ones_like(s)
        call = lambda x_t, t, s: f(x_t, t, conditions.tiled(cond, len(t)), s)  # noqa: E731
        x, slope = tangent(
            call, (x_t, t, s), along, self.derivative, self.derivative_step, graph=True
        )
        with torch.no_grad():
            end = self.teacher(process.step(x_t, x.detach(), t, s), s, cond)
        tau, (landing, rate) = flow_time(process, t).tau, flow_time(process, s)
        scale = expand(landing * (1 - landing / tau) / rate, x).to(x.dtype)
        return x, end + scale * slope - x.detach()

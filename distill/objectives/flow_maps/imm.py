"""IMM: jumps to s from two near times must have the same distribution, told apart by a kernel.

Zhou et al. 2025 (arXiv:2503.07565). y is the student's jump t → s of data noised to t, and z, held
fixed, that of the same data and noise from r, a little below t. Groups of samples share t, s and r;
the loss is their squared maximum mean discrepancy. Where r = s, z is data noised to s, which the
jump maps on itself. There is no teacher after the start, no derivative and no average of weights.
With groups of one it is a consistency loss through a kernel.

States are compared as a rectified flow's, x_t/(α + σ), whose kernel and weight the paper has. Costs
2 forwards, one with gradients.

Differs from the authors' code: r is below t by `gap` in σ/α, or with `clock: time` in the process's
own time, whatever the teacher; a process that ends with some noise has s there and not at ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative, Positive, PositiveInt, Real
from distill.objectives.base import Batch, Learns, Loss, Objective
from distill.objectives.flow_maps.rectified import flow_time
from distill.objectives.noise_levels import Times, Uniform
from teachers.errors import UserError
from teachers.process import expand

CLOSEST = 1e-4  # r is at least as far below t as this


@dataclass(kw_only=True)
class IMM(Objective):
    times: Times = Uniform(0.0, 0.994)  # of t; s is uniform below it
    gap: Positive = 160 / 2**12  # between t and r
    clock: Literal["ratio", "time"] = "ratio"  # in σ/α, or in the process's own time
    group: PositiveInt = 4  # samples that share their times
    diagonal: bool = True  # whether a sample's own pairs count: the biased estimate, as theirs
    sigma_data: Positive = 0.5  # of the kernel's scale
    shift: Real = 4.0  # b of the weight σ(b - λ), of the log SNR λ
    power: NonNegative = 1.0  # a of its factor α^a

    two_times: ClassVar[bool] = True
    learns: ClassVar[Learns] = "all-times"

    def check_batch(self, shape: tuple[int, ...]) -> None:
        size = shape[0]
        if size % self.group:
            raise UserError(
                f"objective.group: {size} samples of a part of the batch do not divide into "
                f"groups of {self.group}; change it, train.batch or train.accumulate"
            )

    def loss(self, batch: Batch, step: int) -> Loss:
        x, process = batch.data, self.student.denoiser.process
        self.check_batch(x.shape)
        t, s, r = self.sample_times(x)
        y, x_hat = self.jump(process.noise(x, t, batch.noise), t, s, batch)
        with torch.no_grad():
            z = self.jump(process.noise(x, r, batch.noise), r, s, batch)[0]
        tau, landing = flow_time(process, t).tau, flow_time(process, s).tau
        scale = 1 / ((tau - landing) * self.sigma_data)
        scale, weight = (v[:: self.group].to(y.dtype) for v in (scale, self.weight(tau)))
        square = self.discrepancy(y, z, scale)
        return Loss((weight * square).mean(), {"discrepancy": square.detach().mean()}, x_hat)

    def sample_times(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Times t > s and r between them, (B,) each, the same within a group."""
        process, first = self.student.denoiser.process, x[:: self.group]
        t = self.times.sample(first, process).double().clamp(min=2 * CLOSEST)
        s = t * torch.rand(len(first), device=x.device)
        if self.clock == "ratio":
            alpha, sigma = process.scales(t)
            r = process.time((sigma / alpha - self.gap).clamp(min=0)).clamp(0, 1)
        else:
            r = t - self.gap
        s = torch.minimum(s, t - CLOSEST)
        r = torch.maximum(s, torch.minimum(t - CLOSEST, r))
        dtype = torch.promote_types(x.dtype, torch.float32)
        t, s, r = (v.repeat_interleave(self.group).to(dtype) for v in (t, s, r))
        return t, s, r

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_s (B, ...) in a rectified flow's coordinates, and the x̂ behind it."""
        process = self.student.denoiser.process
        x = self.student.denoiser(x_t, t, batch.cond, s)
        x_s = torch.where(expand(s == t, x_t), x_t, process.step(x_t, x, t, s))
        alpha, sigma = process.at(s, x_s)
        return x_s / (alpha + sigma), x

    def discrepancy(self, y: Tensor, z: Tensor, scale: Tensor) -> Tensor:
        """The squared discrepancy of y and z (B, ...) within each group, (groups,)."""
        size = y[0].numel()
        y, z = (v.flatten(1).unflatten(0, (-1, self.group)) for v in (y, z))  # (groups, M, d)
        terms = []
        for a, b in ((y, y), (z, z), (y, z)):
            square = (a[:, :, None] - b[:, None]).square().sum(-1)
            gap = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
            kernel = torch.exp(-scale[:, None, None] * gap / size)
            terms.append(self.mean(kernel))
        return terms[0] + terms[1] - 2 * terms[2]

    def mean(self, kernel: Tensor) -> Tensor:
        """The mean over pairs of a group (groups, M, M), (groups,)."""
        if self.diagonal or self.group == 1:
            return kernel.mean((1, 2))
        total = kernel.sum((1, 2)) - kernel.diagonal(dim1=1, dim2=2).sum(1)
        return total / (self.group * (self.group - 1))

    def weight(self, tau: Tensor) -> Tensor:
        """½ σ(b - λ) (-dλ/dτ) α^a / (α² + σ²) at flow times (B,)."""
        tau = tau.clamp(1e-4, 1 - 1e-4)
        log_snr = 2 * torch.log((1 - tau) / tau)
        rate = 2 / (tau * (1 - tau))
        share = torch.sigmoid(self.shift - log_snr) * (1 - tau) ** self.power
        return 0.5 * share * rate / ((1 - tau) ** 2 + tau**2)

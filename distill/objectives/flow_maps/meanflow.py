"""Flow maps by a total derivative: the average velocity from t to s obeys a differential equation.

MeanFlow, Geng et al. 2025 (arXiv:2505.13447). Let u(z, t, s) be the average velocity of the
rectified flow from its time t to s, and v the velocity at t. Then u = v - (t - s) du/dt along the
path, and the loss is the error of this identity with the right-hand side held fixed. Fields choose:

- `velocity`: v of the teacher (distillation), or of the datum, ε - x (training).
- `direction`: du/dt along that v, or along the student's own velocity u(z, t, t), as improved
  MeanFlow has it (arXiv:2512.02012). Then the prediction of v depends on z alone, not on the datum.

`AYF` is Align Your Flow, Sabour et al. 2025 (arXiv:2506.14603), Eulerian: the same error as a
tangent of limited length, with the derivative's weight rising during training.

Written with x̂ = z - t u, it suits any process. Costs forwards: 1 of the teacher if it gives v; of
the student 1 for samples with s = t, 2 for others, and 1 more if its own velocity is followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from distill.field_types import Fraction, NonNegative, NonNegativeInt, Positive
from distill.objectives.base import Batch, Learns, Loss, Objective
from distill.objectives.flow_maps.rectified import flow_time
from distill.objectives.noise_levels import LogNormal, Times
from distill.objectives.tangent import How, tangent
from teachers import conditions
from teachers.conditions import Cond
from teachers.process import expand


class Jump(NamedTuple):
    """Samples at t, and where they land: x_t (B, ...), t and s (B,)."""

    x_t: Tensor
    t: Tensor
    s: Tensor


@dataclass(kw_only=True)
class MeanFlow(Objective):
    velocity: Literal["teacher", "data"] = "teacher"
    direction: Literal["velocity", "own"] = "velocity"
    times: Times = LogNormal(-0.4, 1.0)  # of t and s, sorted; this is the paper's logit-normal
    landings: Times | None = None  # a distribution of its own for the second draw
    equal: Fraction = 0.75  # the share of samples with s = t, which learn v
    power: NonNegative = 1.0  # p of the weight 1 / (|error|² + offset)^p
    offset: Positive = 0.01
    derivative: How = "forward"
    derivative_step: Positive = 1e-3  # of differences, in the process's t

    two_times: ClassVar[bool] = True
    learns: ClassVar[Learns] = "all-times"
    shares: ClassVar[tuple[str, ...]] = ("equal",)

    def loss(self, batch: Batch, step: int) -> Loss:
        process = self.student.denoiser.process
        t, s = self.sample_times(batch.data)
        jump = Jump(process.noise(batch.data, t, batch.noise), t, s)
        x, error = self.predicted(jump, batch, step)
        tau = expand(flow_time(process, t).tau, x).to(x.dtype)
        gap = (x - x.detach() - error) / tau
        square = gap.square().flatten(1).sum(1)
        value = (self.weight(gap.detach(), tau.flatten()) * square).mean()
        return Loss(value, {"error": square.detach().mean()}, x)

    def sample_times(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Times t ≥ s (B,) for data x (B, ...); equal in the first samples of the batch."""
        process = self.student.denoiser.process
        first = self.times.sample(x, process)
        second = (self.landings or self.times).sample(x, process)
        t, s = torch.maximum(first, second), torch.minimum(first, second)
        return t, torch.where(torch.arange(len(x), device=x.device) < self.count(x), t, s)

    def count(self, x: Tensor) -> int:
        """How many samples of a batch have s = t."""
        return round(self.equal * len(x))

    def predicted(self, jump: Jump, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """x̂ (B, ...) with its graph, and what it lacks to obey the identity: t times u's error.

        The value of the differentiation is the x̂ of its samples, so no network is called again.
        """
        f, teacher, count = self.student.denoiser, self.velocity == "teacher", self.count(jump.x_t)
        with torch.no_grad():
            end = self.teacher(jump.x_t, jump.t, batch.cond) if teacher else batch.data
        found = []
        for rows in (slice(count), slice(count, None)):
            x_t, t, s = part = Jump(*(v[rows].clone() for v in jump))  # views may carry no tangent
            if not len(x_t):
                continue
            cond = conditions.rows(batch.cond, rows)
            if rows.stop is not None:  # those with s = t
                x = f(x_t, t, cond, s)
                found.append((x, end[rows] - x.detach()))
                continue
            x, change = self.change(end[rows], part, cond)
            found.append((x, end[rows] - x.detach() + self.share(step) * change))
        return torch.cat([x for x, _ in found]), torch.cat([error for _, error in found])

    def change(self, end: Tensor, jump: Jump, cond: Cond) -> tuple[Tensor, Tensor]:
        """x̂ (B, ...) with its graph, and t (t - s) du/dt along the path.

        The path leads to `end`, or to the student's own x̂ at (t, t).
        """
        (x_t, t, s), process, f = jump, self.student.denoiser.process, self.student.denoiser
        if self.direction == "own":
            with torch.no_grad():
                end = f(x_t, t, cond, t)
        along = (process.velocity(x_t, end, t), torch.ones_like(t), torch.zeros_like(s))
        call = lambda x_t, t, s: f(x_t, t, conditions.tiled(cond, len(t)), s)  # noqa: E731
        x, slope = tangent(
            call, (x_t, t, s), along, self.derivative, self.derivative_step, graph=True
        )
        (tau, rate), landing = flow_time(process, t), flow_time(process, s).tau
        kept, scale = (
            expand(v, x).to(x.dtype) for v in (1 - landing / tau, (tau - landing) / rate)
        )  # slope is by the process's time
        return x, kept * (x.detach() - end) - scale * slope

    def share(self, step: int) -> float:
        """The weight of the derivative."""
        return 1.0

    def weight(self, gap: Tensor, tau: Tensor) -> Tensor:
        """Each sample's weight (B,), by its error in u (B, ...) and its flow time (B,)."""
        return (gap.square().flatten(1).sum(1) + self.offset) ** -self.power


@dataclass(kw_only=True)
class AYF(MeanFlow):
    """Align Your Flow: along g / (|g| + offset), -g being MeanFlow's error; at s = 0 sCM's."""

    equal: Fraction = 0.0
    offset: Positive = 0.1
    warmup: NonNegativeInt = 0  # steps until the derivative has its weight
    limit: Fraction = 0.99  # that weight; below 1, a little of the pull towards v stays

    unused: ClassVar[tuple[str, ...]] = ("power",)

    def share(self, step: int) -> float:
        return self.limit * min(1.0, step / self.warmup if self.warmup else 1.0)

    def weight(self, gap: Tensor, tau: Tensor) -> Tensor:
        return 1 / (gap.square().flatten(1).sum(1).sqrt() + self.offset)

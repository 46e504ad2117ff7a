"""DDO: a diffusion model is its own discriminator, and so becomes better than its reference.

Zheng et al. 2025 (arXiv:2503.01103). The teacher is the reference, and the student a copy of it.
Λ(x) = log p_θ/p_ref is estimated at one noise level and one noise as the difference of the two
networks' own denoising losses, summed over dimensions: |F_ref - F̂|² - |F_θ - F̂|², where F is what
the network predicts. The loss is that of a logistic discriminator with the logit β Λ, between data
and samples of the reference, which count α times:

    -log σ(β Λ(data)) - α log σ(-β Λ(sample))

With β = α = 1 its optimum is the data's distribution. For other values the published optimum,
∝ p_ref^(1 - 1/β) p_data^(1/β), holds only for models that need not be normalised. As θ starts as
the reference, Λ is 0 at first, and the loss (1 + α) log 2.

It strengthens a model of many steps: the student learns at all times, and with `student.renoise:
false` it leaves as the teacher's own kind of model. For a further round take that folder as the
teacher. Costs, for each noise level, 2 forwards of the student and 2 of the teacher; and the
samples `solver_steps` of the solver, which `levels` noise levels share.

Differs from the paper: the reference's samples are drawn in training, by a solver, in place of
tens of thousands made before; each sample and datum is seen at `levels` noise levels at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.field_types import NonNegative, Positive, PositiveInt
from distill.objectives.base import Batch, Learns, Loss, Objective
from distill.objectives.noise_levels import LogNormal, Times
from teachers import conditions
from teachers.denoiser import Cond, Guided
from teachers.errors import UserError
from teachers.solver import solve


@dataclass(kw_only=True)
class DDO(Objective):
    beta: Positive = 0.05  # of the log-ratio, which grows with the data's dimensions
    alpha: NonNegative = 1.0  # weight of the reference's samples
    times: Times = LogNormal(-1.2, 1.2)
    levels: PositiveInt = 4  # noise levels that a sample is seen at, each a term of its own
    solver: Literal["heun", "dpmpp_2m", "ddim"] = "heun"  # that draws the reference's samples
    solver_steps: PositiveInt = 18

    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        if any(isinstance(m, Guided) and m.scale != 1 for m in self.teacher.modules()):
            raise UserError(
                "teacher.guidance: a guided teacher is no model whose likelihood the student's "
                "could be compared with; remove it"
            )

    def loss(self, batch: Batch, step: int) -> Loss:
        with torch.no_grad():
            x = solve(self.teacher, batch.noise, self.solver_steps, self.solver, batch.cond)
        data, sample = (self.log_ratio(v, batch.cond) for v in (batch.data, x))
        correct = torch.cat([data > 0, sample < 0]).float().mean()
        logs = {"data": data.detach().mean(), "sample": sample.detach().mean(), "accuracy": correct}
        return Loss(ratio_loss(data, sample, self.beta, self.alpha), logs)

    def log_ratio(self, x: Tensor, cond: Cond) -> Tensor:
        """Λ (B · levels,) of clean x (B, ...), at one noise level each."""
        x = torch.cat([x] * self.levels)
        cond = conditions.joined(*[cond] * self.levels)
        network = self.student.denoiser
        t = self.times.sample(x, network.process)
        x_t = network.process.noise(x, t, torch.randn_like(x))
        with torch.no_grad():
            before = (self.teacher(x_t, t, cond) - x).square().flatten(1).sum(1)
        now = (network(x_t, t, cond) - x).square().flatten(1).sum(1)
        return self.teacher.weight(t) * (before - now)


def ratio_loss(data: Tensor, sample: Tensor, beta: float, alpha: float) -> Tensor:
    """The loss () of log-ratios Λ (B,) of data and of the reference's samples."""
    return F.softplus(-beta * data).mean() + alpha * F.softplus(beta * sample).mean()

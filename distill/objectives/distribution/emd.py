"""EM distillation: the teacher corrects the student's noised samples, and the student follows.

EMD, Xie et al. 2024 (arXiv:2405.16852). A noised sample is x_t = α g(z) + σ ε. With the teacher's
noised law p_t and the student's q_t, the joint law N(ε) N(z) p_t(x_t) / q_t(x_t) has the teacher's
x_t. The E-step takes `inner_steps` of Langevin's dynamics on it, of ε and z, from the student's own
samples. With u = s_T - s_F = α (T - F) / σ² at x_t, of the teacher T and the fake score F:

    ε ← ε + ½ γ_ε² (σ u - ε) + γ_ε n        z ← z + ½ γ_z² (α Jᵀu - z) + γ_z n'

The M-step fits α g(z) to the x_t that the walk ends at: its gradient of x̂ is -(α/σ) ε, which
`weighting` scales as in Diff-Instruct (`kl` is the plain one). One step gives the gradient of
KL(student ‖ teacher) times ½ γ_ε²; a walk that has mixed gives that of KL(teacher ‖ student). How
far z moves decides which of the two it is.

Most of ε is noise: what it began with and all n. `cancel` says what is subtracted of the gradient:

| cancel | subtracted from ε ∂g(z) | |
|---|---|---|
| `none` | nothing | no bias, and a deviation of ten times the mean and more |
| `drawn` | (ε_0 + γ_ε Σn) ∂g(z) | biased where z moves: it depends on that noise |
| `decayed` | ε' ∂g(z), of ε' with the same noise and without u | biased in the same way |
| `paired` | ε' ∂g(z'), of ε' and z' without u | no bias: ε' and z' are independent |

`paired` is the default and ours; which noise the paper cancels was not checked against its text.
Where z stays, it is `decayed`. On Gaussians, with γ of 0.2 and 256 steps, the gradient of a
student's scale is -0.744 with `none` and with `paired`, -0.578 with `decayed` and +0.114 with
`drawn`; that of KL(teacher ‖ student) is -0.783.

Needs no data. A turn of the student costs, with K steps, K forwards of the teacher and K of the
fake, and K + 1 forwards of the student, K products with its Jacobian and 1 backward; `paired` has
one more forward and backward. With `latent_step: 0` the student has 1 forward and 1 backward. The
fake learns from the student's own samples, in a turn of 1 forward of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distill.field_types import NonNegative, Positive, PositiveInt
from distill.objectives.base import Batch, Loss
from distill.objectives.distribution.diff_instruct import DiffInstruct
from distill.objectives.losses import surrogate
from students.generator import Generator
from teachers import conditions
from teachers.errors import UserError


class Walk(NamedTuple):
    """Where a walk is: noise ε and latent z, (B, ...); and those without the force."""

    eps: Tensor
    z: Tensor
    free_eps: Tensor  # what `cancel` subtracts: ε', or all noise that was drawn
    free_z: Tensor


@dataclass(kw_only=True)
class EMD(DiffInstruct):
    inner_steps: PositiveInt = 4  # K, of the E-step; the authors' are 16 and 8
    noise_step: Positive = 0.4  # γ_ε
    latent_step: NonNegative = 0.004  # γ_z; 0 keeps z
    cancel: Literal["none", "drawn", "decayed", "paired"] = "paired"  # see above

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.student.counts) > 1:
            raise UserError(
                "student.steps: EMD corrects the noise that a student's one step begins with; set "
                "it to 1, or take the objective diff-instruct"
            )

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """A loss whose gradient of x̂ = g(z) is -(α/σ) ε at the walk's end, less its noise."""
        t = self.times.sample(batch.noise, self.teacher.process)
        alpha, sigma = self.teacher.process.at(t, batch.noise)
        eps = torch.randn_like(batch.noise)
        walk, gap = Walk(eps, batch.noise, eps, batch.noise), batch.noise.new_zeros(())
        x = None if self.latent_step else student(batch.noise, batch.cond)  # it stays, as z does
        for _ in range(self.inner_steps):
            force, pull, gap = self.forces(walk, t, batch, student, x)
            walk = self.moved(walk, sigma * force, pull)
        # level_weight is of F - T, of which -(α/σ) ε has (α/σ)²
        weight = -self.level_weight(t, eps) * sigma / alpha
        size = eps[0].numel() if self.reduction == "sum" else 1
        if self.cancel == "paired" and x is None:
            both = torch.cat([walk.z, walk.free_z])
            samples, free = student(both, conditions.joined(batch.cond, batch.cond)).chunk(2)
            x = torch.cat([samples, free])  # so that the loss's gradient reaches the samples
            grad = torch.cat([weight * walk.eps, -weight * walk.free_eps])
            size = 2 * size  # the mean is over twice as many
        else:
            x = samples = student(walk.z, batch.cond) if x is None else x
            grad = weight * (walk.eps if self.cancel == "none" else walk.eps - walk.free_eps)
        matching = size * surrogate(x, torch.nan_to_num(grad))
        spread = walk.z.square().mean()  # 1 of the prior
        return Loss(matching, {"matching": matching, "gap": gap, "latent": spread}, samples)

    def forces(
        self, walk: Walk, t: Tensor, batch: Batch, student: Generator, x: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u and α Jᵀu at a walk's place, (B, ...), and the mean |F - T| there, (); no graph.

        Args:
            x: The student's x̂ of the latent where it does not move; Jᵀu is not needed then.
        """
        alpha, sigma = self.teacher.process.at(t, walk.eps)
        z = walk.z.detach().requires_grad_()
        here = student(z, batch.cond) if x is None else x
        with torch.no_grad():
            x_t = alpha * here + sigma * walk.eps
            difference = self.teacher(x_t, t, batch.cond) - self.fake_x(x_t, t, batch.cond)
            force = torch.nan_to_num(alpha / sigma**2 * difference)
        pull = torch.zeros_like(z)
        if self.latent_step:
            (pull,) = torch.autograd.grad(here, z, alpha * force)
        return force, pull, difference.abs().mean()

    def moved(self, walk: Walk, force: Tensor, pull: Tensor) -> Walk:
        """The walk one step on, by the forces on ε and on z, (B, ...), and by noise."""
        h, k = self.noise_step**2 / 2, self.latent_step**2 / 2
        n, m = (torch.randn_like(walk.eps) for _ in range(2))
        n, m = self.noise_step * n, self.latent_step * m
        kept = 1.0 if self.cancel == "drawn" else 1 - h
        return Walk(
            (1 - h) * walk.eps + h * force + n,
            (1 - k) * walk.z + k * pull + m,
            kept * walk.free_eps + n,
            (1 - k) * walk.free_z + m,
        )

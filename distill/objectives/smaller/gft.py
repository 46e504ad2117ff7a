"""GFT: one network becomes its own guided model, of any scale, without a teacher's output.

Guidance-free training, Chen et al. 2025 (arXiv:2501.15420). The network reads the guidance scale
g = 1/β of each sample (`teacher.guidance.scale: [low, high]`), and its x̂ for the condition is mixed
with the one for no condition, held fixed, before it is compared with data:

    |β x̂(x_t | c, g) + (1 - β) sg x̂(x_t | ∅, 1) - x|²

At the minimum the mixture is E[x | x_t, c], so x̂(x_t | c, g) = x̂(∅) + g (x̂(c) - x̂(∅)): guidance in
one evaluation, at a scale that is chosen when sampling. With g = 1 alone it is plain training, by
which a share of samples (`drop`) learns the x̂ of no condition.

Trains at all times; `student: {steps: K, renoise: false}` leaves a model of many steps, which
stock pipelines of Stable Diffusion pass their `guidance_scale` to. Costs two forwards of the
student, one of them without a gradient, and none of the teacher.

Differs from the authors' code: scales are drawn evenly from the range, where theirs draws β from a
power of a uniform; samples whose condition is dropped have β = 1 in the mixture too, where theirs
scales their gradient by the β that they would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill.field_types import Fraction
from distill.objectives.base import Batch, Learns, Loss, Objective
from distill.objectives.losses import mean_square
from distill.objectives.noise_levels import Times, Uniform
from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE, Cond
from teachers.denoiser import Guided
from teachers.errors import UserError
from teachers.process import expand


@dataclass(kw_only=True)
class GuidanceFree(Objective):
    times: Times = Uniform(0.0, 1.0)
    drop: Fraction = 0.1  # share of samples that learn the x̂ of no condition

    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        guided = [m for m in self.teacher.modules() if isinstance(m, Guided) and m.null is not None]
        if not guided:
            raise UserError(
                "teacher.guidance: this teacher has no condition of nothing; set teacher.null_label"
            )
        self.guided = guided[:1]  # in a list: no network of the objective's own

    def loss(self, batch: Batch, step: int) -> Loss:
        network, x = self.student.denoiser, batch.data
        scale, cond = conditions.without(batch.cond, GUIDANCE_SCALE)
        assert scale is not None, "a recipe of this objective has a range of scales"
        lost = torch.rand(len(x), device=x.device) < self.drop
        empty = self.empty(cond)
        cond = {k: torch.where(expand(lost, v), empty[k], v) for k, v in (cond or {}).items()}
        scale = torch.where(lost, torch.ones_like(scale), scale)
        t = self.times.sample(x, network.process)
        x_t = network.process.noise(x, t, torch.randn_like(x))
        ours = network(x_t, t, {**cond, GUIDANCE_SCALE: scale})
        with torch.no_grad():
            none = network(x_t, t, {**empty, GUIDANCE_SCALE: torch.ones_like(scale)})
        error = mean_square(mixed(ours, none, scale), x)
        return Loss((network.weight(t) * error).mean())

    def empty(self, cond: Cond) -> dict[str, Tensor]:
        """The condition of nothing, with the entries (B, ...) of a batch's condition."""
        (guided,) = self.guided
        return guided.branches({**(cond or {})})[1]


def mixed(ours: Tensor, none: Tensor, scale: Tensor) -> Tensor:
    """β x̂ + (1 - β) x̂(∅) of x̂ (B, ...), with β = 1/g of scales g (B,)."""
    beta = expand(1 / scale.to(ours), ours)
    return beta * ours + (1 - beta) * none

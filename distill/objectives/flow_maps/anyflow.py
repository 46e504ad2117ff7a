"""AnyFlow's first stage: a flow map for any number of steps, learned from data without a JVP.

Gu et al. 2026 (arXiv:2605.13724). MeanFlow's identity with the datum's own velocity, its total
derivative by central differences on the straight path. Half of a batch has s = t, a quarter s = 0.
The squared error, averaged over dimensions, has the weight τ √(1 - τ). Samples with s < t are then
divided by their own loss and multiplied by the mean loss of those with s = t, so that jumps count
as much as velocities do. Costs forwards of the student: 1 for samples with s = t, and 3 for others.

Differs from the authors' code: it runs differences for samples with s = t as well, whose derivative
has no weight. It trains a combination of the guided and the unguided network; here guidance comes
in through the teacher's x̂ (`velocity: teacher`). The second stage, DMD on the student's own jumps,
is not here. How the network reads s is the student's matter (`student.landing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import Fraction, Positive
from distill.objectives.flow_maps.meanflow import MeanFlow
from distill.objectives.noise_levels import Times, Uniform
from distill.objectives.tangent import How
from teachers.errors import UserError


@dataclass(kw_only=True)
class AnyFlow(MeanFlow):
    velocity: Literal["teacher", "data"] = "data"
    times: Times = Uniform()  # for large videos shifted by 5
    equal: Fraction = 0.5
    ending: Fraction = 0.25  # the share of samples with s = 0
    offset: Positive = 1e-5  # of the loss by which a jump's is divided
    derivative: How = "central"
    derivative_step: Positive = 5e-3

    shares: ClassVar[tuple[str, ...]] = ("equal", "ending")
    unused: ClassVar[tuple[str, ...]] = ("power",)

    def __post_init__(self) -> None:
        if self.equal + self.ending > 1:
            raise UserError(
                f"objective.ending: {self.ending:g} and equal, {self.equal:g}, are more than the "
                "whole batch; lower one"
            )

    def sample_times(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As MeanFlow's; after the samples with s = t, those with s = 0."""
        t, s = super().sample_times(x)
        place, first = torch.arange(len(x), device=x.device), self.count(x)
        ending = (place >= first) & (place < first + round(self.ending * len(x)))
        return t, torch.where(ending, torch.zeros_like(s), s)

    def weight(self, gap: Tensor, tau: Tensor) -> Tensor:
        weight = 15 / 4 * tau * (1 - tau).sqrt()  # 1 on average over τ
        loss, count = weight * gap.square().flatten(1).mean(1), self.count(gap)
        level = loss[:count].mean() if count else loss.mean()
        jumping = torch.arange(len(loss), device=loss.device) >= count
        balance = torch.where(jumping, level / (loss + self.offset), torch.ones_like(loss))
        return weight * balance / gap[0].numel()  # MeanFlow sums over dimensions

"""f-divergence distillation: DMD2 with each sample weighted by the critic's density ratio.

Xu et al. 2025 (arXiv:2502.15681). With r = p_teacher/p_student, whose logarithm is the logit of a
logistic critic, the gradient of D_f is DMD2's times h(r) = r² f″(r).

Differs from the authors' code: r's running means are kept in bins of the process's t, which for EDM
is uniform in σ^(1/ρ) and not in σ (whose first bin would hold two thirds of all draws); and h is
normalised within each micro-batch, so that the result does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distill.field_types import Fraction, NonNegativeInt, Positive, PositiveInt
from distill.objectives.base import Batch, Turn
from distill.objectives.distribution.dmd2 import DMD2
from distill.objectives.losses import all_sum
from students.critic import Critic, SANCritic
from teachers.errors import UserError
from teachers.process import expand

# h(r) = r² f″(r); constant factors drop out with the normalisation.
WEIGHTS = {
    "reverse-kl": torch.ones_like,
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "jensen-shannon": lambda r: r / (1 + r),
    "squared-hellinger": lambda r: r.sqrt() / 4,
    "forward-kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r,
}
Divergence = Literal[
    "reverse-kl",
    "softened-reverse-kl",
    "jensen-shannon",
    "squared-hellinger",
    "forward-kl",
    "jeffreys",
    "neyman",
]


@dataclass(kw_only=True)
class FDistill(DMD2):
    critic: Critic  # pyright: ignore  # required: its logits are log r
    divergence: Divergence = "jensen-shannon"
    ratio_min: Positive = 0.1  # ratios are clamped to these
    ratio_max: Positive = 20.0
    bins: PositiveInt = 10  # of t, in which the mean ratio is tracked
    ratio_ema: Fraction = 0.9  # of a bin's mean, per student update
    warmup: NonNegativeInt = 0  # steps of plain DMD2 before the critic has learnt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio_min >= self.ratio_max:
            raise UserError(
                f"objective.ratio_min: {self.ratio_min} is not below ratio_max, {self.ratio_max}"
            )
        if self.game != "logistic" or isinstance(self.critic, SANCritic):
            key = "objective.game" if self.game != "logistic" else "critic.san"
            raise UserError(
                f"{key}: f-distill reads logits as log-ratios, which only the logistic game makes "
                "them; remove it"
            )
        device = next(self.student.parameters()).device
        self.means = torch.ones(self.bins, device=device)  # of the ratio, by bin
        self.sums = torch.zeros(2, self.bins, device=device)  # this turn's ratios, and their count
        self.step = 0

    def turns(self, step: int) -> Iterator[Turn]:
        self.step = step
        for turn in super().turns(step):
            yield turn
            if turn.players == ("student",):
                self.update_means()

    def weighted(self, grad: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        logits = self.critic(x_t, t, batch.cond).clamp(-10, 10)
        ratio = logits.exp().clamp(self.ratio_min, self.ratio_max)
        index = (t * self.bins).long().clamp(0, self.bins - 1)
        ones = torch.ones_like(ratio)
        self.sums[0].index_add_(0, index, ratio.to(self.sums.dtype))
        self.sums[1].index_add_(0, index, ones.to(self.sums.dtype))
        if self.step < self.warmup:
            return grad
        h = WEIGHTS[self.divergence](ratio / self.means[index].to(ratio.dtype))
        return expand(h / h.mean(), grad) * grad

    def update_means(self) -> None:
        """Move the bins' means towards this turn's ratios, over all micro-batches and processes."""
        total, count = all_sum(self.sums)
        means = torch.where(count > 0, total / count.clamp(min=1), self.means)
        self.means = torch.lerp(means, self.means, self.ratio_ema)
        self.sums = torch.zeros_like(self.sums)

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = state["means"].to(self.means)
        super().load_state_dict(state)

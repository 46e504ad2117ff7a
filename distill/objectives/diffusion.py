"""Plain diffusion training, by which `distill teach` makes teachers.

Karras et al. 2022 (arXiv:2206.00364). The "student" is the network under training, as a
denoiser. Conditions are dropped for classifier-free guidance (arXiv:2207.12598).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from distill.field_types import Finite, Fraction, NonNegativeInt, Positive
from distill.objectives.base import Batch, Loss, Objective
from distill.objectives.losses import mean_square
from distill.objectives.noise_levels import LogNormal, Times
from distill.objectives.weights import Weighting, error_weight


@dataclass(kw_only=True)
class Diffusion(Objective):
    times: Times = LogNormal(-1.2, 1.2)
    drop: Fraction = 0.0  # the share of conditions that are replaced by the null class
    null_label: NonNegativeInt = 0  # the index of the null class
    weighting: Weighting | Literal["own"] = "own"  # of noise levels; own: as the network predicts
    gamma: Positive = 5.0  # min-snr: the greatest weight
    bias: Annotated[float, *Finite] = 2.0  # sigmoid: the log SNR of half the weight

    few_step: ClassVar[bool] = False

    def loss(self, batch: Batch, step: int) -> Loss:
        network, cond = self.student.denoiser, batch.cond
        if cond is not None and self.drop:
            labels = cond["class_labels"]
            dropped = torch.rand(len(labels), device=labels.device) < self.drop
            cond = {"class_labels": labels.masked_fill(dropped, self.null_label)}
        t, process = self.times.sample(batch.data, network.process), network.process
        x_t = process.noise(batch.data, t, batch.noise)
        error = mean_square(network(x_t, t, cond), batch.data)
        if self.weighting == "own":
            weight = network.weight(t)
        else:
            weight = error_weight(self.weighting, process, t, self.gamma, self.bias)
        return Loss((weight * error).mean())

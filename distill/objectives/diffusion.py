"""Plain diffusion training, by which `distill teach` makes teachers.

Karras et al. 2022 (arXiv:2206.00364). The "student" is the network under training, as a
denoiser. Conditions are dropped for classifier-free guidance (arXiv:2207.12598).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from distill.field_types import Fraction, NonNegativeInt
from distill.objectives.base import Batch, Loss, Objective
from distill.objectives.noise_levels import LogNormal, Times


@dataclass(kw_only=True)
class Diffusion(Objective):
    times: Times = LogNormal(-1.2, 1.2)
    drop: Fraction = 0.0  # the share of conditions that are replaced by the null class
    null_label: NonNegativeInt = 0  # the index of the null class

    few_step: ClassVar[bool] = False

    def loss(self, batch: Batch, step: int) -> Loss:
        network, cond = self.student.denoiser, batch.cond
        if cond is not None and self.drop:
            labels = cond["class_labels"]
            dropped = torch.rand(len(labels), device=labels.device) < self.drop
            cond = {"class_labels": labels.masked_fill(dropped, self.null_label)}
        t = self.times.sample(batch.data, network.process)
        return Loss(network.loss(batch.data, t, cond))

"""Progressive distillation of a student that stays guided: its steps are halved as it is sampled.

SnapFusion, Li et al. 2023 (arXiv:2306.00980). Where the teacher's guidance would be lost if the
student learned x̂ of its condition alone, here the student's own x̂ is mixed as the teacher's is,
with gradients through both of its passes, and this mix learns the teacher's two steps. Each sample
has a scale of its own where the recipe has a range of them; then a share 1 - `guided_share` of the
samples is unguided on both sides, the paper's vanilla loss. From 16 steps to 8 after 32 to 16 is
`initial_steps: 16` with `student.steps: 8`. Its stock pipeline guides the student, in two passes.

Costs 2 forwards of the student and 4 of the teacher, two for each of them where nothing is guided.

Differs from the paper: the share is of samples and not of updates, and the diffusion loss is of the
unguided samples' x̂, at no further pass; the paper's is of a batch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from distill.field_types import Fraction, NonNegative
from distill.objectives.base import Batch, Loss
from distill.objectives.losses import mean_square
from distill.objectives.trajectory.progressive import Progressive
from teachers import conditions


@dataclass(kw_only=True)
class SnapFusion(Progressive):
    guided_share: Fraction = 0.5  # p: of the samples whose scale is the drawn one; the others' is 1
    diffusion_weight: NonNegative = 0.1  # γ

    mixes_student: ClassVar[bool] = True

    def loss(self, batch: Batch, step: int) -> Loss:
        vanilla = torch.rand(len(batch.data), device=batch.data.device) >= self.guided_share
        cond = conditions.with_scale_one(batch.cond, vanilla)
        loss = super().loss(batch._replace(cond=cond), step)
        if cond is batch.cond or not self.diffusion_weight:  # no sample is unguided
            return loss
        assert loss.samples is not None
        error = (vanilla * mean_square(loss.samples, batch.data)).mean()
        return loss._replace(value=loss.value + self.diffusion_weight * error)

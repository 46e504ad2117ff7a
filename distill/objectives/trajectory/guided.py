"""Guided distillation: one student for a range of guidance scales, then fewer and fewer steps.

Meng et al. 2022 (arXiv:2210.03142). In the first stage the student learns the guided teacher's x̂ at
random times, for the scale of each sample, which the student's network reads as an input. From then
on it is progressive distillation of that student, and every stage carries the scale. The loss of
all stages is weighted as there.

With one guidance scale the first stage distils that scale alone. The deterministic sampler is the
student's; the paper's stochastic one is `teachers.solver.double_steps`.

Costs 1 forward of the student, and of the teacher 2 in each stage (in the first, one guided call).

Differs from the paper: times of the first stage are uniform in the process's own t by default. The
paper's encoder, which runs from data to noise, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distill.field_types import PositiveInt
from distill.objectives.base import Batch, Loss
from distill.objectives.noise_levels import Times, Uniform
from distill.objectives.trajectory.progressive import Progressive


@dataclass(kw_only=True)
class GuidedDistillation(Progressive):
    first_steps: PositiveInt = 1000  # training steps of the first stage
    times: Times = field(default_factory=Uniform)  # of the first stage

    @property
    def last_stage(self) -> int:
        return self.first_steps + super().last_stage

    def stage_at(self, step: int) -> int:
        if step < self.first_steps:
            return 0
        return 1 + super().stage_at(step - self.first_steps)

    def grid_size(self) -> int:
        return self.grids[max(self.stage - 1, 0)]

    def loss(self, batch: Batch, step: int) -> Loss:
        if self.stage:
            return super().loss(batch, step)
        t = self.times.sample(batch.data, self.student.denoiser.process)
        x_t = self.student.denoiser.process.noise(batch.data, t, batch.noise)
        with torch.no_grad():
            target = self.teacher(x_t, t, batch.cond)
        return self.error(x_t, t, target, batch)

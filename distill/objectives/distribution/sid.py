"""Score identity distillation: minimise a Fisher divergence, with scores read as denoisers.

SiD, Zhou et al. 2024 (arXiv:2404.04057). Unlike DMD2, gradients reach the student through the
inputs of both denoisers, whose weights stay fixed. Needs no data. With `guide_fake` it is SiD-LSG
(arXiv:2406.01561): the fake is guided as the teacher is where it is compared, and it learns so too,
a share `drop` of its samples without their condition. Each pass of the fake is then two.

α = ½ is half the true Fisher gradient; α = 1 omits the term of the sampling distribution. 1.2, the
authors' best on CIFAR and ImageNet, repels a student that is far too wide: start from the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative, Positive
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.branches import GuidedFake
from distill.objectives.losses import mean_abs, mean_square
from distill.objectives.noise_levels import LogNormal, Times, Uniform
from students.generator import ChainSamples, Generator


@dataclass(kw_only=True)
class ScoreIdentity(GuidedFake):
    """What SiD and its relatives share: the turns, the times, and the fake score's loss."""

    fake_sees: ChainSamples = (
        "places"  # which of a chain's x̂ the fake learns from (arXiv:2509.25127)
    )
    scale: Positive = 100.0  # of the student's loss, which is summed over dimensions
    times: Times = Uniform(0.0, 0.8)  # of the comparison: EDM's σ from 0.002 to 24.4
    fake_times: Times = LogNormal(-1.2, 1.2)  # of the fake's own loss

    needs_data: ClassVar[Literal["always", "never", "critic"]] = "never"

    def turns(self, step: int) -> Iterator[Turn]:
        student, first = self.student.sample_chain()
        yield Turn(("fake",), partial(self.fake_loss, student=student, first=first))
        yield Turn(("student",), partial(self.student_loss, student=student, first=first))

    def fake_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The fake's denoising of the student's samples."""
        x = student.samples(batch.noise, batch.cond, self.fake_sees, first)
        cond, process = self.shown_to_fake(x, batch.cond), self.fake.process
        t = self.fake_times.sample(x, process)
        if not self.guide_fake:
            return Loss(self.fake.loss(x, t, cond))
        x_t = process.noise(x, t, torch.randn_like(x))
        return Loss((self.fake.weight(t) * mean_square(self.fake_x(x_t, t, cond), x)).mean())

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The comparison of teacher and fake on the student's samples, times `scale`."""
        x, t, x_t = self.compared(batch, student, first)
        real, fake = self.teacher(x_t, t, batch.cond), self.fake_x(x_t, t, batch.cond)
        value = self.matching(x, real, fake)
        logs = {"gap": (real - fake).detach().abs().mean()}
        return Loss(self.scale * value.flatten(1).sum(1).mean(), logs, x)

    def compared(
        self, batch: Batch, student: Generator, first: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The student's samples x (B, ...) with their graph, times t (B,), and x noised to t."""
        x = student.rollout(batch.noise, batch.cond, first)
        t = self.times.sample(x, self.teacher.process)
        return x, t, self.teacher.process.noise(x, t, torch.randn_like(x))

    def matching(self, x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """The loss of each dimension (B, ...), from x and the x̂ of teacher and fake at x_t."""
        raise NotImplementedError

    def normaliser(self, x: Tensor, real: Tensor) -> Tensor:
        """The divisor of each sample's loss, (B, 1, ..., 1); no gradient."""
        return mean_abs(x - real).detach().clamp(min=1e-5)


@dataclass(kw_only=True)
class SiD(ScoreIdentity):
    alpha: NonNegative = 1.2

    def matching(self, x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """Δ·((T - x) - αΔ) / ω with Δ = T - F; ω is the mean |x - T| of a sample."""
        gap = real - fake
        return gap * ((real - x) - self.alpha * gap) / self.normaliser(x, real)

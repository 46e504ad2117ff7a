"""Adversarial distillation: a critic on the frozen teacher's features tells samples from data.

`LADD` is Sauer et al. 2024 (arXiv:2403.12015): samples and data are noised to `critic_times`, which
say what the critic sees, structure at high noise and texture at low; the student learns to pass for
data, and nothing else. `ADD`, Sauer et al. 2023 (arXiv:2311.17042), starts from noised data, plays
the hinge game with R1 on the features that its heads read, and adds the distillation loss
λ c(t) |x̂ - D_T(x̂_t, t)|² with a fixed target. `GDD`, Zheng and Yang 2024 (arXiv:2405.20750), is a
game alone: no part of the teacher's path, the student begins at pure noise, and R1 has γ = 1e-4.
With `critic: {san: true}` each is SAN's game (arXiv:2301.12811).

Costs forwards: 1 of the student with gradients and 1 through the teacher's features in the
student's turn; 1 of the student and 2 of the features in the critic's; the distillation loss 1 of
the teacher more. An exact penalty differentiates its pass twice.

Differs from the papers: features are the teacher's for all three, at the blocks that
`critic.blocks` names, each with a head of its own, unless `critic.encoder` names a network of
images; ADD reads DINOv2, and GDD VGG and EfficientNet. Conditions reach the critic through the
teacher. The distillation loss is a mean over dimensions of x̂, where ADD decodes latents to pixels.
c is the variance-preserving α, so that it means the same on all processes; on EDM's, α itself is 1.
LADD's code is not public: the logit-normal(1, 1) of its times and the game are as others report
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative, NonNegativeInt, PositiveInt
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.games import Adversary, Penalty
from distill.objectives.losses import Game, mean_square
from distill.objectives.noise_levels import LogNormal, Times, Uniform
from distill.objectives.weights import Weighting, error_weight
from students.critic import Critic
from students.generator import ChainSamples, Generator
from teachers.process import expand


@dataclass(kw_only=True)
class LADD(Adversary):
    """The student's samples shall pass for data before a critic on the frozen teacher's features.

    Sauer et al. 2024 (arXiv:2403.12015).
    """

    critic: Critic
    # What a step of the student starts from: its own chain, from noise; or noised data, as the
    # papers' code has it, with pure noise at the first time.
    starts_from: Literal["noise", "data"] = "noise"
    student_every: PositiveInt = 1  # steps, each with a critic's update, per student update
    frozen_steps: NonNegativeInt = 0  # before the student learns: the critic's head start
    critic_sees: ChainSamples = "places"  # of a chain from noise, which x̂ the critic learns from
    critic_times: Times = LogNormal(1.0, 1.0)  # where it compares; of a flow, logit-normal
    gan_weight: NonNegative = 1.0
    distillation_weight: NonNegative = 0.0  # λ of |x̂ - D_T(x̂_t, t)|²
    distillation_times: Times = Uniform(0.02, 0.98)
    weighting: Weighting | Literal["alpha"] = "alpha"  # c(t) of the distillation loss

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "always"

    @property
    def last_stage(self) -> int:
        return self.frozen_steps

    def turns(self, step: int) -> Iterator[Turn]:
        student, first = self.student.sample_chain()
        if step >= self.frozen_steps and step % self.student_every == 0:
            yield Turn(("student",), partial(self.student_loss, student=student, first=first))
        yield Turn(("critic",), partial(self.critic_loss, student=student, first=first))
        self.settle(self.critic)

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The game's, and the distillation loss if it has a weight."""
        x = self.samples(batch, student, first)
        gan = self.fooling(self.critic, self.critic_times, x, batch)
        if not self.distillation_weight:
            return Loss(self.gan_weight * gan, {"gan": gan}, x)
        term = self.distillation(x, batch)
        value = self.gan_weight * gan + self.distillation_weight * term
        return Loss(value, {"gan": gan, "distillation": term}, x)

    def critic_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The game's, with penalties, on fixed samples."""
        with torch.no_grad():
            if self.starts_from == "noise":
                x = student.samples(batch.noise, batch.cond, self.critic_sees, first)
            else:
                x = self.samples(batch, student, first)
        value, logs = self.telling(self.critic, self.critic_times, x, batch.cond, batch)
        return Loss(value, logs)

    def samples(self, batch: Batch, student: Generator, first: int) -> Tensor:
        """x̂ (B, ...) of all steps of the chain, the batch divided among them."""
        if self.starts_from == "noise":
            return student.rollout(batch.noise, batch.cond, first)
        t, process = student.ends(batch.noise, first), student.denoiser.process
        x_t = process.noise(batch.data, t, batch.noise)
        pure = batch.noise * student.scale(batch.noise)  # data would show through α x
        x_t = torch.where(expand(t == student.times[0], x_t), pure, x_t)
        return student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))

    def distillation(self, x: Tensor, batch: Batch) -> Tensor:
        """c(t) |x̂ - D_T(x̂_t, t)|² () of samples x (B, ...), whose target has no gradient."""
        t, noise = self.drawn(x, self.distillation_times)
        with torch.no_grad():
            target = self.teacher(*self.shown(x, batch.cond, t, noise))
        return (self.distillation_scale(t) * mean_square(x, target)).mean()

    def distillation_scale(self, t: Tensor) -> Tensor:
        """c (B,) at t (B,)."""
        process = self.teacher.process
        if self.weighting != "alpha":
            return error_weight(self.weighting, process, t)
        alpha, sigma = process.scales(t.double())
        return (alpha / (alpha**2 + sigma**2).sqrt()).to(t.dtype)


@dataclass(kw_only=True)
class ADD(LADD):
    """LADD with a hinge game, from noised data, and a distillation loss.

    Sauer et al. 2023 (arXiv:2311.17042).
    """

    starts_from: Literal["noise", "data"] = "data"
    game: Game = "hinge"
    r1: NonNegative = 1e-5
    penalty: Penalty = "features"
    distillation_weight: NonNegative = 2.5


@dataclass(kw_only=True)
class GDD(LADD):
    """GDD: a game alone, from pure noise. Zheng and Yang 2024 (arXiv:2405.20750)."""

    r1: NonNegative = 1e-4
    critic_times: Times = Uniform(0.0, 0.0)  # the critic sees what users see

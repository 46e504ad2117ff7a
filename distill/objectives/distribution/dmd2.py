"""Distribution matching: move the student's samples along the difference of two scores.

DMD2, Yin et al. 2024 (arXiv:2405.14867). The difference of two denoisers, the teacher and one that
tracks the student (the fake score), is the gradient of KL(student ‖ teacher) weighted by σ²/α². A
critic on the fake score's features, trained with real data, corrects the teacher's errors.

As in the authors' code: the fake score learns on every step, the student on every k-th; the fake is
never guided; fakes and data are noised for the critic at independent times over the full range.
Differs from it: with a student of several steps, the fake and the critic see the last x̂ only
(`fake_sees`), and one batch holds samples of every step of the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative, PositiveInt
from distill.objectives.base import Batch, Loss, Objective, Turn
from distill.objectives.losses import (
    critic_loss,
    generator_loss,
    mean_abs,
    surrogate,
)
from distill.objectives.noise_levels import Times, Uniform
from students.critic import Critic
from students.generator import ChainSamples, Generator
from teachers import conditions
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError

Samples = tuple[Tensor, Cond]  # x̂ of the student (B, ...), and its condition


@dataclass(kw_only=True)
class DMD2(Objective):
    fake: Denoiser  # denoises the student's samples
    critic: Critic | None = None  # tells them from data
    student_every: PositiveInt = 5  # steps, each with a fake update, per student update
    gan_weight: NonNegative = 3e-3  # weight of the critic in the student's loss
    critic_weight: NonNegative = 1e-2  # weight of the critic's own loss beside the fake's
    # Which x̂ of a chain the fake and the critic learn from: the last, which is what users see, or
    # those of every step, as in the authors' code. There one step's errors bias the others the
    # opposite way: a step of too little variety makes the others produce too much.
    fake_sees: ChainSamples = "last"
    share_samples: bool = False  # fake and critic learn from the samples of the student's turn
    times: Times = Uniform(0.02, 0.98)  # where teacher and fake are compared
    fake_times: Times = Uniform(0.0, 1.0)  # where the fake learns
    critic_times: Times = Uniform(0.0, 1.0)  # where the critic compares

    needs_data: ClassVar[Literal["always", "never", "critic"]] = "critic"

    def __post_init__(self) -> None:
        if self.share_samples and self.fake_sees == "last" and len(self.student.times) > 1:
            raise UserError(
                "objective.share_samples: a student of several steps is trained at every step of "
                "its chain; set objective.fake_sees to places, or share_samples to false"
            )

    def turns(self, step: int) -> Iterator[Turn]:
        student, first = self.student.sample_chain()
        shared: list[Samples] | None = [] if self.share_samples else None  # one for each shard
        if step % self.student_every == 0:
            loss = partial(self.student_loss, student=student, first=first, shared=shared)
            yield Turn(("student",), loss)
        names = ("fake",) if self.critic is None else ("fake", "critic")
        yield Turn(
            names, partial(self.fake_and_critic_loss, student=student, first=first, shared=shared)
        )

    def student_loss(
        self, batch: Batch, student: Generator, first: int = 0, shared: list[Samples] | None = None
    ) -> Loss:
        """Distribution matching, and the generator loss if there is a critic."""
        x = student.rollout(batch.noise, batch.cond, first)
        if shared is not None:
            shared.append((x.detach(), batch.cond))
        t, x_t = self.noised(x, self.times)
        with torch.no_grad():
            real, fake = self.teacher(x_t, t, batch.cond), self.fake(x_t, t, batch.cond)
            grad = self.weighted((fake - real) / self.scale(x, real), x_t, t, batch)
        matching = surrogate(x, torch.nan_to_num(grad))
        logs = {"matching": matching, "gap": (fake - real).abs().mean()}
        if self.critic is None or not self.gan_weight:
            return Loss(matching, logs, x)
        t, x_t = self.noised(x, self.critic_times)
        gan = generator_loss(self.critic(x_t, t, batch.cond))
        logs["gan"] = gan
        return Loss(matching + self.gan_weight * gan, logs, x)

    def fake_and_critic_loss(
        self, batch: Batch, student: Generator, first: int = 0, shared: list[Samples] | None = None
    ) -> Loss:
        """The fake's denoising loss on the student's samples; the critic's on them and on data."""
        if shared:
            x, cond = shared.pop(0)
        else:
            x, cond = student.samples(batch.noise, batch.cond, self.fake_sees, first), batch.cond
        denoising = self.fake.loss(x, self.fake_times.sample(x, self.fake.process), cond)
        if self.critic is None:
            return Loss(denoising)
        (t, fake), (s, real) = (self.noised(y, self.critic_times) for y in (x, batch.data))
        cond = conditions.joined(cond, batch.cond)
        logits = self.critic(torch.cat([fake, real]), torch.cat([t, s]), cond)
        critic = critic_loss(*logits.chunk(2))
        correct = ((logits > 0) == (torch.arange(len(logits), device=x.device) >= len(x))).float()
        logs = {"denoising": denoising, "critic": critic, "accuracy": correct.mean()}
        return Loss(denoising + self.critic_weight * critic, logs)

    def scale(self, x: Tensor, real: Tensor) -> Tensor:
        """The divisor of each sample's gradient, (B, 1, ..., 1): the (guided) teacher's error."""
        return mean_abs(x - real).clamp(min=1e-5)

    def weighted(self, grad: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The student's gradient times each sample's weight: 1 here; f-divergences override it."""
        return grad

    def noised(self, x: Tensor, times: Times) -> tuple[Tensor, Tensor]:
        """Times t (B,), and x (B, ...) noised to them."""
        t = times.sample(x, self.teacher.process)
        return t, self.teacher.process.noise(x, t, torch.randn_like(x))

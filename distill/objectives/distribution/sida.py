"""SiD with a discriminator that has no weights of its own.

SiDA, Zhou et al. 2024 (arXiv:2410.14919). The mean over channels of the fake score's features is
one logit for each place of the feature map. The fake learns from data and the student's samples,
with the same noise and the same times, which are which; the student learns to pass for data. Both
read the fake's pass that SiD makes anyway, so a step costs one more pass than SiD's: the data's.

As in the authors' code: the entropies are means over batch and places, and the mean of the fake's
weights and of 1/ω multiplies them. Differs from it: the fake's loss is a mean over dimensions, and
its discriminator's loss is divided by their number, which is the same ratio; gradients are clipped
by their norm and not by value; the features are the middle block's unless `critic.blocks` names
others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.field_types import NonNegative, NonNegativeInt
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.distribution.sid import SiD
from distill.objectives.losses import critic_loss, generator_loss, mean_square
from students.critic import FeatureMean
from students.generator import Generator


@dataclass(kw_only=True)
class SiDA(SiD):
    critic: FeatureMean  # reads the fake's features
    alpha: NonNegative = 1.0
    gan_weight: NonNegative = 0.01  # of the discriminator in the student's loss; with 0 it is SiD
    critic_weight: NonNegative = 1.0  # of the discriminator's loss, beside the fake's summed one
    frozen_steps: NonNegativeInt = 0  # before the student learns; the paper: 100,000 images
    gan_start: NonNegativeInt = 0  # step from which it learns from the critic; 200,000 images

    needs_data = "always"
    unused = ("guide_fake", "drop")  # the logits come from a pass that is not guided

    def __post_init__(self) -> None:
        self.step = 0

    @property
    def last_stage(self) -> int:
        return max(self.frozen_steps, self.gan_start if self.gan_weight else 0)

    @property
    def reads_critic(self) -> bool:
        """Whether the loss has a discriminator at all."""
        return self.gan_weight > 0

    def turns(self, step: int) -> Iterator[Turn]:
        self.step = step
        for turn in super().turns(step):
            if step >= self.frozen_steps or turn.players != ("student",):
                yield turn

    def fake_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The fake's denoising, and its telling data from the student's samples."""
        if not self.reads_critic:
            return super().fake_loss(batch, student, first)
        x = student.samples(batch.noise, batch.cond, self.fake_sees, first)
        t, noise = self.fake_times.sample(x, self.fake.process), torch.randn_like(x)
        x_t, data_t = (self.fake.process.noise(y, t, noise) for y in (x, batch.data))
        denoised, logits = self.critic.denoise(x_t, t, batch.cond)
        weight = self.fake.weight(t)
        denoising = (weight * mean_square(denoised, x)).mean()
        critic = critic_loss(logits, self.critic(data_t, t, batch.cond)) / 2
        value = denoising + self.critic_weight * weight.mean() * critic / x[0].numel()
        return Loss(value, {"denoising": denoising, "critic": critic})

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """Half of SiD's loss, and half of the discriminator's: -log sigmoid(logit) / ω."""
        if not self.reads_critic or self.step < self.gan_start:
            return super().student_loss(batch, student, first)
        x, t, x_t = self.compared(batch, student, first)
        real = self.teacher(x_t, t, batch.cond)
        fake, logits = self.critic.denoise(x_t, t, batch.cond)
        value = self.weighted(self.matching(x, real, fake), logits, x, real - fake)
        matching = self.scale * value.flatten(1).sum(1).mean()
        gan = generator_loss(logits.clamp(-10, 10))
        normalised = gan * self.normaliser(x, real).reciprocal().mean() * x[0].numel()
        logs = {"gap": (real - fake).detach().abs().mean(), "gan": gan}
        return Loss(0.5 * matching + 0.5 * self.gan_weight * normalised, logs, x)

    def weighted(self, value: Tensor, logits: Tensor, x: Tensor, gap: Tensor) -> Tensor:
        """SiD's loss of each dimension with a sample's weight: 1; Uni-Instruct overrides it."""
        return value

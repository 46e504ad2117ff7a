"""UniFL: the student learns from what networks of pictures say of its samples.

Zhang et al. 2024 (arXiv:2404.05595). Three kinds of feedback, all through a differentiable decode:

- Perceptual (PeFL): data are noised to the middle of the path, walked down without a graph to a
  random step, and that one step with its graph makes a picture. A frozen network says how far it is
  from the data's own caption.
- Decoupled: the sum over aspects d of ReLU(α_d - r_d(x̂)). A sample that has enough of one, α_d, is
  not pushed further. Both are rewards of the recipe; α_d is a reward's `floor`.
- Adversarial, from `first_stage` on: a critic of pixels, which learns to tell data from samples of
  every step of the student's chain, from noise.

Costs forwards: in both turns those of the chain up to a random step, of which one has a gradient in
the student's turn.

Differs from the paper: the student's own chain of a few steps stands for DDIM's 20, and `start` is
the step at which noised data come in (T_a), before any of the later ones. The critic starts from
random weights, where the paper's is a reward model of details. Its student's loss, -r, has no bound
where r learns as well; here it is the logistic game's, softplus(-r).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from distill.field_types import NonNegative, NonNegativeInt
from distill.objectives.base import Auxiliary, Batch, Loss, Objective, Turn
from distill.objectives.games import accuracy
from distill.objectives.losses import critic_loss, generator_loss
from students.generator import Generator
from teachers.errors import UserError
from teachers.teacher import Codec, Teacher

WIDTH = 32


class PixelCritic(Auxiliary):
    """Logits (B,), high for data, of data or samples (B, ...): of the pictures that they decode to.

    Args:
        codec: The teacher's; its autoencoder is no part of the critic.
        channels: Of its pictures.
    """

    def __init__(self, codec: Codec, channels: int) -> None:
        super().__init__()
        self.codec = (codec,)
        self.body = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1), nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * WIDTH, 1),
        )  # fmt: skip

    @classmethod
    def for_objective(cls, teacher: Teacher) -> Self:
        if len(teacher.shape) != 3:
            raise UserError(
                f"objective.name: unifl's critic reads pictures, and data of "
                f"{tuple(teacher.shape)} are none; name another objective"
            )
        vae = teacher.codec.vae
        return cls(teacher.codec, teacher.shape[0] if vae is None else 3)

    def forward(self, x: Tensor) -> Tensor:
        (codec,) = self.codec
        if codec.vae is not None:
            codec.vae.requires_grad_(False).to(x.device)
        return self.body(codec.decode_with_graph(x)).flatten().float()


@dataclass(kw_only=True)
class UniFL(Objective):
    pixel_critic: PixelCritic
    start: NonNegativeInt = 1  # T_a: the step of the chain at which noised data come in; 0 is noise
    first_stage: NonNegativeInt = 0  # training steps of rewards alone, before the critic's
    gan_weight: NonNegative = 1.0

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "always"

    def __post_init__(self) -> None:
        if self.start >= (longest := max(self.student.counts)):
            raise UserError(
                f"objective.start: a student of {longest} steps has none of number {self.start}, "
                f"counted from 0; set it to at most {longest - 1}"
            )

    @property
    def last_stage(self) -> int:
        return self.first_stage

    def turns(self, step: int) -> Iterator[Turn]:
        student, _ = self.student.sample_chain()
        judged, n = step >= self.first_stage, len(student.times)
        first = 0 if judged else min(self.start, n - 1)
        place = (first, random.randrange(first, n))
        yield Turn(
            ("student",), partial(self.feedback, student=student, place=place, judged=judged)
        )
        if judged:
            yield Turn(("pixel_critic",), partial(self.telling, student=student, place=place))

    def feedback(
        self, batch: Batch, student: Generator, place: tuple[int, int], judged: bool = True
    ) -> Loss:
        """The critic's part of the student's loss; the recipe's rewards are added to it."""
        x = self.walked(batch, student, *place)
        if not judged:
            return Loss(0 * x.sum(), {}, x)  # nothing but what rewards add
        gan = generator_loss(self.pixel_critic(x))
        return Loss(self.gan_weight * gan, {"gan": gan}, x)

    def telling(self, batch: Batch, student: Generator, place: tuple[int, int]) -> Loss:
        """The critic's: -log σ(r(x)) - log(1 - σ(r(x̂)))."""
        with torch.no_grad():
            x = self.walked(batch, student, *place)
        fake, real = self.pixel_critic(x), self.pixel_critic(batch.data)
        return Loss(critic_loss(fake, real), {"accuracy": accuracy(fake, real, "logistic")})

    def walked(self, batch: Batch, student: Generator, first: int, last: int) -> Tensor:
        """x̂ (B, ...) of a chain's steps `first` to `last`, of which the last has a graph.

        It begins with data noised to its time, or with noise alone at the first step.
        """
        z = batch.noise
        with torch.no_grad():
            if first:
                t = z.new_full((len(z),), student.times[first])
                x_t = student.denoiser.process.noise(batch.data, t, z)
            else:
                x_t = z * student.scale(z)
            for k in range(first, last):
                x_t = student.step(x_t, k, batch.cond)
        return student.end(x_t, last, batch.cond)

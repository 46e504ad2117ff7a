"""Denoising diffusion GANs: a few large steps, each a sample that a critic of state pairs judges.

DDGAN, Xiao et al. 2021 (arXiv:2112.07804), and WaveDiff, Phung et al. 2022 (arXiv:2211.16152),
which is DDGAN on Haar coefficients (`student.architecture.haar`). Data are noised to x_s and on to
x_t, neighbouring times of the chain. The student makes x̂ of x_t, and a sample of the posterior
q(x_s | x_t, x̂) shall pass for x_s before a critic that reads both states:

    softplus(-ℓ(x_s', s, x_t)) + fidelity_weight |x̂ - x|

with |·| the mean over dimensions. The critic plays the logistic game with R1 at x_s alone, in every
`penalty_every`-th step and not weighted up for the others, as in the authors' code. `student:
{steps: K, renoise: posterior}` samples as it trains.

`fidelity: measured` is RGM's (arXiv:2303.05456): x̂ shall explain the noisy state, and is not
compared with the datum behind it,

    λ/2 |(α x̂ - x_t) / σ|²

summed over dimensions, with λ = fidelity_weight. Its minimum, x_t/α, is no noise removed at all:
the critic does that.

Costs forwards: 1 of the student and 2 through the teacher's features in the student's turn; 1 of
the student and 4 of the features in the critic's.

Differs from the papers: the process and its times are the teacher's, and not a copy of DDGAN's
betas, which on data of another scale have another ratio of noise to data; the critic's network is
the frozen teacher's first blocks, with heads of its own; the student starts as the teacher, and
reads no z unless its architecture says so. RGM's critic reads x̂ alone; here it is the same as
WaveDiff's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from distill.field_types import NonNegative, PositiveInt
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.games import Adversary, Shown
from distill.objectives.losses import generator_loss
from students.critic import NOISIER, NOISIER_TIME, PairCritic
from students.generator import Generator
from teachers.errors import UserError


class Pair(NamedTuple):
    """x_t (B, ...) at times t (B,), and x_s at the lower times s, of the same data."""

    x_t: Tensor
    t: Tensor
    x_s: Tensor
    s: Tensor


@dataclass(kw_only=True)
class WaveDiff(Adversary):
    critic: PairCritic
    student_every: PositiveInt = 1  # steps, each with a critic's update, per student update
    gan_weight: NonNegative = 1.0
    # What x̂ is held to beside the game: the datum, or the noisy state that it was made of.
    fidelity: Literal["data", "measured"] = "data"
    fidelity_weight: NonNegative = 1.0
    r1: NonNegative = 0.02
    penalty_every: PositiveInt = 15  # steps between two that have the penalties

    # The states are those of the chain, and one datum's are compared.
    unused: ClassVar[tuple[str, ...]] = ("reach", "same_noise")

    def __post_init__(self) -> None:
        if max(self.student.counts) > 1 and self.student.renoise != "posterior":
            raise UserError(
                "student.renoise: each step shall be a sample of the posterior; set it to "
                "posterior, or student.steps to 1"
            )

    def turns(self, step: int) -> Iterator[Turn]:
        student, first = self.student.sample_chain()
        if step % self.student_every == 0:
            yield Turn(("student",), partial(self.student_loss, student=student, first=first))
        penalised = step % self.penalty_every == 0
        loss = partial(self.critic_loss, student=student, first=first, penalised=penalised)
        yield Turn(("critic",), loss)
        self.settle(self.critic)

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The game's, and the distance to the datum or to the noisy state."""
        pair = self.pair(batch, student, first)
        x, fake = self.sample(pair, batch, student)
        real = None
        if self.game == "relativistic":
            with torch.no_grad():
                real = self.critic(*self.seen(pair.x_s, pair, batch))
        gan = generator_loss(self.critic(*fake), self.game, real)
        distance = self.distance(x, pair, batch).mean()
        value = self.gan_weight * gan + self.fidelity_weight * distance
        return Loss(value, {"gan": gan, "fidelity": distance.detach()}, x)

    def critic_loss(
        self, batch: Batch, student: Generator, first: int = 0, penalised: bool = True
    ) -> Loss:
        """The game's on fixed samples, with the penalties if this step has them."""
        pair = self.pair(batch, student, first)
        with torch.no_grad():
            _, fake = self.sample(pair, batch, student)
        real = self.seen(pair.x_s, pair, batch)
        return Loss(*self.compared(self.critic, fake, real, penalised))

    def pair(self, batch: Batch, student: Generator, first: int) -> Pair:
        """Two states of each datum, the batch divided among the steps of the chain."""
        x, process = batch.data, student.denoiser.process
        t, s = student.ends(x, first), student.landings(x, first)
        x_s = process.noise(x, s, torch.randn_like(x))
        return Pair(process.noisier(x_s, s, t, batch.noise), t, x_s, s)

    def sample(self, pair: Pair, batch: Batch, student: Generator) -> tuple[Tensor, Shown]:
        """x̂ (B, ...) of the noisier states, and what the critic reads of the posterior's sample."""
        x_t, t, _, s = pair
        x = student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))
        x_s = student.denoiser.process.posterior(x_t, x, t, s, torch.randn_like(x))
        return x, self.seen(x_s, pair, batch)

    def seen(self, x_s: Tensor, pair: Pair, batch: Batch) -> Shown:
        """A state x_s (B, ...) beside the noisier one."""
        other = {NOISIER: pair.x_t, NOISIER_TIME: pair.t}
        return Shown(x_s, pair.s, {**(batch.cond or {}), **other})

    def distance(self, x: Tensor, pair: Pair, batch: Batch) -> Tensor:
        """Of x̂ (B, ...) from the data, the mean over dimensions, or from what was measured (B,)."""
        if self.fidelity == "data":
            return (x - batch.data).abs().flatten(1).mean(1)
        alpha, sigma = self.teacher.process.at(pair.t, x)
        return 0.5 * ((alpha * x - pair.x_t) / sigma).square().flatten(1).sum(1)

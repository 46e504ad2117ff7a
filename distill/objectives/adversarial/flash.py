"""Flash Diffusion: the teacher's solution from noised data, a game, and distribution matching.

Chadebec et al. 2024 (arXiv:2406.02347). A step draws one time of a grid of K, noises data to it,
and the student's x̂ there learns three things: to equal what the guided teacher's solver makes of
the same x_t in the rest of the K steps; to pass for data before a critic on the frozen teacher's
features; and to match the teacher's distribution as DMD does, with the student itself as fake
score, which is valid only because it denoises at every time. Times are of a mixture with a mode at
each quarter of the grid, and its weights, like those of the game and of the matching, change by
stages: from low noise to all of it, and then most often pure noise.

Costs forwards: in the student's turn 1 with gradients and (K + 1) / 2 of the teacher (twice if
guided) where times are even, 1 through its features with a game, and with matching 1 of the student
and 1 of the teacher more; in the critic's turn 1 of the student and 2 of the features.

Differs from the authors' code: the teacher has one guidance scale, which theirs draws in each step;
the distance is the mean square, not LPIPS of decoded crops; K = 40, since 32 does not divide the
indices of most teachers; the critic sees a range of times, theirs four; student and critic each
learn in every step, theirs in turn; and at the first time the student begins at pure noise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative, Positive, PositiveInt
from distill.objectives.base import Batch, Learns, Loss, Turn
from distill.objectives.games import Adversary
from distill.objectives.losses import Game, mean_abs, mean_square, surrogate
from distill.objectives.noise_levels import Times, Uniform
from students.critic import Critic
from teachers.errors import UserError
from teachers.solver import SOLVERS

Four = tuple[NonNegative, NonNegative, NonNegative, NonNegative]
MODES = 4
SHARES = ((0.0, 0.0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2))


@dataclass(kw_only=True)
class Flash(Adversary):
    critic: Critic
    levels: PositiveInt = 40  # K: of the grid from noise to data, which the teacher's solver takes
    solver: Literal["dpmpp_2m", "ddim"] = "dpmpp_2m"
    stage_steps: PositiveInt = 5000  # steps of each of the first three stages; the fourth stays
    mode_std: Positive = 0.5  # of a mode, in places of the grid
    gan_weights: Four = (0.0, 0.1, 0.2, 0.3)  # by stage
    matching_weights: Four = (0.0, 0.3, 0.5, 0.7)  # by stage
    matching_times: Times = Uniform(0.02, 0.98)
    critic_times: Times = Uniform(0.0, 0.75)
    game: Game = "least-squares"
    error_floor: Positive = 1e-5  # the least error that the matching's gradient is divided by

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "always"
    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        try:
            covered = self.student.denoiser.process.levels(self.levels)[-1] == 1
        except ValueError:
            covered = False
        if not covered or self.levels < MODES:
            raise UserError(
                f"objective.levels: {self.levels} is less than 4, or does not divide the indices "
                "of the teacher's noise; give a number that does, such as 50 or 40 of 1000"
            )

    @property
    def last_stage(self) -> int:
        return (MODES - 1) * self.stage_steps

    def turns(self, step: int) -> Iterator[Turn]:
        stage = min(step // self.stage_steps, MODES - 1)
        weights = place_weights(SHARES[stage], self.levels, self.mode_std)
        place = random.choices(range(self.levels), weights)[0]  # alike on all processes
        yield Turn(("student",), partial(self.student_loss, place=place, stage=stage))
        if any(self.gan_weights[stage:]):
            yield Turn(("critic",), partial(self.critic_loss, place=place))
            self.settle(self.critic)

    def student_loss(self, batch: Batch, place: int, stage: int) -> Loss:
        """The three terms, with the weights of a stage, at a place of the grid."""
        x_t, t = self.noised(batch, place)
        with torch.no_grad():
            times = torch.tensor(self.grid()[place:], dtype=torch.float64).to(x_t.device)
            target = SOLVERS[self.solver](self.teacher, x_t, times, batch.cond)
        x = self.student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))
        value = mean_square(x, target).mean()
        logs = {"distillation": value.detach()}
        if weight := self.gan_weights[stage]:
            gan = self.fooling(self.critic, self.critic_times, x, batch)
            value, logs["gan"] = value + weight * gan, gan.detach()
        if weight := self.matching_weights[stage]:
            matching = surrogate(x, self.gradient(x, batch))
            value, logs["matching"] = value + weight * matching, matching.detach()
        return Loss(value, logs, x)

    def critic_loss(self, batch: Batch, place: int) -> Loss:
        """The game's, on fixed samples of the same place."""
        x_t, t = self.noised(batch, place)
        with torch.no_grad():
            x = self.student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))
        value, logs = self.telling(self.critic, self.critic_times, x, batch.cond, batch)
        return Loss(value, logs)

    def grid(self) -> list[float]:
        """The K times from 1 down, at which the teacher's solver calls it."""
        return list(self.student.denoiser.process.levels(self.levels)[:0:-1])

    def noised(self, batch: Batch, place: int) -> tuple[Tensor, Tensor]:
        """x_t (B, ...) of data at a place of the grid, and t (B,); pure noise at the first."""
        z = batch.noise
        t = z.new_full((len(z),), self.grid()[place])
        if place == 0:
            return z * self.student.scale(z), t
        return self.student.denoiser.process.noise(batch.data, t, z), t

    @torch.no_grad()
    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        """DMD's (B, ...) of samples x, with the student as fake score."""
        t, noise = self.drawn(x, self.matching_times)
        shown = self.shown(x, batch.cond, t, noise)
        real = self.teacher(*shown)
        fake = self.student.denoiser(*shown, torch.zeros_like(t))
        return torch.nan_to_num((fake - real) / mean_abs(x - real).clamp(min=self.error_floor))


def place_weights(shares: Sequence[float], levels: int, std: float) -> list[float]:
    """How often each place of a grid is drawn, up to a factor: Gaussians at its quarters."""
    modes = [k * levels / MODES for k in range(MODES)]
    return [
        sum(b * exp(-((i - m) ** 2) / (2 * std**2)) for b, m in zip(shares, modes, strict=True))
        for i in range(levels)
    ]

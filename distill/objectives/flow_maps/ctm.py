"""CTM: jumps from t to s must agree with jumps that start further along the teacher's path.

Kim et al. 2024 (arXiv:2310.02279). G(x_t, t, s) is the step to s with the student's x̂ at (t, s);
x̂ at (t, t) is the denoiser. Soft consistency: u is n Heun steps of the teacher below t, and the two
jumps t → s and u → s are compared after a last jump s → 0. That last jump is an average of the
student, θ⁻. Gradients reach θ through θ⁻'s input; the jump u → s is θ's own without gradients. Two
terms are added, balanced by their gradients at the last layer: the denoising loss at (t, t), and a
critic's on the estimate (`critic`).

Costs forwards: the student's 2 with gradients and 1 without, θ⁻'s 2, and the teacher's 2n; with a
critic 2 through its features in the student's turn, and 4 more (and 2 of the networks) in its own.

Differs from the authors' code: distances are between pixels or latents and not LPIPS; times are
even in the process's own t (EDM's grid on EDM's process); the critic is a head on features of the
frozen teacher at noise levels `critic_times`, not StyleGAN-XL's on clean images; all samples of a
batch have the same n, as theirs have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from distill.field_types import Fraction, NonNegative, NonNegativeInt, PositiveInt
from distill.objectives.balance import balance, last_layer
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.consistency.pairwise import Pairwise
from distill.objectives.losses import mean_square
from distill.objectives.noise_levels import LogNormal, Times, Uniform
from students.critic import Critic
from teachers.errors import UserError
from teachers.process import expand
from teachers.solver import heun_step


@dataclass(kw_only=True)
class CTM(Pairwise):
    critic: Critic | None = None  # tells the student's estimates from data
    levels: Annotated[PositiveInt, Ge(3)] = 18  # of the grid: 18 for CIFAR, 40 for ImageNet-64
    solver_steps: PositiveInt = 17  # the most Heun steps from t to u; more steps are more likely
    target_ema: Fraction = 0.999
    denoising_weight: NonNegative = 1.0  # times the balance of gradients
    denoising_times: Times = LogNormal(-1.2, 1.2)  # of half the batch
    noisy_times: Times = Uniform(0.3, 1.0)  # of the other half
    gan_weight: NonNegative = 1.0  # times the balance of gradients
    gan_start: NonNegativeInt = 0  # the first step with a critic
    critic_times: Times = LogNormal(-1.0, 1.0)

    two_times: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count = self.solver_steps  # of a step, drawn at its start
        if self.solver_steps > self.levels - 1:
            raise UserError(
                f"objective.solver_steps: {self.solver_steps} steps do not fit between "
                f"{self.levels} levels; set it to {self.levels - 1} or less"
            )

    @property
    def last_stage(self) -> int:
        return 0 if self.critic is None else self.gan_start

    def turns(self, step: int) -> Iterator[Turn]:
        counts = range(1, self.solver_steps + 1)
        self.count = random.choices(counts, counts)[0]  # the same on all processes
        yield from super().turns(step)
        if self.critic is not None and step >= self.gan_start:
            yield Turn(("critic",), self.critic_loss)

    def loss(self, batch: Batch, step: int) -> Loss:
        estimate, target = self.soft_pair(batch)
        main = self.distances(estimate, target).mean()
        logs = {"distance": main.detach()}
        value, layer = main, last_layer(self.student.denoiser)
        if self.denoising_weight:
            term = self.denoising(batch)
            scale = balance(main, term, layer, 0.0, 1e4)
            value, logs["denoising"] = value + self.denoising_weight * scale * term, term.detach()
        if self.critic is not None and step >= self.gan_start:
            term = -self.logits(estimate, batch).mean()
            scale = balance(main, term, layer, 0.01, 10.0)
            value, logs["gan"] = value + self.gan_weight * scale * term, term.detach()
        return Loss(value, logs, estimate)

    def critic_loss(self, batch: Batch) -> Loss:
        """The hinge loss of the critic, on estimates and data."""
        with torch.no_grad():
            fake = self.soft_pair(batch, target=False)[0]
        logits = self.logits(fake, batch), self.logits(batch.data, batch)
        return Loss((1 + logits[0]).relu().mean() + (1 - logits[1]).relu().mean())

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        """The critic's of noised samples or data x (B, ...)."""
        assert self.critic is not None
        t = self.critic_times.sample(x, self.teacher.process)
        return self.critic(self.teacher.process.noise(x, t, torch.randn_like(x)), t, batch.cond)

    def soft_pair(self, batch: Batch, target: bool = True) -> tuple[Tensor, Tensor]:
        """The estimate of data from t, and its target from u or, without, itself; (B, ...) each."""
        start, landing = self.sample_cells(batch.data, self.count)
        t, s = start / (self.levels - 1), landing / (self.levels - 1)
        x_t = self.student.denoiser.process.noise(batch.data, t, batch.noise)
        estimate = self.finish(self.jump(x_t, t, s, batch), s, batch)
        if not target:
            return estimate, estimate
        with torch.no_grad():
            for k in range(self.count):
                t, u = ((start - k - i) / (self.levels - 1) for i in (0, 1))
                x_t = heun_step(self.teacher, x_t, t, u, batch.cond)
            t = (start - self.count) / (self.levels - 1)
            x_s = torch.where(expand(s == t, x_t), x_t, self.jump(x_t, t, s, batch))
            return estimate, self.finish(x_s, s, batch)

    def sample_cells(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Where t and s lie on the grid from 0 up, (B,) each, with s at most t - `count`."""
        start = torch.randint(count, self.levels, (len(x),), device=x.device)
        share = torch.rand(len(x), device=x.device)
        return start, (share * (start - count + 1)).long()

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """G of the student: x_s (B, ...)."""
        x = self.student.denoiser(x_t, t, batch.cond, s)
        return self.student.denoiser.process.step(x_t, x, t, s)

    def finish(self, x_s: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """θ⁻'s jump to 0; nothing where s is 0."""
        x = self.target(x_s, s, batch.cond, torch.zeros_like(s))
        return torch.where(expand(s == 0, x_s), x_s, x)

    def denoising(self, batch: Batch) -> Tensor:
        """The denoising loss () of x̂ at (t, t), with the teacher's own weight."""
        x, process = batch.data, self.student.denoiser.process
        half = len(x) // 2
        kinds = (self.denoising_times, x[:half]), (self.noisy_times, x[half:])
        t = torch.cat([times.sample(part, process) for times, part in kinds])
        x_t = process.noise(x, t, torch.randn_like(x))
        error = mean_square(self.student.denoiser(x_t, t, batch.cond, t), x)
        return (self.teacher.weight(t) * error).mean()

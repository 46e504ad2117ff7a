"""DRaFT: the student raises a reward of its own samples, by the gradient through its sampler.

Clark et al. 2023 (arXiv:2309.17400). The loss is minus the recipe's rewards of the x̂ that a whole
chain of the student ends with; there is no data and no other loss.

| | last_steps | noises |
|---|---|---|
| DRaFT | all, by default | 0 |
| DRaFT-K | K | 0 |
| DRaFT-LV | 1 | n: x̂ is noised n times to the time of the last step, and denoised by it |

DRaFT-LV's loss is the mean over the chain's own x̂ and the n others. No gradient flows through what
was noised, so each of the n adds a sample of the last step's gradient for one pass of the network.

Nothing in a reward keeps samples apart or like data: it is easily raised by samples that are worse
(reward hacking). `anchor` adds the mean square of x̂ less the x̂ of the (guided) teacher, which walks
the same chain from the same noise. Without a reward that term alone is a distillation of the
teacher's few steps. A student of several counts is trained at one of them in each step.

Costs n forwards of a chain of n steps, K of them with a backward, and DRaFT-LV `noises` of both
beside; with an anchor also n of the teacher (2 n if guided).

Differs from the paper: the sampler is the student's own of a few steps, in place of DDIM's 50 with
guidance, and the teacher is its only start; the anchor is not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative, NonNegativeInt, PositiveInt
from distill.objectives.base import Batch, Loss, Objective
from distill.objectives.losses import mean_square
from distill.objectives.trajectory.rg_lcd import unknown_reward
from students.generator import Generator
from teachers.denoiser import Cond
from teachers.errors import UserError


@dataclass(kw_only=True)
class DRaFT(Objective):
    last_steps: PositiveInt | None = None  # K: how many steps gradients flow through; None: all
    noises: NonNegativeInt = 0  # DRaFT-LV's n
    anchor: NonNegative = 0.0  # weight of the distance to the teacher's chain

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "never"
    needs_reward: ClassVar[bool] = True
    differentiates_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.noises and self.last_steps != 1:
            raise UserError(
                "objective.noises: they repeat the last step, so only its gradient is taken; set "
                "objective.last_steps to 1, or noises to 0"
            )
        longest = max(self.student.counts)
        if self.last_steps is not None and self.last_steps > longest:
            raise UserError(
                f"objective.last_steps: gradients cannot flow through {self.last_steps} steps of "
                f"a student of {longest}; set it to at most {longest}"
            )

    def loss(self, batch: Batch, step: int) -> Loss:
        student, _ = self.student.sample_chain()
        noises = [torch.randn_like(batch.noise) for _ in student.times[1:]]
        x = self.walked(student, batch.noise, batch.cond, noises)
        reward = self.reward or unknown_reward
        rewards = [reward(x, batch).mean()]
        for _ in range(self.noises):
            rewards.append(reward(self.repeated(student, x, batch.cond), batch).mean())
        value = torch.stack(rewards).mean()
        logs = {"reward": rewards[0].detach()}
        if not self.anchor:
            return Loss(-value, logs, x)
        drift = mean_square(x, self.before(student, batch, noises)).mean()
        return Loss(self.anchor * drift - value, {**logs, "drift": drift.detach()}, x)

    def walked(self, student: Generator, z: Tensor, cond: Cond, noises: list[Tensor]) -> Tensor:
        """x̂ (B, ...) of a whole chain from unit noise z (B, ...), with the last steps' graph.

        Args:
            noises: Of each renoising, shaped like z.
        """
        last = len(student.times) - 1
        first = 0 if self.last_steps is None else last + 1 - self.last_steps  # with a gradient
        x_t = z * student.scale(z)
        for k in range(last):
            with torch.set_grad_enabled(k >= first and torch.is_grad_enabled()):
                x_t = student.step(x_t, k, cond, noises[k])
        return student.end(x_t, last, cond)

    def repeated(self, student: Generator, x: Tensor, cond: Cond) -> Tensor:
        """The last step's x̂ (B, ...) of samples x (B, ...) that are noised to its time anew."""
        t = x.new_full((len(x),), student.times[-1])
        x_t = student.denoiser.process.noise(x.detach(), t, torch.randn_like(x))
        return student.end(x_t, len(student.times) - 1, cond)

    @torch.no_grad()
    def before(self, student: Generator, batch: Batch, noises: list[Tensor]) -> Tensor:
        """x̂ (B, ...) of the teacher's chain at the student's times, with the same noise."""
        chain = Generator(
            self.teacher, student.times, student.renoise, student.floor, student.start
        )
        chain.gamma = student.gamma
        return chain(batch.noise, batch.cond, noises=noises)

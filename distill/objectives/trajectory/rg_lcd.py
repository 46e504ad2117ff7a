"""Reward-guided latent consistency with a latent proxy reward.

RG-LCD, Li et al. 2024 (arXiv:2403.11027). LCM's loss, and minus `proxy_weight` times the reward of
the same forward pass's x̂. A reward of images is easily over-optimised, so the student does not see
it: a small network R_φ of latents learns to order samples as the reward does, and the student
raises R_φ. It learns from pairs among three samples of each prompt: the student's x̂, the target
network's, and the datum. For the reward itself, use `lcm` with the recipe's section `rewards`.

Costs LCM's 2 forwards of the student and 1 of the teacher (2 if guided), and for R_φ 2 more
forwards without gradient.

Differs from the authors' code: R_φ starts from random weights, and its samples are of one pair of
times on the line to the datum, which needs no step of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from distill.field_types import NonNegative
from distill.objectives.base import Auxiliary, Batch, Loss, Turn
from distill.objectives.trajectory.lcm import LCM
from teachers.conditions import Cond
from teachers.teacher import Teacher

WIDTH = 64


class LatentReward(Auxiliary):
    """R_φ(x, cond): the reward (B,) of data (B, C, H, W) for their conditions.

    Args:
        channels: Of the data.
        widths: For each entry of the condition, its last dimension; or how many labels there are,
            negative.
    """

    def __init__(self, channels: int, widths: dict[str, int]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.SiLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * WIDTH, WIDTH), nn.SiLU(),
        )  # fmt: skip
        self.entries = nn.ModuleDict(
            {
                k: nn.Linear(n, WIDTH) if n > 0 else nn.Embedding(-n, WIDTH)
                for k, n in widths.items()
            }
        )
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    @classmethod
    def for_objective(cls, teacher: Teacher) -> Self:
        cond = teacher.codec.condition([0] if teacher.codec.classes else [""]) or {}
        labels = -(teacher.codec.classes + 1)
        widths = {k: v.shape[-1] if v.is_floating_point() else labels for k, v in cond.items()}
        return cls(teacher.shape[0], widths)

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        hidden = self.body(x)
        for name, layer in self.entries.items():
            entry = (cond or {})[name]
            if entry.is_floating_point() and entry.ndim > 2:  # tokens
                entry = entry.flatten(1, -2).mean(1)
            hidden = hidden * layer(entry)
        return self.head(hidden)[:, 0]


@dataclass(kw_only=True)
class RewardGuidedLCM(LCM):
    proxy: LatentReward
    proxy_weight: NonNegative = 1.0  # β

    needs_reward: ClassVar[bool] = True

    def turns(self, step: int) -> Iterator[Turn]:
        yield from super().turns(step)
        yield Turn(("proxy",), partial(self.proxy_loss, step=step))

    def loss(self, batch: Batch, step: int) -> Loss:
        loss = super().loss(batch, step)
        assert loss.samples is not None
        reward = self.proxy(loss.samples, batch.cond).mean()
        logs = {**loss.logs, "reward": reward.detach()}
        return Loss(loss.value - self.proxy_weight * reward, logs, loss.samples)

    def proxy_loss(self, batch: Batch, step: int) -> Loss:
        """How far R_φ is from ordering pairs of samples as the reward does: the mean KL."""
        reward = self.reward or unknown_reward
        with torch.no_grad():
            samples = self.triple(batch, step)
            expert = torch.stack([reward(x, batch) for x in samples])
        proxy = torch.stack([self.proxy(x, batch.cond) for x in samples])
        pairs = torch.tensor([*combinations(range(len(samples)), 2)])
        pairs = pairs.to(proxy.device, non_blocking=True)
        wanted, given = expert[pairs].log_softmax(1), proxy[pairs].log_softmax(1)
        value = (wanted.exp() * (wanted - given)).sum(1).mean()
        return Loss(value, {"expert": expert[0].mean()})

    def triple(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The student's x̂, the target network's and the data (B, ...), for the same prompts."""
        process = self.student.denoiser.process
        t, r = self.sample_times(batch.data, step)
        x_t, x_r = (process.noise(batch.data, v, batch.noise) for v in (t, r))
        return (
            self.student.denoiser(x_t, t, batch.cond),
            self.target(x_r, r, batch.cond),
            batch.data,
        )


def unknown_reward(x: Tensor, batch: Batch) -> Tensor:
    """The reward (B,) in a plan, which has none."""
    return x.flatten(1).mean(1)

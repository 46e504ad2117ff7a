"""Fine-tuning on pictures: the network's own denoising loss, alone or with an anchor.

The loss is that of diffusion training (Ho et al. 2020, arXiv:2006.11239). What must stay as it is
can be held to the output of the frozen teacher, as learning without forgetting does (Li and Hoiem
2016, arXiv:1606.09282): by `anchor` on all pictures, or by `known_from` on those that are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative, NonNegativeInt
from distill.objectives.base import Batch, Loss, Objective
from distill.objectives.losses import mean_square
from distill.objectives.noise_levels import Times, Uniform
from students.generator import Generator
from teachers import conditions
from teachers.denoiser import Cond
from teachers.process import expand


@dataclass(kw_only=True)
class FineTuning(Objective):
    anchor: NonNegative = 0.0  # weight of the distance to the frozen teacher's output
    # Where the network learns: at `times`, as any diffusion model; or at the times of the student's
    # own steps, where the anchor is taken at the states of the student's own chains.
    where: Literal["times", "steps"] = "times"
    times: Times = Uniform(0.0, 1.0)
    # Of items of the data from this number on, the teacher's output is learned, not the picture:
    # without a change of the network they have no gradient, and so no noise. The anchor then holds
    # these items alone, since on the others it would pull against the pictures.
    known_from: NonNegativeInt | None = None

    between_steps: ClassVar[bool] = True

    def loss(self, batch: Batch, step: int) -> Loss:
        student, first = self.student.sample_chain()
        network, x = student.denoiser, batch.data
        if self.where == "times":
            t = self.times.sample(x, network.process)
        else:
            places = [(first + i) % len(student.times) for i in range(len(x))]
            t = torch.tensor([student.times[k] for k in places], dtype=x.dtype)
            t = t.to(x.device, non_blocking=True)
        x_t = network.process.noise(x, t, torch.randn_like(x))
        weight = network.weight(t)
        target = self.target(batch, x_t, t)
        fit = (weight * mean_square(network(x_t, t, batch.cond), target)).mean()
        if not self.anchor:
            return Loss(fit, {"fit": fit})
        if self.where == "steps":
            x_t = states(student, batch.noise, batch.cond, places)
        with torch.no_grad():
            before = self.teacher(x_t, t, batch.cond)
        drift = weight * mean_square(network(x_t, t, batch.cond), before)
        drift = (self.held(batch, drift) * drift).mean()
        return Loss(fit + self.anchor * drift, {"fit": fit, "drift": drift})

    def held(self, batch: Batch, like: Tensor) -> Tensor:
        """1 for samples that the anchor holds, else 0, (B,): of known items, if some are known."""
        if self.known_from is None or batch.items is None:
            return torch.ones_like(like)
        return (batch.items >= self.known_from).to(like)

    @torch.no_grad()
    def target(self, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network learns to predict, (B, ...): the picture, or the teacher's output."""
        if self.known_from is None or batch.items is None:
            return batch.data
        known = (batch.items >= self.known_from).nonzero().flatten()
        target = batch.data.clone()
        if len(known):
            rows = known.to(x_t.device)
            cond = conditions.rows(batch.cond, rows)
            target[rows] = self.teacher(x_t[rows], t[rows], cond)
        return target


@torch.no_grad()
def states(student: Generator, z: Tensor, cond: Cond, places: list[int]) -> Tensor:
    """x_t (B, ...) of the student's own chains from unit noise z (B, ...).

    Args:
        places: The step of each sample's chain whose input is taken, from 0 on.
    """
    place = torch.tensor(places).to(z.device, non_blocking=True)
    x_t = z * student.scale(z)
    for k in range(max(places)):
        x_t = torch.where(expand(place > k, z), student.step(x_t, k, cond), x_t)
    return x_t

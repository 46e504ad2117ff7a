"""KD: the student's x̂ of stored noise must equal the sample that the teacher's solver made of it.

Luhman & Luhman 2021 (arXiv:2101.02388), with LPIPS, a pseudo-Huber distance or the square. One
network forward and one backward per sample; the teacher is not called. The optimum is the flow map
of the solver: unlike a denoiser's, no mean over data.

Differs from the paper: a student of several steps also learns to return to the sample from the
states of its later steps. They lie on the straight line between noise and sample, or where its own
earlier steps have led (`states: own`), at (n + 1) / 2 forwards per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative
from distill.objectives.base import Batch, Loss, Objective
from distill.objectives.losses import mean_square
from distill.objectives.pairs.regression import Distance, check_lpips, distances
from teachers.errors import UserError
from teachers.process import expand


@dataclass(kw_only=True)
class KD(Objective):
    distance: Distance = "huber"  # √(|Δ|² + c²) - c over a whole sample; square; or lpips
    # what later steps start from: the line between noise and sample, or the student's own steps
    states: Literal["line", "own"] = "line"
    huber_c: NonNegative | None = None  # by default 0.00054 √d, as iCT's (arXiv:2310.14189)

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "pairs"

    def __post_init__(self) -> None:
        if max(self.student.counts) > 1 and self.student.renoise:
            raise UserError(
                "student.renoise: pairs tie a sample to one noise, so students of several steps "
                "follow the ODE; set it to false, or set student.steps to 1"
            )

    def check_batch(self, shape: tuple[int, ...]) -> None:
        if self.distance == "lpips":
            check_lpips(shape)

    def loss(self, batch: Batch, step: int) -> Loss:
        if self.states == "own":
            chain, first = self.student.sample_chain()
            x = chain.rollout(batch.noise, batch.cond, first)
        else:
            x_t, t = self.chain_states(batch)
            x = self.student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))
        value = distances(x, batch.data, self.distance, self.huber_c)
        logs = {"error": mean_square(x, batch.data).detach().mean()}
        return Loss(value.mean(), logs, x)

    def chain_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t (B, ...) and t (B,) at the steps of a chain, each equally often.

        At the first step it is noise alone, as the sampler begins.
        """
        chain, first = self.student.sample_chain()
        n, z = len(chain.times), batch.noise
        place = (first + torch.arange(len(z), device=z.device)) % n
        t = torch.tensor(chain.times, dtype=z.dtype).to(z.device, non_blocking=True)[place]
        x_t = chain.denoiser.process.noise(batch.data, t, z)
        return torch.where(expand(place == 0, z), chain.scale(z) * z, x_t), t

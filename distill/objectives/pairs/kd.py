"""KD: the student's x̂ of stored noise must equal the sample that the teacher's solver made of it.

Luhman & Luhman 2021 (arXiv:2101.02388), with LPIPS, a pseudo-Huber distance or the square. One
network forward and one backward per sample; the teacher is not called. The optimum is the flow map
of the solver: unlike a denoiser's, no mean over data.

Differs from the paper: a student of several steps also learns to return to the sample from the
states of its later steps. They lie on the straight line between noise and sample, or where its own
earlier steps have led (`states: own`), at (n + 1) / 2 forwards per sample.

GET (Geng et al. 2023, arXiv:2401.08639) is the same on another network (`student.architecture`,
`network: get`), with `distance: absolute`: each iterate k of n is decoded, and its distance to the
sample counts `output_decay`^(n - k), 0.8 in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import Fraction, NonNegative
from distill.objectives.base import Batch, Loss, Objective
from distill.objectives.losses import mean_square
from distill.objectives.pairs.outputs import check_outputs, several_outputs
from distill.objectives.pairs.regression import Distance, check_lpips, distances
from teachers.errors import UserError
from teachers.process import expand


@dataclass(kw_only=True)
class KD(Objective):
    # √(|Δ|² + c²) - c over a whole sample; square; absolute; or lpips
    distance: Distance = "huber"
    # what later steps start from: the line between noise and sample, or the student's own steps
    states: Literal["line", "own"] = "line"
    huber_c: NonNegative | None = None  # by default 0.00054 √d, as iCT's (arXiv:2310.14189)
    # Of a network with several outputs, as GET's iterates: how much each counts beside the one
    # after it; 0 trains the last alone.
    output_decay: Fraction = 0.0

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "pairs"

    def __post_init__(self) -> None:
        if max(self.student.counts) > 1 and self.student.renoise:
            raise UserError(
                "student.renoise: pairs tie a sample to one noise, so students of several steps "
                "follow the ODE; set it to false, or set student.steps to 1"
            )
        if self.output_decay:
            check_outputs(self.student.denoiser, "objective.output_decay")

    def check_batch(self, shape: tuple[int, ...]) -> None:
        if self.distance == "lpips":
            check_lpips(shape)

    def loss(self, batch: Batch, step: int) -> Loss:
        if self.states == "own":
            chain, first = self.student.sample_chain()
            x_t, t = chain.inputs(batch.noise, batch.cond, first), chain.ends(batch.noise, first)
        else:
            x_t, t = self.chain_states(batch)
        with several_outputs(self.student.denoiser, x_t, t) as outputs:
            x = self.student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))
        value = distances(x, batch.data, self.distance, self.huber_c)
        for k, earlier in enumerate(reversed(outputs()[:-1] if self.output_decay else ()), 1):
            more = distances(earlier, batch.data, self.distance, self.huber_c)
            value = value + self.output_decay**k * more
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

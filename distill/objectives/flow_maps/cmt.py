"""CMT: every state of a teacher's few-step trajectory must lead to that trajectory's end.

Hu et al. 2025 (arXiv:2509.24526). It is a warm-up before another objective: the student that it
leaves already jumps to the end from any time, so that what follows starts near its goal
(`student.init`). A batch of B samples has B / `points` trajectories of `points` solver steps from
data at the highest noise; the student regresses the end from each state, at that state's time.

Costs forwards: 1 of the student and 1 of the teacher. Differs from the authors' code: distances are
between pixels or latents, not LPIPS; the solver's times are the process's own grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from distill.field_types import NonNegative, PositiveInt
from distill.objectives.base import Batch, Learns, Loss, Objective
from distill.objectives.losses import huber
from teachers import conditions
from teachers.denoiser import Cond, Denoiser, Wrapper
from teachers.errors import UserError
from teachers.solver import SOLVERS


class Recorder(Wrapper):
    """A denoiser that keeps its inputs: the states of a solver that calls it once for each step."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.states: list[Tensor] = []
        self.times: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        self.states.append(x_t)
        self.times.append(t)
        return self.denoiser(x_t, t, cond, s)


@dataclass(kw_only=True)
class CMT(Objective):
    points: Annotated[PositiveInt, Ge(2)] = 16  # states of a trajectory, and its solver's steps
    solver: Literal["dpmpp_2m", "ddim"] = "dpmpp_2m"
    huber_c: NonNegative | None = None  # by default iCT's 0.00054 √d (arXiv:2310.14189)

    learns: ClassVar[Learns] = "all-times"

    def check_batch(self, shape: tuple[int, ...]) -> None:
        size = shape[0]
        if size % self.points:
            raise UserError(
                f"objective.points: {size} samples of a part of the batch do not divide into "
                f"trajectories of {self.points}; change it, train.batch or train.accumulate"
            )

    def loss(self, batch: Batch, step: int) -> Loss:
        self.check_batch(batch.noise.shape)
        with torch.no_grad():
            x_t, t, end, cond = self.trajectories(batch)
        x = self.student.denoiser(x_t, t, cond)
        c = 0.00054 * x[0].numel() ** 0.5 if self.huber_c is None else self.huber_c
        distance = huber(x, end, c).mean()
        return Loss(distance, {"distance": distance.detach()})  # x is not of the batch's items

    def trajectories(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """States (B, ...), their times (B,), the ends of their trajectories, and conditions."""
        process, rows = self.teacher.process, slice(len(batch.noise) // self.points)
        times = process.grid(self.points).to(batch.noise.device)
        noise, cond = batch.noise[rows], conditions.rows(batch.cond, rows)
        first = times[:1].to(noise.dtype).expand(len(noise))
        recorder = Recorder(self.teacher)
        start = process.noise(batch.data[rows], first, noise)
        end = SOLVERS[self.solver](recorder, start, times, cond)
        many = conditions.joined(*[cond] * self.points)
        ends = torch.cat([end] * self.points)
        return torch.cat(recorder.states), torch.cat(recorder.times), ends, many

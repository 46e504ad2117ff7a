"""Consistency within phases: where x̂ leads from t is the same along the guided teacher's path.

`PCM` is phased consistency models, Wang et al. 2024 (arXiv:2405.18407). The student's times divide
LCM's grid into phases. From t the student goes by one DDIM step to the lower edge of the phase, and
must land where it lands from x_r; at the edge itself, on x_r. So it is sampled along the ODE from
edge to edge, without new noise. One phase is LCM without its boundary, and as many phases as levels
regress the teacher's own DDIM step.

`TCD` is trajectory consistency distillation, Zheng et al. 2024 (arXiv:2402.19159): the edge is
drawn anew for each sample, among all levels from r down. So the student may go from any time to
any lower one, and `student.gamma` says how much new noise each step adds.

Costs the same as LCM: 2 forwards of the student, one of them without gradient, and 1 of the teacher
(2 if guided).

Differs from the authors' code: PCM's phases end on the times of the student's scheduler. With 50
levels and 4 phases theirs end on indices 739, 499 and 239, which no stock scheduler samples; with
40 levels they end on 749, 499 and 249. PCM's adversarial loss is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill.field_types import Fraction
from distill.objectives.base import Batch, Learns, Loss
from distill.objectives.trajectory.lcm import LCM
from teachers.errors import UserError
from teachers.process import expand


@dataclass(kw_only=True)
class PCM(LCM):
    target_ema: Fraction = 0.0

    learns: ClassVar[Learns] = "one-chain"  # from edge to edge

    def __post_init__(self) -> None:
        super().__post_init__()
        phases = len(self.student.times)
        if phases > 1 and self.student.renoise:
            raise UserError(
                "student.renoise: between phases the student follows the ODE; set it to false, or "
                "set student.steps to 1"
            )
        if not self.ends_on_times(self.levels):
            fitting = [n for n in range(phases, 101, phases) if self.ends_on_times(n)]
            nearest = min(fitting, key=lambda n: abs(n - self.levels), default=phases)
            raise UserError(
                f"objective.levels: {self.levels} levels have no edges of {phases} phases at the "
                f"student's times; set it to {nearest}"
            )

    def ends_on_times(self, levels: int) -> bool:
        """Whether phases of a grid begin and end on the student's times."""
        times = self.student.denoiser.process.levels(levels)
        edges = [times[k] for k in edges_of(levels, len(self.student.times))]
        starts = sorted(self.student.times)
        return all(abs(e - t) < 1e-6 for e, t in zip([*edges[1:], times[-1]], starts, strict=True))

    def edge(self, cell: Tensor) -> Tensor:
        """The level that the student goes to from cells (B,) of the grid, at or below them."""
        edges = torch.tensor(edges_of(self.levels, len(self.student.times)))
        edges = edges.to(cell.device, non_blocking=True)
        return edges[torch.searchsorted(edges, cell, right=True) - 1]

    def loss(self, batch: Batch, step: int) -> Loss:
        f, process = self.student.denoiser, self.student.denoiser.process
        grid = self.grid(batch.data)
        cell = torch.randint(len(grid) - 1, (len(batch.data),), device=grid.device)
        t, r, e = grid[cell + 1], grid[cell], grid[self.edge(cell)]
        x_t = process.noise(batch.data, t, batch.noise)
        with torch.no_grad():
            x_r = self.ode_step(x_t, t, r, batch)
            landing = process.step(x_r, self.target(x_r, r, batch.cond), r, e)
            target = torch.where(expand(r == e, x_r), x_r, landing)
        x = f(x_t, t, batch.cond)
        gap = self.distances(process.step(x_t, x, t, e), target)
        return Loss(gap.mean(), {"distance": gap.detach().mean()}, x)


@dataclass(kw_only=True)
class TCD(PCM):
    """Trajectory consistency: from any time to any lower one, which is drawn for each sample."""

    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        super(PCM, self).__post_init__()

    def edge(self, cell: Tensor) -> Tensor:
        """Any level from the cells down, each as likely."""
        share = torch.rand(len(cell), device=cell.device, dtype=torch.float64)
        return (share * (cell + 1)).long()


def edges_of(levels: int, phases: int) -> list[int]:
    """The lower edges of the phases, as levels of the grid from 0 up."""
    return [m * levels // phases for m in range(phases)]

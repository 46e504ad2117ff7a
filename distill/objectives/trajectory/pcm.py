"""Consistency within phases: where x̂ leads from t is the same along the guided teacher's path.

`PCM` is phased consistency models, Wang et al. 2024 (arXiv:2405.18407). The student's times divide
LCM's grid into phases. From t the student goes by one DDIM step to the lower edge of the phase, and
must land where it lands from x_r; at the edge itself, on x_r. So it is sampled along the ODE from
edge to edge, without new noise. One phase is LCM without its boundary, and as many phases as levels
regress the teacher's own DDIM step.

With a `critic`, PCM's adversarial loss is added: where the student lands is the fake, and where it
must land is the real. Both are noised to one time of the phase, by the same noise. Its hinge losses
are the paper's.

Costs the same as LCM: 2 forwards of the student, one of them without gradient, and 1 of the teacher
(2 if guided). A critic's turn costs as many, without gradients, and 2 of the critic; the student's
turn has 1 of the critic more.

Differs from the authors' code: PCM's phases end on the times of the student's scheduler. With 50
levels and 4 phases theirs end on indices 739, 499 and 239, which no stock scheduler samples; with
40 levels they end on 749, 499 and 249. The critic learns in every step, theirs in every second one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from distill.field_types import Fraction, NonNegative
from distill.objectives.base import Batch, Learns, Loss, Turn
from distill.objectives.trajectory.lcm import LCM
from students.critic import Critic
from teachers.errors import UserError
from teachers.process import expand


class Landings(NamedTuple):
    """Where the student lands and where it must, (B, ...) each, and the levels (B,) of the phase.

    estimate: x̂, from which the student goes to `fake` at the level `edge`.
    """

    estimate: Tensor
    fake: Tensor
    real: Tensor
    edge: Tensor
    top: Tensor


@dataclass(kw_only=True)
class PCM(LCM):
    target_ema: Fraction = 0.0
    critic: Critic | None = None  # tells where the student lands from where it must
    gan_weight: NonNegative = 0.1

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

    def top(self, cell: Tensor) -> Tensor:
        """The level at which the phase of cells (B,) ends."""
        edges = torch.tensor([*edges_of(self.levels, len(self.student.times)), self.levels])
        edges = edges.to(cell.device, non_blocking=True)
        return edges[torch.searchsorted(edges, cell, right=True)]

    def turns(self, step: int) -> Iterator[Turn]:
        yield from super().turns(step)
        if self.critic is not None:
            yield Turn(("critic",), self.critic_loss)

    def loss(self, batch: Batch, step: int) -> Loss:
        found = self.landings(batch)
        gap = self.distances(found.fake, found.real).mean()
        logs, value = {"distance": gap.detach()}, gap
        if self.critic is not None:
            term = -self.logits(batch, found, found.fake)[0].mean()
            value, logs["gan"] = gap + self.gan_weight * term, term.detach()
        return Loss(value, logs, found.estimate)

    def critic_loss(self, batch: Batch) -> Loss:
        """The hinge loss of the critic."""
        with torch.no_grad():
            found = self.landings(batch)
        fake, real = self.logits(batch, found, found.fake, found.real)
        return Loss((1 + fake).relu().mean() + (1 - real).relu().mean())

    def logits(self, batch: Batch, found: Landings, *landings: Tensor) -> list[Tensor]:
        """The critic's, (B,) each, of landings noised to one time above the edge of their phase."""
        assert self.critic is not None
        grid, room = self.grid(batch.data), found.top - found.edge
        share = torch.rand(len(room), device=room.device)
        level = found.edge + 1 + (share * room).long().clamp(max=room - 1)
        e, t, eps = grid[found.edge], grid[level], torch.randn_like(batch.data)
        process = self.student.denoiser.process
        return [self.critic(process.noisier(x, e, t, eps), t, batch.cond) for x in landings]

    def landings(self, batch: Batch) -> Landings:
        f, process = self.student.denoiser, self.student.denoiser.process
        grid = self.grid(batch.data)
        cell = torch.randint(len(grid) - 1, (len(batch.data),), device=grid.device)
        edge = self.edge(cell)
        t, r, e = grid[cell + 1], grid[cell], grid[edge]
        x_t = process.noise(batch.data, t, batch.noise)
        with torch.no_grad():
            x_r = self.ode_step(x_t, t, r, batch)
            landing = process.step(x_r, self.target(x_r, r, batch.cond), r, e)
            target = torch.where(expand(r == e, x_r), x_r, landing)
        x = f(x_t, t, batch.cond)
        return Landings(x, process.step(x_t, x, t, e), target, edge, self.top(cell))


def edges_of(levels: int, phases: int) -> list[int]:
    """The lower edges of the phases, as levels of the grid from 0 up."""
    return [m * levels // phases for m in range(phases)]

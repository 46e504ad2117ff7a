"""Consistency: the student's x̂ at t must equal its x̂ at an earlier time r on the same ODE path.

`Consistency` is consistency distillation, Song et al. 2023 (arXiv:2303.01469): x_r is the teacher's
step from x_t. `ConsistencyTuning` is ECT, Geng et al. 2024 (arXiv:2406.14548): no teacher after
initialisation; x_r lies on the straight line to the data. Both use ECT's pairs of times, whose gap
shrinks during training, or neighbours on the 2023 paper's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from distill.field_types import Finite, NonNegative, PositiveInt
from distill.objectives.base import Batch
from distill.objectives.consistency.pairwise import Pairwise
from distill.objectives.noise_levels import LogNormal, Times
from teachers.process import Process, expand
from teachers.solver import heun_step


@dataclass(kw_only=True)
class Consistency(Pairwise):
    pairs: Literal["shrinking", "grid"] = "shrinking"  # of times t > r; "grid" is the 2023 paper's
    levels: Annotated[PositiveInt, Ge(2)] = 18  # of the grid: 18 for CIFAR, 40 for ImageNet-64
    times: Times = LogNormal(-1.1, 2.0)  # of t, where pairs shrink
    q: Annotated[float, *Finite, Gt(1)] = 2.0  # r/t grows as 1 - n(t) / q^(stage + 1)
    ratio_max: Annotated[float, Ge(0), Lt(1)] = (
        0.999  # of r/t: closer pairs differ by rounding only
    )
    stage_steps: PositiveInt = 1000  # steps per stage
    solver: Literal["heun", "ddim"] = "heun"  # the teacher's step from t to r

    def sample_times(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Times t > r (B,) for data x (B, ...)."""
        if self.pairs == "grid":
            cell = torch.randint(self.levels - 1, (len(x),), device=x.device)
            return (cell + 1) / (self.levels - 1), cell / (self.levels - 1)
        t = self.times.sample(x, self.student.denoiser.process)
        return t, self.earlier(t, step)

    def earlier(self, t: Tensor, step: int) -> Tensor:
        """The times r (B,) before t whose gap shrinks with the step."""
        process = self.student.denoiser.process
        sigma = self.ratio(t)
        finest = self.q ** -(step // self.stage_steps + 1)  # underflows to 0 in late stages
        ratio = 1 - (1 + 8 * torch.sigmoid(-sigma)) * finest
        r = process.time(sigma * ratio.clamp(0, self.ratio_max)).clamp(min=0)
        return torch.minimum(r, t)

    def ode_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """x_r, on the teacher's path through x_t."""
        if self.solver == "heun":
            return heun_step(self.teacher, x_t, t, r, batch.cond)
        return self.teacher.process.step(x_t, self.teacher(x_t, t, batch.cond), t, r)

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """Each pair's weight (B,): 1 / (σ_t - σ_r), with σ_r = 0 at r = 0; on the grid it is 1."""
        if self.pairs == "grid":
            return torch.ones_like(t)
        return 1 / (self.ratio(t) - self.ratio(r).masked_fill(r == 0, 0)).clamp(min=1e-6)


@dataclass(kw_only=True)
class ConsistencyTuning(Consistency):
    """Consistency tuning (ECT): no teacher; steps along the line to the data.

    With `references` it is stable consistency tuning (SCT), Wang et al. 2024 (arXiv:2410.18958):
    the steps go to the mean of the batch's data of the same condition, each weighted by how likely
    it is behind x_t. That is less noisy than a single datum, and the teacher's own direction where
    the batch holds all data.
    """

    huber_c: NonNegative | None = 0.0  # ECT's distance is the plain norm
    references: bool = False

    unused: ClassVar[tuple[str, ...]] = ("solver",)

    def ode_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        process = self.student.denoiser.process
        if self.references:
            return process.step(x_t, posterior_mean(x_t, t, batch, process), t, r)
        return process.noise(batch.data, r, batch.noise)

    def boundary(self, target: Tensor, x_r: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """The target (B, ...); where r is 0, the data, since x_r still contains noise of σ_min.

        With `references` it is x_r there. NaN in the target is replaced by 0, as in ECT's code.
        """
        end = x_r if self.references else batch.data
        return torch.where(expand(r == 0, x_r), end, torch.nan_to_num(target))


def posterior_mean(x_t: Tensor, t: Tensor, batch: Batch, process: Process) -> Tensor:
    """E[x | x_t] (B, ...) if the batch's data of each sample's condition were all data.

    The weights are computed in float64: their logits are squared distances over σ².
    """
    data, noisy = batch.data.double().flatten(1), x_t.double().flatten(1)
    alpha, sigma = (s[:, None] for s in process.scales(t.double()))
    square = noisy.square().sum(1, keepdim=True) + alpha**2 * data.square().sum(1)
    logits = -(square - 2 * alpha * noisy @ data.T) / (2 * sigma**2)
    for entry in (batch.cond or {}).values():
        rows = entry.flatten(1) if entry.ndim > 1 else entry[:, None]
        same = (rows[:, None] == rows[None]).all(2)
        logits = logits.masked_fill(~same, -torch.inf)
    return (logits.softmax(1) @ data).view_as(batch.data).to(x_t.dtype)

"""Consistency training: x̂ at neighbouring times of a grid must be equal, and the grid gets finer.

The two points lie on the line from a datum to its noise, so there is no teacher after the student's
initialisation. `curriculum` says how many intervals the grid has, and the other fields are what the
papers changed:

| | curriculum | index | distance | gaps | more |
|---|---|---|---|---|---|
| CT | square-root | uniform | square | even | target_ema |
| iCT | doubling | log-normal | huber | gap | |
| iLCT | doubling | log-normal | cauchy | gap | diffusion_weight |

CT: Song et al. 2023 (arXiv:2303.01469); iCT: Song and Dhariwal 2023 (arXiv:2310.14189); iLCT: Dao
et al. 2025 (arXiv:2502.01441).

σ means σ/α, and μ0 of CT's target is `target_ema`. Differs from the papers: a doubling takes
`stage_steps` instead of a share of all steps. iLCT's optimal-transport coupling and its layer norm
without scale are no parts of a loss, and are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, floor, log, sqrt
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval, Le
from torch import Tensor

from distill.field_types import Finite, NonNegative, Positive, PositiveInt
from distill.objectives.base import Batch, Loss
from distill.objectives.consistency.pairwise import Pairwise
from distill.objectives.losses import mean_square
from teachers.errors import UserError

SHARE = 0.25  # of the intervals, those of least noise, where the diffusion loss is added


@dataclass(kw_only=True)
class ConsistencyTraining(Pairwise):
    curriculum: Literal["doubling", "square-root"] = "doubling"
    first: Annotated[PositiveInt, Ge(2), Le(1 << 20)] = 10  # intervals at step 0
    last: Annotated[PositiveInt, Le(1 << 20)] = 1280  # intervals at the end
    stage_steps: PositiveInt = 1000  # steps of a doubling; or those until `last`
    index: Literal["log-normal", "uniform"] = "log-normal"  # how intervals are drawn
    mean: Annotated[float, *Finite, Interval(ge=-20, le=20)] = -1.1  # of log σ
    std: Annotated[Positive, Interval(le=20)] = 2.0
    rho: Positive = 7.0  # σ^(1/ρ) is even on the grid
    distance: Literal["huber", "square", "cauchy"] = "huber"
    gaps: Literal["gap", "even"] = "gap"  # the weight: 1/(σ_t - σ_r), or 1
    diffusion_weight: NonNegative = 0.0  # of the denoising loss at low noise; iLCT has 5
    sigma_data: Positive = 0.5  # of the data, in that loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last < self.first:
            raise UserError(f"objective.last: {self.last} is below first, {self.first}; raise it")

    def intervals(self, step: int) -> int:
        """The number of intervals at a step; the grid has one time more."""
        if self.curriculum == "doubling":
            doublings = min(step // self.stage_steps, 64)
            return min(self.first * 2**doublings, self.last)
        share = min(step / self.stage_steps, 1.0)
        square = share * ((self.last + 1) ** 2 - self.first**2) + self.first**2
        return min(ceil(sqrt(square) - 1), self.last)

    def kept(self, step: int) -> float:
        """μ at a step: `target_ema` at first, and nearer 1 as the grid gets finer."""
        return exp(self.first * log(self.target_ema) / self.intervals(step))

    def loss(self, batch: Batch, step: int) -> Loss:
        n = self.intervals(step)
        t, r = self.sample_times(batch.data, step)
        x, target = self.pair(t, r, batch)
        gap = self.distances(x, target) if self.distance != "cauchy" else self.cauchy(x, target, n)
        value = self.weight(t, r) * gap
        if self.diffusion_weight:
            low = t <= self.grid(n, t)[floor(SHARE * n)].to(t.dtype)
            weight = low * (1 / self.ratio(t) ** 2 + 1 / self.sigma_data**2)
            value = value + self.diffusion_weight * weight * mean_square(x, batch.data)
        return Loss(value.mean(), {"distance": gap.detach().mean()}, x)

    def grid(self, n: int, like: Tensor) -> Tensor:
        """The n + 1 times from 0 up, on the device of `like`; float64."""
        process = self.student.denoiser.process
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64).to(like.device, non_blocking=True)
        alpha, sigma = process.scales(ends)
        low, high = (sigma / alpha).clamp(0.002, 80.0) ** (1 / self.rho)
        share = torch.linspace(0, 1, n + 1, dtype=torch.float64, device=like.device)
        times = process.time((low + share * (high - low)) ** self.rho).clamp(0, 1)
        return times * (share > 0)  # exactly 0, which `boundary` looks for

    def sample_times(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        n = self.intervals(step)
        times = self.grid(n, x)
        if self.index == "uniform":
            cell = torch.randint(n, (len(x),), device=x.device)
        else:  # the mass of log σ's normal distribution between neighbours
            place = (self.ratio(times).log() - self.mean) / (sqrt(2) * self.std)
            mass = torch.erf(place).diff().clamp(min=0).cumsum(0)
            u = torch.rand(len(x), dtype=torch.float64, device=x.device) * mass[-1]
            cell = torch.searchsorted(mass, u, right=True).clamp(max=n - 1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return times[cell + 1].to(dtype), times[cell].to(dtype)

    def cauchy(self, x: Tensor, target: Tensor, n: int) -> Tensor:
        """log(1 + m / 2c²) (B,) of the mean square m; c shrinks as the grid gets finer."""
        c = exp(-1.15 * log(n) - 0.85) if n > self.first else 0.00054 * sqrt(x[0].numel())
        return torch.log1p(mean_square(x, target) / (2 * c**2))

    def ode_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """On the line to the datum."""
        return self.student.denoiser.process.noise(batch.data, r, batch.noise)

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """Each interval's weight (B,)."""
        if self.gaps == "even":
            return torch.ones_like(t)
        return 1 / (self.ratio(t) - self.ratio(r)).clamp(min=1e-6)

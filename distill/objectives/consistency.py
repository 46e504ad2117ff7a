"""Consistency: the student's x̂ at t must equal its x̂ at an earlier time r on the same ODE path.

`Consistency` is consistency distillation, Song et al. 2023 (arXiv:2303.01469): x_r is the teacher's
step from x_t. `ConsistencyTuning` is ECT, Geng et al. 2024 (arXiv:2406.14548): no teacher after
initialisation; x_r lies on the straight line to the data. Both use ECT's pairs of times, whose gap
shrinks during training, or neighbours on the 2023 paper's grid.

Targets carry no gradient. The student's parametrisation makes x̂ = x_t at t = 0. Differs from the
papers: distances are between pixels or latents, since LPIPS is not defined at 8×8.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from distill.field_types import Finite, Fraction, NonNegative, PositiveInt
from distill.objectives.base import Batch, Learns, Loss, Objective, Turn
from distill.objectives.losses import LogNormal, Times, huber
from teachers.denoiser import Denoiser
from teachers.process import expand
from teachers.solver import heun_step


@dataclass(kw_only=True)
class Consistency(Objective):
    pairs: Literal["shrinking", "grid"] = "shrinking"  # of times t > r; "grid" is the 2023 paper's
    levels: Annotated[PositiveInt, Ge(2)] = 18  # of the grid: 18 for CIFAR, 40 for ImageNet-64
    times: Times = LogNormal(-1.1, 2.0)  # of t, where pairs shrink
    q: Annotated[float, *Finite, Gt(1)] = 2.0  # r/t grows as 1 - n(t) / q^(stage + 1)
    ratio_max: Annotated[float, Ge(0), Lt(1)] = (
        0.999  # of r/t: closer pairs differ by rounding only
    )
    stage_steps: PositiveInt = 1000  # steps per stage
    solver: Literal["heun", "ddim"] = "heun"  # the teacher's step from t to r
    distance: Literal["huber", "square"] = "huber"  # huber: √(|Δ|² + c²) - c over a whole sample
    huber_c: NonNegative | None = None  # c itself; by default iCT's 0.00054 √d (arXiv:2310.14189)
    target_ema: Fraction = 0.0  # EMA of the target network; 0 uses the student itself

    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        self.target: Denoiser = self.student.denoiser
        if self.target_ema:
            self.target = deepcopy(self.target).requires_grad_(False)

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("student",), partial(self.loss, step=step))
        if self.target_ema:  # after the student's update
            with torch.no_grad():
                mean: list[Tensor] = list(self.target.parameters())
                now: list[Tensor] = list(self.student.denoiser.parameters())
                torch._foreach_lerp_(mean, now, 1 - self.target_ema)

    def loss(self, batch: Batch, step: int) -> Loss:
        f, process = self.student.denoiser, self.student.denoiser.process
        t, r = self.sample_times(batch.data, step)
        x_t = process.noise(batch.data, t, batch.noise)
        with torch.no_grad():
            x_r = self.ode_step(x_t, t, r, batch)
            target = self.boundary(self.target(x_r, r, batch.cond), x_r, r, batch)
        x = f(x_t, t, batch.cond)
        gap = self.distances(x, target)
        return Loss((self.weight(t, r) * gap).mean(), {"distance": gap.detach().mean()}, x)

    def sample_times(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Times t > r (B,) for data x (B, ...)."""
        if self.pairs == "grid":
            cell = torch.randint(self.levels - 1, (len(x),), device=x.device)
            return (cell + 1) / (self.levels - 1), cell / (self.levels - 1)
        process = self.student.denoiser.process
        t = self.times.sample(x, process)
        sigma = self.ratio(t)
        finest = self.q ** -(step // self.stage_steps + 1)  # underflows to 0 in late stages
        ratio = 1 - (1 + 8 * torch.sigmoid(-sigma)) * finest
        r = process.time(sigma * ratio.clamp(0, self.ratio_max)).clamp(min=0)
        return t, torch.minimum(r, t)

    def ode_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """x_r, on the teacher's path through x_t."""
        if self.solver == "heun":
            return heun_step(self.teacher, x_t, t, r, batch.cond)
        return self.teacher.process.step(x_t, self.teacher(x_t, t, batch.cond), t, r)

    def boundary(self, target: Tensor, x_r: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """The target (B, ...); where r is 0, the end of the teacher's path."""
        return torch.where(expand(r == 0, x_r), x_r, target)

    def distances(self, x: Tensor, target: Tensor) -> Tensor:
        """The distance (B,), over the whole sample."""
        if self.distance == "square":
            return (x - target).square().flatten(1).sum(1)
        c = 0.00054 * x[0].numel() ** 0.5 if self.huber_c is None else self.huber_c
        return huber(x, target, c)

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """Each pair's weight (B,): 1 / (σ_t - σ_r), with σ_r = 0 at r = 0; on the grid it is 1."""
        if self.pairs == "grid":
            return torch.ones_like(t)
        return 1 / (self.ratio(t) - self.ratio(r).masked_fill(r == 0, 0)).clamp(min=1e-6)

    def ratio(self, t: Tensor) -> Tensor:
        """σ/α at t (B,), the time in which ECT is written."""
        alpha, sigma = self.student.denoiser.process.scales(t.double())
        return (sigma / alpha).to(t.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()} if self.target_ema else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.target_ema:
            self.target.load_state_dict(state["target"])


@dataclass(kw_only=True)
class ConsistencyTuning(Consistency):
    """Consistency tuning (ECT): no teacher; steps along the line to the data."""

    huber_c: NonNegative | None = 0.0  # ECT's distance is the plain norm

    def ode_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        return self.student.denoiser.process.noise(batch.data, r, batch.noise)

    def boundary(self, target: Tensor, x_r: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """The target (B, ...); where r is 0, the data, since x_r still contains noise of σ_min.

        NaN in the target is replaced by 0, as in the authors' code.
        """
        return torch.where(expand(r == 0, x_r), batch.data, torch.nan_to_num(target))

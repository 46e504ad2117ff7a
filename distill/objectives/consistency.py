"""Consistency: what the student says at t, it must say one step earlier on the same ODE path.

`Consistency` is consistency distillation, Song et al. 2023 (arXiv:2303.01469): the step is the
teacher's, on EDM's grid. `ConsistencyTuning` is ECT, Geng et al. 2024 (arXiv:2406.14548): no
teacher after initialisation; the step goes along the straight line to the data, and shrinks.

Targets carry no gradient. The student's own form makes it exact at t = 0, where the chain is tied
to data. Differs from the papers: distances are pixel ones, since LPIPS has no meaning at 8×8.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from distill.losses import LogNormal, Times, huber
from distill.objective import Batch, Count, Finite, Loss, NonNegative, Objective, Share, Turn
from teachers.denoiser import Denoiser
from teachers.solver import heun_step


@dataclass(kw_only=True)
class Consistency(Objective):
    levels: Annotated[Count, Ge(2)] = 18  # of the grid: 18 for CIFAR, 40 for ImageNet-64
    solver: Literal["heun", "ddim"] = "heun"  # the teacher's step from t to r
    distance: Literal["huber", "square"] = "huber"
    huber_c: NonNegative = 0.00054  # times √d: iCT's (arXiv:2310.14189)
    target_ema: Share = 0.95  # of the network that makes the targets; 0 is the student itself

    def __post_init__(self) -> None:
        self.target: Denoiser = self.student.denoiser
        if self.target_ema:
            self.target = deepcopy(self.target).requires_grad_(False)

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("student",), partial(self.loss, step=step))
        if self.target_ema:  # only now has the student moved
            with torch.no_grad():
                mean: list[Tensor] = list(self.target.parameters())
                now: list[Tensor] = list(self.student.denoiser.parameters())
                torch._foreach_lerp_(mean, now, 1 - self.target_ema)

    def loss(self, batch: Batch, step: int) -> Loss:
        f, process = self.student.denoiser, self.student.denoiser.process
        t, r = self.pair(batch.data, step)
        x_t = process.noise(batch.data, t, batch.noise)
        with torch.no_grad():
            target = self.anchor(
                self.target(self.previous(x_t, t, r, batch), r, batch.cond), r, batch
            )
        gap = self.apart(f(x_t, t, batch.cond), target)
        return Loss((self.weight(t, r) * gap).mean(), {"distance": gap.detach().mean()})

    def pair(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Times t > r (B,): neighbours on the grid, uniform over its cells."""
        cell = torch.randint(self.levels - 1, (len(x),), device=x.device)
        return (cell + 1) / (self.levels - 1), cell / (self.levels - 1)

    def previous(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """x_r, on the teacher's path through x_t."""
        if self.solver == "heun":
            return heun_step(self.teacher, x_t, t, r, batch.cond)
        return self.teacher.process.step(x_t, self.teacher(x_t, t, batch.cond), t, r)

    def anchor(self, target: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """The target as it is; tuning puts data in its place where r has reached them."""
        return target

    def apart(self, x: Tensor, target: Tensor) -> Tensor:
        """The distance (B,), over the whole sample."""
        if self.distance == "square":
            return (x - target).square().flatten(1).sum(1)
        return huber(x, target, self.huber_c * x[0].numel() ** 0.5)

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """Of each pair (B,); distillation weighs them alike."""
        return torch.ones_like(t)

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()} if self.target_ema else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.target_ema:
            self.target.load_state_dict(state["target"])


@dataclass(kw_only=True)
class ConsistencyTuning(Consistency):
    """Consistency tuning (ECT): no teacher; steps along the line to the data, ever shorter."""

    target_ema: Share = 0.0  # ECT's target is the student itself
    huber_c: NonNegative = 0.0  # and its distance the plain norm
    times: Times = LogNormal(-1.1, 2.0)  # of t
    q: Annotated[float, *Finite, Gt(1)] = 2.0  # r/t grows as 1 - n(t) / q^(stage + 1)
    ratio_max: Annotated[float, Ge(0), Lt(1)] = 0.999  # of r/t: closer, only rounding is learned
    stage_steps: Count = 1000  # steps per stage

    def pair(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        process = self.student.denoiser.process
        t = self.times.sample(x, process)
        sigma = self.ratio(t)
        finest = self.q ** -(step // self.stage_steps + 1)  # late stages end at 0: no overflow
        ratio = 1 - (1 + 8 * torch.sigmoid(-sigma)) * finest
        r = process.time(sigma * ratio.clamp(0, self.ratio_max)).clamp(min=0)
        return t, torch.minimum(r, t)

    def previous(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        return self.student.denoiser.process.noise(batch.data, r, batch.noise)

    def anchor(self, target: Tensor, r: Tensor, batch: Batch) -> Tensor:
        clean = (r == 0).view(-1, *(1,) * (target.ndim - 1))
        return torch.where(clean, batch.data, torch.nan_to_num(target))

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """1 / (σ_t - σ_r), where r = 0 stands for no noise at all."""
        return 1 / (self.ratio(t) - self.ratio(r).masked_fill(r == 0, 0)).clamp(min=1e-6)

    def ratio(self, t: Tensor) -> Tensor:
        """σ/α at t (B,), the time in which ECT is written."""
        alpha, sigma = self.student.denoiser.process.scales(t.double())
        return (sigma / alpha).to(t.dtype)

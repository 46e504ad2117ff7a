"""Reflow: a velocity that is constant on the line from a pair's noise to its sample.

| | form | times | more |
|---|---|---|---|
| 1-RF | velocity | uniform | beta: 1 |
| ReFlow (2-RF) | velocity | uniform | distil_from |
| 2-RF++ | 2-rf++ | u-shaped | |
| Simple ReFlow | velocity | exponential | normalise, high_pass, inverted pairs |
| SlimFlow | velocity | uniform | beta: 1, anneal_steps |

ReFlow: Liu et al. 2022 (arXiv:2209.03003); 2-RF++: Lee et al. 2024 (arXiv:2405.20320); Simple
ReFlow: Kim et al. 2024 (arXiv:2410.07815); SlimFlow: Zhu et al. 2024 (arXiv:2407.12718).

The line is that of rectified flow, (1 - t) x + t ε, on any process: t = σ / (α + σ), and the error
of the velocity is that of x̂ over t. One network forward and one backward per sample; the teacher is
not called. From `distil_from` on, the student learns as in KD, at the times of its steps alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import expm1
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.field_types import Fraction, NonNegative, NonNegativeInt
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.losses import huber, mean_square
from distill.objectives.pairs.kd import KD
from distill.objectives.pairs.regression import check_images, distances
from teachers.errors import UserError
from teachers.process import expand

STEEPNESS = 4.0  # of 2-RF++'s density e^(4t), half of it mirrored
TINY = 1e-5  # least t by which an error is divided


@dataclass(kw_only=True)
class Reflow(KD):
    # velocity: |Δu|²; 2-rf++: (1 - t) · a pseudo-Huber distance of u, and `distance` of x̂ over t
    form: Literal["velocity", "2-rf++"] = "velocity"
    times: Literal["uniform", "u-shaped", "exponential"] = "uniform"  # densities 1, cosh, 10^t
    normalise: bool = False  # divide each sample's loss by its value, so that all times count alike
    high_pass: NonNegative = 0.0  # how much more fine detail counts: the error's high-pass part
    beta: Fraction = 0.0  # share of new noise in the stored noise; 1 is an independent pair
    anneal_steps: NonNegativeInt = 0  # steps in which beta falls to 0; 0: it stays
    distil_from: NonNegativeInt | None = None  # the first step of the distillation after reflow

    between_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.distils = False
        if self.form == "2-rf++" and (self.high_pass or self.normalise):
            raise UserError("objective.form: 2-rf++ has no high_pass and no normalise; remove them")

    @property
    def last_stage(self) -> int:
        return self.distil_from or 0

    def check_batch(self, shape: tuple[int, ...]) -> None:
        super().check_batch(shape)
        if self.high_pass:
            check_images(shape)

    def turns(self, step: int) -> Iterator[Turn]:
        distils = self.distil_from is not None and step >= self.distil_from
        reset = distils and not self.distils and step > 0
        self.distils = distils
        loss = super().loss if distils else self.reflow_loss
        yield Turn(("student",), partial(loss, step=step), reset)

    def loss(self, batch: Batch, step: int) -> Loss:
        return (super().loss if self.distils else self.reflow_loss)(batch, step)

    def reflow_loss(self, batch: Batch, step: int) -> Loss:
        process, x = self.student.denoiser.process, batch.data
        z = self.mixed(batch.noise, step)
        t, flow = self.sample_times(x)
        x_t = process.noise(x, t, z)
        guess = self.student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))
        floor = flow.clamp(min=TINY)
        square = mean_square(guess, x) / floor**2
        if self.form == "2-rf++":
            d = x[0].numel()
            error = (guess - x) / expand(floor, x)
            speed = huber(error, torch.zeros_like(error), 0.00054 * d) / d
            end = distances(guess, x, self.distance, self.huber_c)
            value = (1 - flow) * speed + end / floor
        else:
            value = square
            if self.high_pass:
                error = (guess - x) / expand(floor, x)
                sharp = error + self.high_pass * high_passed(error)
                value = mean_square(sharp, torch.zeros_like(sharp))
            if self.normalise:
                value = value / value.detach().clamp(min=torch.finfo(value.dtype).tiny)
        return Loss(value.mean(), {"velocity_error": square.detach().mean()}, guess)

    def mixed(self, z: Tensor, step: int) -> Tensor:
        """The stored noise, with the share of new noise that it has at a step; of unit variance."""
        beta = self.share(step)
        return z if not beta else (1 - beta**2) ** 0.5 * z + beta * torch.randn_like(z)

    def share(self, step: int) -> float:
        """β at a step."""
        return self.beta * (max(0.0, 1 - step / self.anneal_steps) if self.anneal_steps else 1.0)

    def sample_times(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The process's times (B,) for data x (B, ...), and the flow's times σ / (α + σ) there."""
        process, u = self.student.denoiser.process, self.flow_times(x).double()
        t = process.time(u / (1 - u).clamp(min=1e-9)).clamp(0, 1)
        alpha, sigma = process.scales(t)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return t.to(dtype), (sigma / (alpha + sigma)).to(dtype)

    def flow_times(self, x: Tensor) -> Tensor:
        """Times (B,) in [0, 1] by the density that `times` names."""
        u = torch.rand(len(x), device=x.device, dtype=torch.float64)
        if self.times == "exponential":
            return torch.log10(1 + 9 * u)
        if self.times == "u-shaped":
            t = torch.log1p(u * expm1(STEEPNESS)) / STEEPNESS
            mirrored = torch.rand(len(x), device=x.device) < 0.5
            return torch.where(mirrored, 1 - t, t)
        return u

    def state_dict(self) -> dict[str, Any]:
        return {"distils": self.distils}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.distils = state["distils"]


def high_passed(x: Tensor) -> Tensor:
    """x (B, C, H, W) without its mean over 3 × 3 pixels; the border is repeated.

    Raises:
        UserError: x has no rows and columns.
    """
    check_images(x.shape)
    return x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)

"""Trajectory distribution matching: each state of the student's ODE chain gets the teacher's law.

TDM, Luo et al. 2025 (arXiv:2503.06674). A step of the chain from t to `mid`, its next time, gives x̂
and ε̂, and leads to the state x_m = α_m x̂ + σ_m ε̂. More noise n of the forward process leads to
x_τ at a time τ between mid and t, where the teacher T and the fake score F are compared. The target
of x̂ is x̂ + T - F, so for a student of one step this is DMD2 without a critic. The intervals of
the steps do not overlap (`separate`), so one fake score serves all of them.

`fake_target` says what the fake learns:

| | target at x_τ | the fake becomes |
|---|---|---|
| `state` | the x̂ at which the score is n's, -n/β | the denoiser of the states' own noised law |
| `endpoint` | x̂, weighted by ω: the authors' code | with an exact ω, that of x̂'s own noised law |

β n is what noises x_m to x_τ. ω is the normal density of all the noise in x_τ, of ε̂ and n, over
that of n. The authors take means over dimensions, so ω is nearly constant for images. On Gaussian
data `state` makes each state's law the teacher's. `endpoint` does so for the last state alone, with
ω or without: the noise ε̂ of a state depends on its x̂. On the digits `state` is the better one by
far; on the shapes, in a short run that begins at the teacher, `endpoint` is.

Needs no data. A turn costs (n + 1) / 2 forwards of a student of n steps, and 1 of the fake; the
student's also 1 of the teacher.

Differs from the authors' code: `state` is ours; fake and student each walk a chain of their own; ½
of the square, as in DMD2; the code takes the fake's landing times for the student's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from distill.field_types import Fraction, Positive, PositiveInt
from distill.objectives.base import Batch, Loss, Objective, Turn
from distill.objectives.losses import mean_abs, mean_square, surrogate
from students.generator import Generator
from teachers.denoiser import Denoiser
from teachers.errors import UserError
from teachers.process import expand


class Stage(NamedTuple):
    """A step of the chain: its x̂ with its graph, and x_τ with what the fake learns there."""

    x: Tensor
    x_tau: Tensor
    tau: Tensor
    target: Tensor  # of `state`, (B, ...)
    share: Tensor  # of n in the noise of x_τ, as standard deviations: β / σ_τ, (B,)
    ratio: Tensor  # ω, (B,)


@dataclass(kw_only=True)
class TDM(Objective):
    fake: Denoiser  # denoises the states of the student's chain
    student_every: PositiveInt = 1  # steps, each with a fake update, per student update
    separate: bool = True  # τ up to the step's own time less `gap`; else up to `high`
    low: Fraction = 0.02  # the least τ
    high: Fraction = 0.98  # the largest
    gap: Fraction = 0.01
    landing: Literal["next", "random"] = "next"  # mid, or a time between it and the step's own
    fake_target: Literal["state", "endpoint"] = "state"  # see above
    importance: bool = True  # ω of `endpoint`
    snr_max: Positive | None = 5.0  # the fake's weight is SNR up to this; null: its network's own
    distance: Literal["square", "huber"] = "square"  # of x̂ to its target, over |x̂ - T|
    huber_c: Positive = 1e-3

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "never"

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise UserError(f"objective.low: {self.low} is not below high, {self.high}; lower it")
        if max(self.student.counts) > 1 and self.student.renoise:
            raise UserError(
                "student.renoise: TDM's students of several steps follow the ODE; set it to false"
            )

    def turns(self, step: int) -> Iterator[Turn]:
        student, first = self.student.sample_chain()
        yield Turn(("fake",), partial(self.fake_loss, student=student, first=first))
        if step % self.student_every == 0:
            yield Turn(("student",), partial(self.student_loss, student=student, first=first))

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The distance of x̂ to x̂ + T - F, over the mean |x̂ - T|."""
        stage = self.stage(batch, student, first)
        x = stage.x
        with torch.no_grad():
            real, fake = (f(stage.x_tau, stage.tau, batch.cond) for f in (self.teacher, self.fake))
            gap = torch.nan_to_num(fake - real)
            scale = mean_abs(x - real).clamp(min=1e-5)
        if self.distance == "square":
            matching = surrogate(x, gap / scale)
        else:
            delta = x - (x - gap).detach()
            matching = (((delta**2 + self.huber_c**2).sqrt() - self.huber_c) / scale).mean()
        return Loss(matching, {"matching": matching, "gap": gap.abs().mean()}, x)

    def fake_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The fake's denoising of the chain's states, or of x̂."""
        with torch.no_grad():
            stage = self.stage(batch, student, first)
        if self.fake_target == "state":
            target, weight = stage.target, stage.share.square()
        else:
            target, weight = stage.x, stage.ratio if self.importance else 1.0
        error = mean_square(self.fake(stage.x_tau, stage.tau, batch.cond), target)
        if self.snr_max is None:
            own = self.fake.weight(stage.tau)
        else:
            alpha, sigma = self.fake.process.scales(stage.tau.double())
            own = (alpha / sigma).square().clamp(max=self.snr_max).to(error.dtype)
        return Loss((own * weight * error).mean())

    def stage(self, batch: Batch, student: Generator, first: int) -> Stage:
        """The step that each sample of the batch ends with, and its state noised to τ."""
        process = self.teacher.process
        x_t, t = student.inputs(batch.noise, batch.cond, first), student.ends(batch.noise, first)
        x = student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))
        mid = student.landings(batch.noise, first)
        if self.landing == "random":
            mid = mid + (t - self.gap - mid).clamp(min=0) * torch.rand_like(t)
        tau = self.draw(t, mid)
        alpha, sigma = process.at(mid, x)
        done = expand(mid == 0, x)  # x̂ is what users see, whatever noise t = 0 has
        alpha, sigma = torch.where(done, 1.0, alpha), torch.where(done, 0.0, sigma)
        (alpha_t, sigma_t), clean = process.at(tau, x), x.detach()
        eps, n = process.eps(x_t, clean, t), torch.randn_like(x)
        state, kept = alpha * clean + sigma * eps, alpha_t / alpha
        beta = (sigma_t**2 - (kept * sigma) ** 2).clamp(min=1e-12).sqrt()
        target = (state - kept * sigma**2 / beta * n) / alpha
        total = (kept * sigma * eps + beta * n) / sigma_t
        log_ratio = (n.square() - total.square()).flatten(1).mean(1) / 2
        share = (beta / sigma_t).flatten()
        return Stage(x, kept * state + beta * n, tau, target, share, log_ratio.exp())

    def draw(self, t: Tensor, mid: Tensor) -> Tensor:
        """Times τ (B,), between those of a step from t to mid (B,)."""
        u = torch.rand(len(t), device=t.device)
        low = mid.to(u).clamp(min=self.low)
        high = (t.to(u) - self.gap).clamp(max=self.high) if self.separate else self.high
        return low + (high - low).clamp(min=0) * u

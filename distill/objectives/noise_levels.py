"""How an objective draws its times: kinds of distributions that a recipe's `times` can name.

The keys say which kind it is. Each draws noise levels, so that it means the same on any process.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from pydantic.dataclasses import dataclass
from torch import Tensor

from distill.field_types import Finite, Fraction, Positive
from teachers.process import Process


@dataclass(frozen=True, config={"extra": "forbid"})
class Uniform:
    """Times uniform in the process's own t, between `low` and `high`.

    shift: Then multiply σ/α by it, as rectified flows do for large images (arXiv:2403.03206).
    """

    low: Fraction = 0.0
    high: Fraction = 1.0
    shift: Positive = 1.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low, {self.low}, is above high, {self.high}; lower it")

    def sample(self, like: Tensor, process: Process) -> Tensor:
        """One time for each item of `like` (B, ...), shaped (B,)."""
        u = torch.rand(len(like), device=like.device)
        t = self.low + (self.high - self.low) * u
        if self.shift == 1:
            return t
        alpha, sigma = process.scales(t.double())
        return process.time(sigma * self.shift / alpha).clamp(0, 1).to(t.dtype)


@dataclass(frozen=True, config={"extra": "forbid"})
class LogNormal:
    """Noise levels σ/α whose logarithm is N(mean, std²), as EDM trains (arXiv:2206.00364).

    The logit of a rectified flow's t is log σ/α, so this is also its logit-normal distribution.
    """

    mean: Annotated[float, *Finite, Interval(ge=-20, le=20)]
    std: Annotated[float, *Finite, Interval(ge=0, le=20)]

    def sample(self, like: Tensor, process: Process) -> Tensor:
        """One time for each item of `like` (B, ...), shaped (B,), clamped to [0, 1]."""
        normal = torch.randn(len(like), device=like.device)
        return process.time((self.mean + self.std * normal).exp()).clamp(0, 1)


@dataclass(frozen=True, config={"extra": "forbid"})
class LogUniform:
    """Noise levels σ/α whose logarithm is uniform between those of `least` and `most`.

    The density of times is proportional to g²/σ² of a process dx = f x dt + g dw, because
    d log(σ²/α²) = g²/σ² dt: the weights of maximum likelihood (arXiv:2101.09258), by which
    discriminator guidance (arXiv:2211.17091) draws its times.
    """

    least: Positive
    most: Positive

    def __post_init__(self) -> None:
        if self.least >= self.most:
            raise ValueError(f"least, {self.least}, is not below most, {self.most}; lower it")

    def sample(self, like: Tensor, process: Process) -> Tensor:
        """One time for each item of `like` (B, ...), shaped (B,), clamped to [0, 1]."""
        share = torch.rand(len(like), device=like.device)
        return process.time(self.least * (self.most / self.least) ** share).clamp(0, 1)


@dataclass(frozen=True, config={"extra": "forbid"})
class LogStudent:
    """Noise levels σ/α whose logarithm is Student's t, truncated to log low … log high.

    With few degrees of freedom the density is nearly 1/|log σ - mean|: most times are near the
    mean, and the tail still reaches `high`. TCM's second stage (arXiv:2410.14895).
    """

    mean: Annotated[float, *Finite, Interval(ge=-20, le=20)]
    std: Annotated[Positive, Interval(le=20)]  # the scale
    dof: Positive  # degrees of freedom
    low: Positive = 1.0
    high: Positive = 80.0

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low, {self.low}, is not below high, {self.high}; lower it")

    def sample(self, like: Tensor, process: Process) -> Tensor:
        """One time for each item of `like` (B, ...), shaped (B,), clamped to [0, 1]."""
        kind = {"dtype": torch.float64, "device": like.device}
        scale = self.std * self.dof**0.5
        # Even in asinh, which follows the density's own scale.
        ends = torch.tensor([self.low, self.high], dtype=torch.float64)
        ends = (ends.to(like.device, non_blocking=True).log() - self.mean) / scale
        share = torch.linspace(0, 1, 4097, **kind)
        place = (ends.asinh()[0] + share * ends.asinh().diff()).sinh()
        middle = (place[1:] + place[:-1]) / 2
        mass = ((1 + middle**2) ** (-(self.dof + 1) / 2) * place.diff()).cumsum(0)
        u = torch.rand(len(like), **kind) * mass[-1]
        cell = torch.searchsorted(mass, u).clamp(max=len(mass) - 1)
        before = torch.cat([mass.new_zeros(1), mass])[cell]
        part = (u - before) / (mass[cell] - before)
        log_sigma = self.mean + scale * (place[cell] + part * place.diff()[cell])
        return process.time(log_sigma.exp()).clamp(0, 1).to(torch.float32)


Times = Uniform | LogNormal | LogUniform | LogStudent

"""The results of the doctor's checks, and the subject that they examine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from teachers.denoiser import Cond, Denoiser, Guided
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Check:
    """One property that a teacher must have, and whether it has it.

    Args:
        value: The measurement; None where nothing could be measured.
        bound: What the value should be, in words.
        remedy: For a broken one, what to change; it starts with the field at fault.
    """

    name: str
    value: float | None
    bound: str
    verdict: Literal["ok", "broken", "untrained?", "left out"]
    remedy: str = ""


def check(name: str, value: float, bound: str, good: bool, remedy: str) -> Check:
    """A check with its verdict. NaN is broken, as every comparison with it is false."""
    return Check(name, value, bound, "ok" if good else "broken", "" if good else remedy)


@dataclass(frozen=True)
class Subject:
    """A teacher and the data that it is examined on.

    Args:
        images: (N, C, H, W) in [-1, 1], or (N, D) for teachers of points.
        x: Their data (N, ...).
        cond: Their condition, each entry (N, ...).
        described: Whether `cond` describes the images.
        guided: The guided teacher; None where it has no null condition.
    """

    teacher: Teacher
    images: Tensor
    x: Tensor
    cond: Cond
    described: bool
    guided: Guided | None

    @property
    def denoiser(self) -> Denoiser:
        return self.teacher.denoiser

    def noised(self, ratio: float) -> tuple[Tensor, Tensor]:
        """x_t and t at a σ/α, with noise that depends on the shape alone."""
        t = self.denoiser.process.time(torch.tensor([ratio], dtype=torch.float64))
        t = t.clamp(0, 1).to(self.x).expand(len(self.x))
        return self.denoiser.process.noise(self.x, t, noise_like(self.x)), t


def noise_like(x: Tensor) -> Tensor:
    """Unit noise shaped like x, the same at every call."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def relative(a: Tensor, b: Tensor) -> float:
    """The distance from a to b over the length of b."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()

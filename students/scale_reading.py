"""Students of several guidance scales: those that read one in one pass, and guided ones.

Guided distillation (arXiv:2210.03142) and latent consistency models (arXiv:2310.04378) train
students on the scale of each sample, which stands in its condition as `guidance_scale`. It enters
where stock pipelines pass it: Stable Diffusion's UNets get diffusers' input of an embedding of
w = g - 1, with zero weights. Other networks, and adapters, add an embedding to that of the time,
as landing times are added, and leave with one scale folded into the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from students.generator import Generator
from students.lora import adapter_of, unwrap
from students.two_time import NumberReading, shifted
from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Cond, Denoiser, Guided, Wrapper


class ScaleReading(NumberReading):
    """A denoiser whose network reads the condition's `guidance_scale` (B,).

    Args:
        denoiser: A pretrained network, or an adapter on one.
        range: The scales that it is trained on; others are read as the nearest end.
        scale: The scale where the condition has none: that of samples and of exports.

    Raises:
        UserError: its family names no time embedding, and has no such input of its own.
    """

    def __init__(self, denoiser: Denoiser, range: tuple[float, float], scale: float) -> None:
        self.range, self.scale = range, scale
        if adapter_of(denoiser) is None and unwrap(denoiser).add_scale_input():
            Wrapper.__init__(self, denoiser)
            self.embedding = None
        else:
            low, high = range
            super().__init__(denoiser, (scale - low) / (high - low), "a guidance scale")

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        own, rest = conditions.without(cond, GUIDANCE_SCALE)
        own = torch.full_like(t, self.scale) if own is None else own
        if self.embedding is None:
            return self.denoiser(x_t, t, {**(rest or {}), GUIDANCE_SCALE: own}, s)
        low, high = self.range
        place = ((own - low) / (high - low)).clamp(0, 1)
        with shifted(unwrap(self).backbone, self.shifts(place)):
            return self.denoiser(x_t, t, rest, s)

    def facts(self) -> dict[str, Any]:
        """What a student's folder says: the range, the scale of samples, and whether stock
        pipelines pass the network a scale."""
        return {"range": list(self.range), "scale": self.scale, "input": self.embedding is None}


class GuidedStudent(Guided):
    """A student that stays guided: its stock pipeline mixes two passes, as SnapFusion's does."""

    def facts(self) -> dict[str, Any]:
        """What a student's folder says: the scale of samples, at which its pipeline guides."""
        return {"scale": self.scale, "guided": True}


def scale_reading(generator: Generator, range: tuple[float, float], scale: float) -> Generator:
    """Have a student read guidance scales, in place: the student.

    Raises:
        UserError: as `ScaleReading` does.
    """
    generator.denoiser = ScaleReading(generator.denoiser, range, scale)
    return generator


def pipeline_scale(denoiser: Denoiser) -> float | None:
    """The `guidance_scale` that a student's stock pipeline needs; None if it needs none."""
    if isinstance(denoiser, GuidedStudent):
        return denoiser.scale
    reading = reading_of(denoiser)
    return reading.scale if reading is not None and reading.embedding is None else None


def reading_of(denoiser: Denoiser) -> ScaleReading | None:
    """How a student reads guidance scales; None if it does not."""
    while isinstance(denoiser, Wrapper):
        if isinstance(denoiser, ScaleReading):
            return denoiser
        denoiser = denoiser.denoiser
    return None

"""The two x̂ that classifier-free guidance mixes, for objectives that need them apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.field_types import Fraction
from distill.objectives.base import Objective
from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE, Cond
from teachers.denoiser import Denoiser, Guided
from teachers.errors import UserError
from teachers.process import expand


def guidance_of(teacher: Denoiser, key: str) -> Guided:
    """The teacher's guidance by an unconditional branch.

    Args:
        key: The recipe key that needs it, which begins the message.

    Raises:
        UserError: the teacher is not guided, or in another way.
    """
    if type(teacher) is not Guided or teacher.null is None or teacher.scale == 1:
        raise UserError(
            f"objective.{key}: it needs a teacher with classifier-free guidance at all noise "
            "levels, and without a discriminator; set teacher.guidance to a number other than 1, "
            "or remove the key"
        )
    return teacher


def unguided(guide: Guided, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The teacher's x̂ (B, ...) without guidance: one evaluation."""
    return guide.denoiser(x_t, t, conditions.without(cond, GUIDANCE_SCALE)[1])


def guidance_step(guide: Guided, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """The teacher's x̂ (B, ...) without guidance, and that with it: two evaluations."""
    own, cond = conditions.without(cond, GUIDANCE_SCALE)
    x, negative = guide.pair(x_t, t, cond)
    return x, guide.mixed(x, negative, own)


def guided_alike(guide: Guided, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The x̂ (B, ...) of another denoiser, guided as the teacher is: two evaluations."""
    own, cond = conditions.without(cond, GUIDANCE_SCALE)
    assert cond is not None
    both = conditions.joined(*guide.branches(cond))
    x, negative = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return guide.mixed(x, negative, own)


def with_nulls(guide: Guided, cond: Cond, dropped: Tensor) -> Cond:
    """The condition with that of the negative branch for some samples.

    Args:
        dropped: Which samples, booleans (B,).
    """
    _, cond = conditions.without(cond, GUIDANCE_SCALE)
    assert cond is not None
    plain, null = guide.branches(cond)
    return {k: torch.where(expand(dropped, v), null[k], v) for k, v in plain.items()}


@dataclass(kw_only=True)
class GuidedFake(Objective):
    """An objective whose fake score may be guided as the teacher is."""

    fake: Denoiser  # denoises the student's samples
    guide_fake: bool = False  # guide the fake score as the teacher is guided
    drop: Fraction = 0.1  # share of the fake's samples without a condition, with guide_fake

    def __post_init__(self) -> None:
        if self.guide_fake:
            guidance_of(self.teacher, "guide_fake")

    def fake_x(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x̂ (B, ...) of the fake score, guided as the teacher where both are."""
        if not self.guide_fake:
            return self.fake(x_t, t, cond)
        return guided_alike(guidance_of(self.teacher, "guide_fake"), self.fake, x_t, t, cond)

    def shown_to_fake(self, x: Tensor, cond: Cond) -> Cond:
        """The condition that the fake learns samples x (B, ...) with: some have the null one."""
        if not self.guide_fake or not self.drop:
            return cond
        dropped = torch.rand(len(x), device=x.device) < self.drop
        return with_nulls(guidance_of(self.teacher, "guide_fake"), cond, dropped)

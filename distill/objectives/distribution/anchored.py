"""DMD2 for a student that learns something new and stays as it is elsewhere.

DMD2, Yin et al. 2024 (arXiv:2405.14867), on the items that are new. On known items the student is
held to its own output before tuning, at the states of its own chains, as learning without
forgetting does (Li and Hoiem 2016, arXiv:1606.09282): the teacher's own changes there do not reach
it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.field_types import NonNegative, NonNegativeInt
from distill.objectives.base import Batch, Loss
from distill.objectives.distribution.dmd2 import DMD2, Samples
from distill.objectives.finetune import states
from distill.objectives.losses import mean_square
from students.generator import Generator
from teachers import conditions
from teachers.errors import UserError


@dataclass(kw_only=True)
class AnchoredDMD2(DMD2):
    known_from: NonNegativeInt | None = None  # items of the data from this number on are known
    anchor: NonNegative = 4.0  # weight of the squared change of the output on known items

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_step:
            raise UserError("objective.first_step: dmd2-anchored has none; take dmd2, or remove it")
        self.before = deepcopy(self.student.denoiser).requires_grad_(False)

    def student_loss(
        self, batch: Batch, student: Generator, first: int = 0, shared: list[Samples] | None = None
    ) -> Loss:
        """Distribution matching on the new items of the batch, and the anchor on the known ones."""
        if self.known_from is None or batch.items is None:
            return super().student_loss(batch, student, first, shared)
        known = batch.items >= self.known_from
        share = known.float().mean().item()
        zero = batch.noise.new_zeros(())
        if share < 1:
            matched = super().student_loss(part(batch, ~known), student, first, shared)
        else:
            matched = Loss(zero, {"matching": zero, "gap": zero})
        drift = self.drift(part(batch, known), student, first) if share else zero
        value = (1 - share) * matched.value + share * self.anchor * drift
        return Loss(value, {**matched.logs, "drift": drift})

    def drift(self, batch: Batch, student: Generator, first: int) -> Tensor:
        """The squared change of the student's output since the start, mean over the batch: ()."""
        places = [(first + i) % len(student.times) for i in range(len(batch.noise))]
        x_t = states(student, batch.noise, batch.cond, places)
        t = torch.tensor([student.times[k] for k in places], dtype=x_t.dtype)
        t = t.to(x_t.device, non_blocking=True)
        with torch.no_grad():
            before = self.before(x_t, t, batch.cond)
        return mean_square(student.denoiser(x_t, t, batch.cond), before).mean()


def part(batch: Batch, chosen: Tensor) -> Batch:
    """Some items of a batch.

    Args:
        chosen: (B,), of booleans, on the host.
    """
    rows = chosen.nonzero().flatten()
    index = rows.to(batch.noise.device)
    x = None if batch.x is None else batch.x[index]
    items = None if batch.items is None else batch.items[rows]
    return Batch(x, batch.noise[index], conditions.rows(batch.cond, index), items)

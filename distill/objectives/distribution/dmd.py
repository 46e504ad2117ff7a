"""DMD: distribution matching, and regression on pairs of noise and the teacher's own sample.

Yin et al. 2023 (arXiv:2311.18828), before DMD2. The matching is DMD2's, on fresh noise, times α.
The regression keeps the modes that matching alone may drop: x̂ of a pair's noise must be near the
sample that the teacher's solver made of it (`distill pairs`). Student and fake score learn in every
step.

A step costs 3 forwards of the student, 1 of the teacher and 2 of the fake score. With a critic, its
data are the pairs' samples. Before `matching_from`, the student regresses alone, at 1 forward: it
then starts as a flow map, as CausVid (arXiv:2412.07772). The fake score starts from the teacher.

Differs from the paper: `distance` is the square, its ablation (LPIPS is for teachers of RGB
images); its code, which came with DMD2, leaves α out (`weighting: code`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import NonNegative, NonNegativeInt, PositiveInt
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.distribution.dmd2 import DMD2, Samples
from distill.objectives.pairs.regression import Distance, check_lpips, distances
from students.generator import Generator
from teachers.errors import UserError


@dataclass(kw_only=True)
class DMD(DMD2):
    student_every: PositiveInt = 1  # steps, each with a fake update, per student update
    regression: NonNegative = 0.25  # weight of the distance to the pairs' samples
    distance: Distance = "square"  # the mean square; huber, over a whole sample; or lpips
    weighting: Literal["paper", "code"] = "paper"  # of the matching: times α, or as in DMD2
    matching_from: NonNegativeInt = 0  # the first step of the matching

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "pairs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.student.counts) > 1:
            raise UserError(
                "student.steps: pairs tie a sample to one noise, which DMD's students follow in "
                "one step; set it to 1, or take the objective dmd2"
            )

    def check_batch(self, shape: tuple[int, ...]) -> None:
        super().check_batch(shape)
        if self.distance == "lpips":
            check_lpips(shape)

    @property
    def last_stage(self) -> int:
        return self.matching_from

    def turns(self, step: int) -> Iterator[Turn]:
        if step < self.matching_from:
            yield Turn(("student",), self.regression_loss)
        else:
            yield from super().turns(step)

    def regression_loss(self, batch: Batch) -> Loss:
        """The mean distance of x̂ to the batch's pairs, without its weight."""
        x = self.student(batch.noise, batch.cond)
        distance = distances(x, batch.data, self.distance).mean()
        return Loss(distance, {"regression": distance}, x)

    def student_loss(
        self, batch: Batch, student: Generator, first: int = 0, shared: list[Samples] | None = None
    ) -> Loss:
        """Matching on fresh noise, and the regression on the batch's pairs."""
        loss = super().student_loss(renewed(batch), student, first, shared)
        beside = self.regression_loss(batch)
        logs = {**loss.logs, **beside.logs}
        return Loss(loss.value + self.regression * beside.value, logs, loss.samples)

    def fake_and_critic_loss(
        self, batch: Batch, student: Generator, first: int = 0, shared: list[Samples] | None = None
    ) -> Loss:
        """As DMD2's, on samples of fresh noise."""
        return super().fake_and_critic_loss(renewed(batch), student, first, shared)

    def weighted(self, grad: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The gradient times α, where it is the paper's."""
        return grad if self.weighting == "code" else self.teacher.process.at(t, grad)[0] * grad


def renewed(batch: Batch) -> Batch:
    """The batch with other noise: a source of pairs has only as much as it has pairs."""
    return batch._replace(noise=torch.randn_like(batch.noise))
